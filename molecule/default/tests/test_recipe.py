"""The whole recipe on one simulated Spark: what it left there, a second run, faults, a kill and a reboot.

The order matters: faults come before the reboot, and every fault must leave the served model as it was.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = Path(__file__).resolve().parents[1]
HOST = "reap-default"
REQUEST = json.dumps({"model": "Needle-Sim", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
ASK = f"curl -sS -m 300 http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{REQUEST}'"


def command(name: str, *extra: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of one of the repository's playbooks against the scenario's host."""
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "REAP_PROGRESS": "log",
    }
    # Molecule's own settings would point Ansible at another inventory and colour what is read here.
    unwanted = ("MOLECULE_", "ANSIBLE_INVENTORY", "ANSIBLE_FORCE_COLOR", "FORCE_COLOR", "PY_COLORS")
    environment = {key: value for key, value in environment.items() if not key.startswith(unwanted)}
    inventories = ["-i", str(ROOT / "molecule" / "shared" / "inventory"), "-i", str(SCENARIO / "inventory")]
    program = str(Path(sys.executable).parent / "ansible-playbook")
    return [program, *inventories, "-l", HOST, name, *extra], environment


def playbook(name: str, *extra: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a playbook to its end, with these variables in its environment too."""
    words, environment = command(name, *extra)
    environment |= variables
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def sim(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "sim", *arguments], cwd=ROOT, check=True, capture_output=True)


def changed(done: subprocess.CompletedProcess[str]) -> int:
    match = re.search(rf"^{HOST} +: .*changed=(\d+)", done.stdout, re.MULTILINE)
    assert match, done.stdout[-3000:]
    return int(match[1])


def await_true(what: str, question: Callable[[], bool], seconds: float = 240) -> None:
    """Ask until the answer is yes; fail with what was waited for."""
    limit = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < limit, f"waited {seconds:.0f} s for: {what}"
        time.sleep(1)


@pytest.fixture
def started(host: Any) -> Callable[[], str]:
    """When the model's container was started, as the engine says it."""

    def ask() -> str:
        with host.sudo():
            return str(host.check_output("docker inspect -f '{{.State.StartedAt}}' reap-model"))

    return ask


@contextmanager
def same_service(started: Callable[[], str], host: Any) -> Iterator[None]:
    """Whatever happens inside, the model is neither restarted nor lost, nor would a boot serve anything else."""

    def wanted() -> str:
        with host.sudo():
            return str(host.check_output("sha256sum /etc/reap/service.json"))

    before, file_before = started(), wanted()
    yield
    assert started() == before
    assert wanted() == file_before
    assert host.service("reap").is_running


def answered(host: Any) -> bool:
    done = host.run(ASK)
    return done.rc == 0 and "choices" in done.stdout


def test_the_endpoint_answers(host: Any) -> None:
    answer = json.loads(host.check_output(ASK))
    assert answer["model"] == "Needle-Sim"
    assert answer["choices"][0]["message"]["content"]


def test_it_listens_on_loopback_only(host: Any) -> None:
    assert host.socket("tcp://127.0.0.1:8000").is_listening
    assert not host.socket("tcp://0.0.0.0:8000").is_listening


def test_service_and_watchdog_run_and_start_at_boot(host: Any) -> None:
    for name in ("reap", "reap-watchdog"):
        assert host.service(name).is_running
        assert host.service(name).is_enabled


def test_the_evidence_says_passed_and_that_it_was_simulated(host: Any) -> None:
    assert host.service("reap").is_running
    reports = sorted((ROOT / "artifacts" / HOST).glob("*/report.json"), key=lambda path: path.stat().st_mtime)
    report = json.loads(reports[-1].read_text(encoding="utf-8"))
    assert report["verdict"].startswith("passed")
    assert report["needle_retained"] is True
    assert report["failures"] == []
    page = reports[-1].with_name("report.html").read_text(encoding="utf-8")
    assert "simulated" in page.lower()


def test_a_second_run_changes_nothing(host: Any, started: Callable[[], str]) -> None:
    with same_service(started, host):
        done = playbook("site.yml")
        assert done.returncode == 0, done.stdout[-3000:]
        assert changed(done) == 0, done.stdout[-6000:]


def test_check_mode_on_a_converged_host_promises_no_change(host: Any, started: Callable[[], str]) -> None:
    with same_service(started, host):
        done = playbook("site.yml", "--check", "--diff")
        assert done.returncode == 0, done.stdout[-3000:]
        assert changed(done) == 0, done.stdout[-6000:]


def test_status_is_one_line_and_one_json(host: Any) -> None:
    # With the host as argument, or pytest runs it after all tests that have it, and so after the teardown.
    assert host.service("reap").is_running
    done = playbook("playbooks/status.yml")
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(rf"^{HOST} +ok .*serving", done.stdout, re.MULTILINE), done.stdout[-1500:]
    status = json.loads((ROOT / "artifacts" / HOST / "status.json").read_text(encoding="utf-8"))
    assert status["phase"] == "serving"


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    """The run failed, and the host's line at its end says why."""
    assert done.returncode != 0
    summary = done.stdout[done.stdout.index("HOSTS **") :]
    assert f"{HOST}  FAILED" in summary
    assert words in summary, done.stdout[-3000:]
    assert "Traceback" not in done.stdout + done.stderr


ANOTHER = {**json.loads((ROOT / ".cache/sim/facts.json").read_text())["runtime_image"], "digest": f"sha256:{'0' * 64}"}
ANOTHER_IMAGE = [
    "-e",
    json.dumps(
        {"reap_runtime_image": {"repository": ANOTHER["reference"], "digest": ANOTHER["digest"], "free_bytes": 1}}
    ),
]
# Another model, because what is there already needs neither room nor a hub.
ANOTHER_MODEL = ["-e", "reap_sim_model=sim/no-needle"]
# What is wrong: the settings that make it so, the words the error must have. Nothing of it changes the host.
BAD_INPUT = {
    "unknown profile": (["-e", "reap_profile=k145"], "unknown profile"),
    "misspelt variable": (["-e", "reap_service_prot=1"], "unknown setting reap_service_prot"),
    "floor as a size": (["-e", "watchdog_floor_kb=8G"], "'8G', wanted int"),
    "port that is no number": (["-e", "reap_port=http"], "wanted a TCP port"),
    "port in use": (["-e", "reap_port=22"], "port 22 is in use"),
    "wrong digest": (ANOTHER_IMAGE, "check the repository and the digest"),
    "disk too small": ([*ANOTHER_MODEL, "-e", "model_fetch_reserve_bytes=900000000000000"], "free; wanted"),
    "not root": (["-e", "ansible_become=false"], "the tasks do not run as root: give the login user sudo"),
}
KNOWN_ON_THE_CONTROLLER = ("unknown profile", "misspelt variable", "floor as a size", "port that is no number")


@pytest.mark.parametrize("fault", BAD_INPUT)
def test_bad_input_is_one_clear_error_and_the_model_is_served_on(
    fault: str, host: Any, started: Callable[[], str]
) -> None:
    arguments, words = BAD_INPUT[fault]
    with same_service(started, host):
        done = playbook("site.yml", *arguments)
        refused(done, words)
        assert changed(done) == 0, done.stdout[-6000:]
        assert ("nothing was touched" in done.stdout) == (fault in KNOWN_ON_THE_CONTROLLER)
        assert answered(host)


@contextmanager
def service_down(name: str) -> Iterator[None]:
    """The registry or the hub does not answer this host."""
    sim("service", name, "stop", "--host", HOST)
    try:
        yield
    finally:
        sim("service", name, "start", "--host", HOST)


def test_a_registry_that_is_down_is_named_and_the_model_is_served_on(host: Any, started: Callable[[], str]) -> None:
    with same_service(started, host), service_down("registry"):
        refused(playbook("site.yml", *ANOTHER_IMAGE), "127.0.0.1:5000 does not answer")
        assert answered(host)


def test_a_hub_that_goes_down_in_the_middle_is_named_and_the_model_is_served_on(
    host: Any, started: Callable[[], str]
) -> None:
    faults = ROOT / ".cache/sim/hub-state/faults.json"
    stall = {"path": "/sim/no-needle/resolve/*/model.safetensors", "method": "GET", "stall_after": 2_000_000}
    begun = "find /var/lib/reap/models/sim/no-needle -size +1000k | grep ."
    words, environment = command("site.yml", *ANOTHER_MODEL, "-e", "model_fetch_patience=3")
    faults.write_text(json.dumps({"rules": [stall]}), encoding="utf-8")
    try:
        with same_service(started, host):
            run = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            try:
                await_true("a part of the model", lambda: run.poll() is not None or host.run(begun).rc == 0)
                with service_down("hub"):
                    said, _ = run.communicate(timeout=600)
            finally:
                run.kill()
            refused(subprocess.CompletedProcess(words, run.returncode, said, ""), "http://127.0.0.1:5080 has not sent")
            assert answered(host)
    finally:
        faults.unlink()


def test_a_checkpoint_with_128_experts_is_refused_before_its_weights_and_the_model_is_served_on(
    host: Any, started: Callable[[], str]
) -> None:
    experts = {"model_type": "deepseek_v4", "n_routed_experts": 128}
    folder = ROOT / ".cache/sim/hub/sim/experts-128"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(experts), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    commit = json.loads(host.check_output("curl -sf http://127.0.0.1:5080/api/models/sim/experts-128"))["sha"]
    other = {"model_repo": "sim/experts-128", "model_revision": commit}
    other["model_expect"] = {**experts, "n_routed_experts": 144}
    profile = {"reap_profile_data": f"{{{{ reap_profiles[reap_profile] | combine({other}) }}}}"}
    with same_service(started, host):
        # Without the preflight: no machine of a test has the memory that 144 experts are said to need.
        done = playbook("playbooks/provision.yml", "-e", json.dumps(profile))
        refused(done, "n_routed_experts is 128, wanted 144")
        assert host.run("find /var/lib/reap/models/sim/experts-128* -name '*safetensors*' | grep .").rc == 1
        assert answered(host)


def test_with_registry_and_hub_down_a_converged_host_is_still_right(host: Any, started: Callable[[], str]) -> None:
    with same_service(started, host), service_down("registry"), service_down("hub"):
        done = playbook("site.yml")
        assert done.returncode == 0, done.stdout[-3000:]
        assert changed(done) == 0


def test_an_unreachable_host_is_named() -> None:
    done = playbook("playbooks/preflight.yml", "-e", "ansible_host=127.0.0.1", "-e", "ansible_port=9")
    assert done.returncode != 0
    assert "unreachable" in done.stdout
    assert "check ansible_host" in done.stdout


def test_it_comes_back_after_its_container_is_killed(host: Any, started: Callable[[], str]) -> None:
    before = started()
    with host.sudo():
        host.check_output("docker kill reap-model")
    await_true("the endpoint to answer again", lambda: answered(host))
    assert started() != before


def test_it_comes_back_after_a_reboot(host: Any) -> None:
    with host.sudo():
        boot = host.check_output("cat /proc/1/stat | cut -d' ' -f22")
    sim("reboot", HOST)
    await_true("the endpoint to answer after the reboot", lambda: answered(host))
    with host.sudo():
        assert host.check_output("cat /proc/1/stat | cut -d' ' -f22") != boot
    assert host.service("reap").is_running
    assert host.service("reap-watchdog").is_running


KEYS = ("first-Secret-0f3c", "second-Secret-7a1d")


def test_a_stopped_service_starts_with_a_new_key_that_no_output_tells(host: Any) -> None:
    assert playbook("playbooks/stop.yml").returncode == 0
    assert not host.service("reap").is_running
    # Before and after of a changed key is what --diff would show.
    told = []
    for key in KEYS:
        done = playbook(
            *("playbooks/provision.yml", "--tags", "reap_service_configure", "--diff", "-vvv"), REAP_API_KEY=key
        )
        assert done.returncode == 0, done.stdout[-3000:]
        assert changed(done) == 1, done.stdout[-6000:]
        assert host.file("/etc/reap/api-key").content_string.strip() == key
        told.append(done)
    told.append(playbook("playbooks/start.yml", "--diff", "-vvv", REAP_API_KEY=KEYS[1]))
    assert told[-1].returncode == 0, told[-1].stdout[-3000:]
    for done in told:
        for key in KEYS:
            assert key not in done.stdout + done.stderr
            assert base64.b64encode(key.encode()).decode().rstrip("=") not in done.stdout + done.stderr
    status = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8000/v1/models"
    assert host.check_output(status) == "401"
    assert host.check_output(f"{status} -H 'Authorization: Bearer {KEYS[0]}'") == "401"
    assert host.check_output(f"{status} -H 'Authorization: Bearer {KEYS[1]}'") == "200"


def left(host: Any) -> list[str]:
    """What has the recipe's name on the host, outside of its folders of models and evidence."""
    places = "/etc /opt /run /srv /usr/local /var/cache /var/lib /var/log"
    # What the service manager remembers of units is its own.
    others = ("/run/systemd/*", "/var/lib/docker*", "/var/lib/reap/models/*", "/var/lib/reap/evidence/*")
    skipped = " -o ".join(f"-path '{path}'" for path in others)
    found = f"find {places} \\( {skipped} \\) -prune -o \\( -name reap -o -name '*reap[-.]*' \\) -print"
    with host.sudo():
        paths = str(host.check_output(f"{found}; find /var/lib/reap -mindepth 1 -maxdepth 1 2>/dev/null || true"))
    # The host's own name, and a unit of e2fsprogs.
    return sorted({path for path in paths.splitlines() if HOST not in path and "e2scrub_reap" not in path})


def test_a_teardown_leaves_models_and_evidence_alone_and_goes_further_where_told(host: Any) -> None:
    done = playbook("playbooks/teardown.yml")
    assert done.returncode == 0, done.stdout[-3000:]
    assert left(host) == ["/var/lib/reap", "/var/lib/reap/evidence", "/var/lib/reap/models"]
    with host.sudo():
        assert host.check_output("find /var/lib/reap/models -name '*.safetensors'")
        assert host.check_output("find /var/lib/reap/evidence -name report.json")
        assert host.check_output("docker ps --all --quiet") == ""
        assert host.check_output("docker images --all --quiet") == ""
    assert not host.user("reap").exists
    assert not host.group("reap").exists

    everything = ("-e", "teardown_models=true", "-e", "teardown_evidence=true")
    done = playbook("playbooks/teardown.yml", *everything)
    assert done.returncode == 0, done.stdout[-3000:]
    assert left(host) == []
    assert changed(playbook("playbooks/teardown.yml", *everything)) == 0
