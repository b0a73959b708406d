"""What the verification left on the host and on the controller."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
HOST = "reap-verify"
# As `playbooks/bench.yml` runs it, short enough for every run of the tests: `make verify-long` goes to 30,000 tokens.
LONGER = {"verify_needle_tokens": 9000, "verify_lengths": [2000, 9000], "verify_repeats": 2}


def playbook(name: str, *extra: str) -> subprocess.CompletedProcess[str]:
    """Run a playbook against the scenario's host."""
    # Molecule's own settings would point Ansible at another inventory and colour what is read here.
    unwanted = ("MOLECULE_", "ANSIBLE_INVENTORY", "ANSIBLE_FORCE_COLOR", "FORCE_COLOR", "PY_COLORS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environment |= {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "REAP_PROGRESS": "log"}
    inventories = [ROOT / "molecule" / "shared" / "inventory", Path(__file__).resolve().parents[1] / "inventory"]
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-l", HOST, str(ROOT / name), *extra]
    for folder in inventories:
        command += ["-i", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def newest_report() -> tuple[Path, dict[str, Any]]:
    path = max((ROOT / "artifacts" / HOST).glob("*/report.json"), key=lambda item: item.stat().st_mtime)
    return path, json.loads(path.read_text(encoding="utf-8"))


def test_the_model_found_the_needle() -> None:
    _path, report = newest_report()
    assert report["verdict"] == "passed", report["failures"]
    assert report["needle_retained"] is True
    # Exactly the wanted number, and none of it from the prefix cache.
    assert report["prompt_tokens"] == 8000
    needle = {check["name"]: check for check in report["tasks"]["needle"]["checks"]}
    assert needle["prefix_cache_cold"]["passed"]
    assert needle["prompt_tokens_exact"]["passed"]


# What a model of 9 MB cannot do, and the checks it must fail there: those of the task, and no other.
CANNOT = {
    "temperature_high": {"diverse_at_1_5"},
    "ascii": {"box_closed", "box_text"},
    "mermaid": {"mermaid_block"},
    "code_explanation": {"length", "language", "bug_named", "bug_fixed"},
    "philosophy": {"length", "language", "on_topic"},
    "religion": {"length", "language", "on_topic"},
    "long_decode": {"length", "language", "ends_as_asked", "on_topic"},
    "tool_not_due": {"no_tool_called", "answer"},
}


def test_what_the_model_cannot_do_failed_at_the_task_and_not_at_the_protocol() -> None:
    _path, report = newest_report()
    tasks = report["tasks"]
    assert {name for name, task in tasks.items() if not task["expected"]} == set(CANNOT)
    failed = {name: {c["name"] for c in t["checks"] if not c["passed"]} for name, t in tasks.items()}
    assert {name: checks for name, checks in failed.items() if checks} == CANNOT
    # It did answer: in one word, or with the one call it knows.
    for name in CANNOT:
        for exchange in tasks[name]["exchanges"]:
            assert exchange["content"] == "pong" or exchange["tool_calls"], name


def test_it_says_that_it_was_simulated_and_compares_nothing() -> None:
    path, report = newest_report()
    assert report["simulated"] is True
    assert report["comparison"] == []
    assert "Simulated Spark" in path.with_name("report.html").read_text(encoding="utf-8")


def test_the_report_keeps_its_schema() -> None:
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(newest_report()[1])


def test_the_report_names_the_image_that_runs(host: Host) -> None:
    running = newest_report()[1]["identity"]["running"]
    assert running["image_id"] == host.check_output("docker container inspect --format '{{.Image}}' reap-model")
    # This scenario serves the image as it was pulled: no patch set's label is on it.
    assert running["patch_set"] is None


def test_memory_was_sampled_on_the_host() -> None:
    memory = newest_report()[1]["memory"]
    assert memory["samples_taken"] >= 2
    assert memory["min_kb"] > 0


def test_the_host_has_the_same_evidence_and_its_page(host: Host) -> None:
    path, _report = newest_report()
    folder = host.file(f"/var/lib/reap/evidence/{path.parent.name}")
    assert folder.is_directory
    for name in ("report.json", "report.html"):
        assert host.file(f"{folder.path}/{name}").content == path.with_name(name).read_bytes()


def test_one_run_is_one_folder(host: Host) -> None:
    # The second run of the role found this start verified, and wrote nothing.
    assert len(host.file("/var/lib/reap/evidence").listdir()) == 1


def test_a_longer_prompt_and_the_page_of_all_hosts(host: Host) -> None:
    done = playbook("playbooks/bench.yml", "-e", json.dumps(LONGER))
    assert done.returncode == 0, done.stdout[-3000:]
    path, report = newest_report()
    assert report["verdict"] == "passed"
    assert [item["wanted_tokens"] for item in report["tasks"]["ladder"]["data"]["needles"]] == LONGER["verify_lengths"]
    assert all(item["found"] and item["exact"] for item in report["long_prompts"])
    assert {item["wanted_tokens"] for item in report["long_prompts"]} == set(LONGER["verify_lengths"])
    assert len(report["measurements"]["ttft_s"]["values"]) == LONGER["verify_repeats"]
    index = ROOT / "artifacts" / "index.html"
    assert f"all hosts: {index}" in done.stdout
    assert f'href="{HOST}/{path.parent.name}/report.html"' in index.read_text(encoding="utf-8")


def test_an_endpoint_that_cannot_be_verified_is_a_failed_run_with_evidence(host: Host) -> None:
    container = host.check_output("docker container inspect --format '{{.Id}}' reap-model")
    other = {"verify_profile": "{{ reap_profile_data | combine({'served_model_name': 'Other'}) }}"}
    done = playbook("playbooks/verify.yml", "-e", json.dumps(other))
    assert done.returncode != 0
    line = next(line for line in done.stdout.splitlines() if line.startswith(f"{HOST}  FAILED"))
    assert "verification could not run: endpoint http://127.0.0.1:8000 serves Needle-Sim, not Other" in line
    path, report = newest_report()
    assert report["verdict"] == "could-not-run"
    assert "could not be verified" in path.with_name("report.html").read_text(encoding="utf-8")
    assert "could-not-run" in (ROOT / "artifacts" / "index.html").read_text(encoding="utf-8")
    # This generation passed before: something else is wrong, and nothing gives way.
    assert host.check_output("docker container inspect --format '{{.Id}}' reap-model") == container


def test_a_generation_that_fails_the_verification_gives_way_to_the_one_before(host: Host) -> None:
    def served() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(host.check_output("cat /run/reap/service.json"))
        return found

    before, file = served(), host.check_output("cat /etc/reap/service.json")
    done = playbook("molecule/verify/converge.yml", "-e", "reap_sim_model=sim/no-needle")
    assert done.returncode != 0
    line = next(line for line in done.stdout.splitlines() if line.startswith(f"{HOST}  FAILED"))
    # Both what is wrong and what serves now, in the host's line.
    assert f"verification failed; the generation before, {before['generation']}, serves again: " in line
    assert re.search(r"needle_value: found .*wanted", done.stdout)
    failed = newest_report()[1]
    assert failed["verdict"] == "failed"
    assert failed["needle_retained"] is False
    assert "/no-needle/" in failed["identity"]["served"]["root"]
    assert failed["identity"]["service"]["generation"] != before["generation"]
    # The one before: served by systemd's unit, wanted at the next boot, and right.
    now = served()
    assert (now["phase"], now["generation"]) == ("serving", before["generation"])
    assert host.check_output("cat /etc/reap/service.json") == file
    assert host.service("reap").is_running
    done = playbook("molecule/verify/converge.yml")
    assert done.returncode == 0, done.stdout[-3000:]
    assert newest_report()[1]["verdict"] == "passed"
    assert served()["container_id"] == now["container_id"]
