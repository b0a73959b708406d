"""The watchdog beside the real service, whose container is busy with a request, and memory that moves near the floor.

Memory is a double (files/memory.py), because the machine's own cannot be brought to a Spark's lines; so is the model in
the container (files/model.py). The tests build on one another; each begins with a served model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = Path(__file__).resolve().parents[1]
NAME = "reap-watchdog"
AWAIT_S = 300.0
FLOOR_KB = 8 << 20
EVENTS = "/var/lib/reap/watchdog/events.jsonl"
UNITS = {
    "memory-double": "[Unit]\nBefore=reap-watchdog.service\n[Service]\nExecStart=/usr/bin/python3 /srv/memory.py\n",
    "load": "[Service]\nExecStart=/usr/bin/curl -sN -d '{\"stream\": true}'"
    " -o /dev/null http://127.0.0.1:8000/v1/chat/completions\nRestart=always\nRestartSec=500ms\n"
    "[Unit]\nStartLimitIntervalSec=0\n",
}
LINES = f"floor_kb = {FLOOR_KB}\\nloading_floor_kb = {6 << 20}\\nhard_floor_kb = {3 << 20}"


def await_true(condition: Callable[[], object], what: str, story: Callable[[], str] = str) -> None:
    end = time.monotonic() + AWAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {AWAIT_S:.0f} s for: {what}\n{story()}"
        time.sleep(0.5)


def playbook(path: str, *extra: str) -> subprocess.CompletedProcess[str]:
    """Run a playbook of the repository against the scenario's host."""
    # Molecule's own settings would point Ansible at another inventory and colour what is read here.
    unwanted = ("MOLECULE_", "ANSIBLE_INVENTORY", "ANSIBLE_FORCE_COLOR", "FORCE_COLOR", "PY_COLORS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environment |= {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "REAP_PROGRESS": "log"}
    inventories = ["-i", str(ROOT / "molecule/shared/inventory"), "-i", str(SCENARIO / "inventory")]
    command = [str(Path(sys.executable).parent / "ansible-playbook"), *inventories, path, *extra]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


class Service:
    """The host with both units."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def run(self, command: str, good: tuple[int, ...] = (0,)) -> str:
        done = self._host.run(command)
        assert done.rc in good, f"{command}: {done.rc}\n{done.stdout}\n{done.stderr}"
        return str(done.stdout)

    def put(self, path: str, text: str) -> None:
        self.run(f"cat > {path} <<'EOF'\n{text}\nEOF")

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("cat /run/reap/service.json", (0, 1)) or "{}")
        return found

    def status_text(self) -> str:
        return self.run("systemctl show -p StatusText --value reap.service").strip()

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        text = self.run(f"cat {EVENTS}", good=(0, 1))
        return [event for event in map(json.loads, text.splitlines()) if event["event"] in kinds]

    def await_busy(self, not_container: str | None = None) -> str:
        """Wait until the model serves and works on a request; returns the container's id."""
        busy = "curl -s http://127.0.0.1:8000/metrics | grep -E '^vllm:num_requests_running.* [1-9]'"

        def works() -> bool:
            state = self.state()
            other = state.get("container_id") != not_container
            return state.get("phase") == "serving" and other and bool(self.run(busy, good=(0, 1)))

        await_true(works, "a model that serves and is busy", self.story)
        return str(self.state()["container_id"])

    def story(self) -> str:
        return self.run(f"systemctl status reap reap-watchdog load --no-pager -l -n 15; tail -n 30 {EVENTS}", (0, 1))

    def no_stop_was_decided_and_the_teardown_went_below_the_floor(self) -> None:
        await_true(
            lambda: any(e["phase"] == "absent" for e in self.events("phase")), "the end of the phase", self.story
        )
        assert self.events("kill", "shed", "kill_failed") == []
        (ended,) = (event for event in self.events("phase") if event["phase"] == "absent")
        assert ended["reason"].startswith("phase stopping -> absent")
        assert ended["mem_available_kb"] < FLOOR_KB


@pytest.fixture(scope="module")
def served(host: Host) -> Service:
    service = Service(host)
    # What the tests of the watchdog alone left: lines of their own, a hold, a spent budget.
    service.run(f"systemctl stop reap-watchdog; rm -f /run/reap/watchdog.json /run/reap/service.json {EVENTS}")
    service.put("/srv/memory.py", (SCENARIO / "files/memory.py").read_text())
    service.put("/srv/model.py", (SCENARIO / "files/model.py").read_text())
    service.run("install -D -m 755 /srv/model.py /var/lib/reap/cache/model.py")
    for name, text in UNITS.items():
        service.put(f"/etc/systemd/system/{name}.service", f"{text}[Install]\nWantedBy=multi-user.target\n")
    service.run("systemctl daemon-reload && systemctl enable --now memory-double load")
    await_true(lambda: service.run("cat /srv/meminfo", (0, 1)), "the double of meminfo")
    toml = "/etc/reap/watchdog.toml"
    service.run(f"sed -i '/^[a-z_]*floor_kb/d; /^meminfo/d; 1a {LINES}' {toml}")
    service.run(f"sed -i '/^.paths.$/a meminfo = \"/srv/meminfo\"' {toml}")
    service.run("systemctl start reap-watchdog")
    done = playbook(str(SCENARIO / "serve.yml"))
    assert done.returncode == 0, done.stdout[-3000:]
    return service


@pytest.fixture
def service(served: Service) -> Service:
    served.await_busy()
    served.run(f"rm -f {EVENTS}")
    return served


def test_a_stop_and_a_start_under_load_are_no_kill(service: Service) -> None:
    before = service.await_busy()
    service.run("systemctl stop reap")
    service.no_stop_was_decided_and_the_teardown_went_below_the_floor()
    service.run("systemctl start reap")
    service.await_busy(not_container=before)
    assert service.events("kill", "shed") == []


def test_a_restart_under_load_is_no_kill(service: Service) -> None:
    before = service.await_busy()
    service.run("systemctl restart reap")
    service.await_busy(not_container=before)
    service.no_stop_was_decided_and_the_teardown_went_below_the_floor()


def test_an_upgrade_under_load_is_no_kill(service: Service) -> None:
    before = service.state()
    change = "c['environment']['REAP_TEST'] = 'another generation'"
    script = f"import json; p='/etc/reap/service.json'; c=json.load(open(p)); {change}; json.dump(c, open(p, 'w'))"
    service.run(f'python3 -c "{script}"')
    service.run("/opt/reap/bin/reap serve --config /etc/reap/service.json --apply")
    service.await_busy(not_container=before["container_id"])
    assert service.state()["generation"] != before["generation"]
    service.no_stop_was_decided_and_the_teardown_went_below_the_floor()


def test_a_reboot_under_load_is_no_kill_and_it_guards_before_the_next_load(service: Service) -> None:
    before = service.await_busy()
    subprocess.run([sys.executable, "-m", "sim", "reboot", NAME], cwd=ROOT, check=True, capture_output=True)
    service.await_busy(not_container=before)
    service.no_stop_was_decided_and_the_teardown_went_below_the_floor()
    story = [event["event"] + ":" + event["phase"] for event in service.events("start", "stop", "phase")]
    assert story.index("phase:absent") < story.index("stop:absent") < story.index("start:absent")
    assert story.index("start:absent") < story.index("phase:loading")


def test_after_a_kill_a_start_waits_until_memory_was_seen_to_return(service: Service) -> None:
    before = service.await_busy()
    service.run("touch /srv/hog")
    await_true(lambda: service.events("killed"), "the kill", service.story)
    await_true(lambda: "the watchdog asks for" in service.status_text(), "a start that waits", service.story)
    assert service.events("release") == []
    assert service.run("docker ps -q") == ""
    (kill,) = service.events("kill")
    assert kill["mem_available_kb"] > 3 << 20
    bundle = f"/var/lib/reap/evidence/watchdog/{kill['evidence']}/bundle.json"
    await_true(lambda: service.run(f"ls {bundle}", good=(0, 2)), "the evidence bundle", service.story)
    saved = json.loads(service.run(f"cat {bundle}"))
    # The engine removes the container and its log at its end; its words and its state before that are kept.
    assert "model double: listening" in saved["container_log"]
    assert not [line for line in saved["container_log"] if line.startswith("reap serve:")]
    assert any("reap serve:" in line for line in saved["journal"])
    assert saved["container_state_before"]["Running"] is True
    assert saved["container_state_before"]["Pid"] > 1
    service.run("rm /srv/hog")
    service.await_busy(not_container=before)
    loading = next(event for event in service.events("phase") if event["phase"] == "loading")
    (release,) = service.events("release")
    assert kill["unix"] < release["unix"] < loading["unix"]


def test_the_status_of_the_host_shows_the_kill_and_its_picture(service: Service) -> None:
    done = playbook("playbooks/status.yml")
    assert done.returncode == 0, done.stdout[-3000:]
    folder = ROOT / "artifacts" / NAME
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert status["watchdog"]["kills"] == 1
    assert "watchdog on guard, 1 kills, 1 of 5 stops in the budget's window" in status["line"]
    page = folder / "watchdog" / Path(status["evidence"]).parent.name / "series.html"
    assert f"picture: {page}" in done.stdout
    assert "MemAvailable before and after the kill" in page.read_text(encoding="utf-8")


def test_a_floor_that_leaves_no_room_is_refused_and_the_guard_stays_as_it_was(service: Service) -> None:
    guard = "systemctl show -p MainPID --value reap-watchdog; sha256sum /etc/reap/watchdog.toml"
    before = service.run(guard)
    done = playbook(str(SCENARIO / "converge.yml"), "-e", "watchdog_floor_kb=999999999")
    assert done.returncode != 0
    assert "failed to validate: floor_kb is 999999999, more than sim-needle-32k leaves free on this host" in done.stdout
    assert service.run(guard) == before
