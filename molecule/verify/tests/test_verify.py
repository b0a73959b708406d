"""What the verification left on the host and on the controller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
HOST = "reap-verify"


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


def test_what_the_model_cannot_do_failed_for_the_right_reason() -> None:
    _path, report = newest_report()
    tasks = report["tasks"]
    unexpected = {name for name, task in tasks.items() if not task["passed"] and task["expected"]}
    assert unexpected == set()
    failed = {name: {c["name"] for c in t["checks"] if not c["passed"]} for name, t in tasks.items() if not t["passed"]}
    assert "bug_named" in failed["code_explanation"]
    assert "mermaid_block" in failed["mermaid"]
    assert "box_closed" in failed["ascii"]
    assert "on_topic" in failed["philosophy"]
    assert failed["tool_not_due"] >= {"no_tool_called"}
    # It failed at the task, not at the protocol.
    assert not any("protocol" in names or "connection" in names for names in failed.values())


def test_it_says_that_it_was_simulated_and_compares_nothing() -> None:
    path, report = newest_report()
    assert report["simulated"] is True
    assert report["comparison"] == []
    assert "Simulated Spark" in path.with_name("report.html").read_text(encoding="utf-8")


def test_the_report_keeps_its_schema() -> None:
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(newest_report()[1])


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
