"""reap.service with the real vLLM on a real systemd host: what it says, and what it survives.

The tests build on one another to load the model as seldom as possible; each begins and ends with a served model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
NAME = "reap-service"
KEY = "only-of-this-scenario"
CONFIG = "/etc/reap/service.json"
AWAIT_S = 400.0
# sudo logs what the tests run: the key itself must not be in it.
HEADERS = """-H 'Content-Type: application/json' -H "Authorization: Bearer $(cat /etc/reap/api-key)\""""
URL = "http://127.0.0.1:8000/v1/chat/completions"
REQUEST = json.dumps({"model": "Needle-Sim", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8})


class Service:
    """The host and its service."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def run(self, command: str, good: tuple[int, ...] = (0,)) -> str:
        done = self._host.run(command)
        assert done.rc in good, f"{command}: {done.rc}\n{done.stdout}\n{done.stderr}"
        return str(done.stdout)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("/opt/reap/bin/reap status --json", good=(0, 1)))
        return found

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("cat /run/reap/service.json"))
        return found

    def show(self, name: str) -> str:
        return self.run(f"systemctl show -p {name} --value reap.service").strip()

    def answers(self) -> bool:
        done = self._host.run(f"curl -sf -m 60 {HEADERS} -d '{REQUEST}' {URL}")
        return done.rc == 0 and json.loads(done.stdout)["usage"]["completion_tokens"] > 0

    def await_serving(self, not_container: str | None = None) -> None:
        def serves() -> bool:
            state = self.state()
            return state["phase"] == "serving" and state["container_id"] != not_container

        await_true(serves, "a served model", self.story)
        assert self.answers()

    def story(self) -> str:
        return self.run(
            "systemctl status reap.service --no-pager -l | head -12; journalctl -u reap -o cat -n 20", (0, 3)
        )

    def apply(self, good: tuple[int, ...] = (0,)) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            self.run(f"/opt/reap/bin/reap serve --config {CONFIG} --apply 2>/dev/null", good).splitlines()[-1]
        )
        return found

    def edit(self, change: str) -> None:
        """Change the service's file by a Python statement on `c`."""
        script = f"import json; p='{CONFIG}'; c=json.load(open(p)); {change}; json.dump(c, open(p, 'w'))"
        self.run(f'python3 -c "{script}"')

    def nothing_is_left(self) -> None:
        assert self.run("docker ps -aq") == ""
        assert self.run("ls /dev/shm | grep psm_", good=(0, 1)) == ""
        assert self.run("pgrep -f '[V]LLM|[v]llm serve'", good=(0, 1)) == ""


def await_true(condition: Callable[[], object], what: str, story: Callable[[], str] = str) -> None:
    end = time.monotonic() + AWAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {AWAIT_S:.0f} s for: {what}\n{story()}"
        time.sleep(0.5)


@pytest.fixture
def service(host: Host) -> Service:
    return Service(host)


def test_the_unit_is_active_only_after_the_model_answered(service: Service) -> None:
    assert service.show("ActiveState") == "active"
    assert service.show("UnitFileState") == "enabled"
    assert service.answers()
    lines = service.run("journalctl -u reap -o cat").splitlines()
    up = next(i for i, line in enumerate(lines) if "Application startup complete" in line)
    answered = next(i for i, line in enumerate(lines) if line.startswith("reap serve: serving Needle-Sim"))
    started = next(i for i, line in enumerate(lines) if line.startswith("Started reap.service"))
    assert up < answered < started
    assert service.show("StatusText").startswith("serving Needle-Sim on http://127.0.0.1:8000")
    assert service.status()["line"].startswith("serving for")


def test_the_key_is_asked_for_and_told_nowhere(service: Service, host: Host) -> None:
    assert service.run(f"curl -s -o /dev/null -w '%{{http_code}}' -d '{REQUEST}' {URL}") == "401"
    assert host.file("/etc/reap/api-key").mode == 0o600
    assert KEY not in service.run("ps -eww -o args | grep -v [o]nly-of")
    assert KEY not in service.run("systemctl cat reap.service; journalctl -b -o cat; systemctl status reap.service")
    held = service.run(
        "grep -rlF -f /etc/reap/api-key /etc /run/reap /var/lib/reap /opt/reap --exclude-dir=cache", good=(0, 1)
    )
    assert held.split() == ["/etc/reap/api-key"]


def test_it_is_bound_to_loopback_alone(service: Service) -> None:
    listening = service.run("ss -Hltn sport = :8000").split()
    assert listening[3] == "127.0.0.1:8000"


def test_a_killed_container_comes_back_by_itself(service: Service) -> None:
    before = service.state()["container_id"]
    service.run("docker kill reap-model")
    service.await_serving(not_container=before)
    assert service.show("NRestarts") == "1"
    assert "was killed by signal 9 while serving" in service.run("journalctl -u reap -o cat")


def test_a_killed_supervisor_leaves_no_orphan_and_comes_back(service: Service) -> None:
    before = service.state()
    service.run(f"kill -9 {before['pid']}")
    await_true(lambda: not service.run(f"docker ps -aq --no-trunc -f id={before['container_id']}"), "no old container")
    service.await_serving(not_container=before["container_id"])


def test_a_wedged_engine_is_found_and_replaced(service: Service) -> None:
    before = service.state()["container_id"]
    service.run("pkill -STOP -f '[V]LLM::Engine'")
    service.run(f"(curl -s -m 300 {HEADERS} -d '{REQUEST}' {URL} >/dev/null 2>&1 &)")
    service.await_serving(not_container=before)
    assert "wedged: a request waits and nothing moved" in service.run("journalctl -u reap -o cat")


def test_a_taken_port_leaves_what_serves(service: Service) -> None:
    before = service.state()["container_id"]
    service.run("systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 8001")
    await_true(lambda: service.run("ss -Hltn sport = :8001"), "the squatter")
    service.edit("c['port'] = 8001; a = c['arguments']; a[a.index('--port') + 1] = '8001'")
    outcome = service.apply(good=(1,))
    service.run("systemctl stop squatter")
    service.edit("c['port'] = 8000; a = c['arguments']; a[a.index('--port') + 1] = '8000'")
    assert "nothing was changed: port 8001 on 127.0.0.1 is in use by process" in outcome["error"]
    assert service.state()["container_id"] == before
    assert service.apply()["changed"] is False


def test_a_stop_with_a_client_that_never_reads_ends_and_leaves_nothing(service: Service) -> None:
    """Ends with the service stopped: the next test starts it."""
    request = {"model": "Needle-Sim", "messages": [{"role": "user", "content": "go on"}], "max_tokens": 30000}
    # vLLM's own extension: the checkpoint would end its answer at once.
    body = json.dumps(request | {"stream": True, "ignore_eos": True})
    head = "POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\n"
    head += f"Content-Length: {len(body)}\\r\\nAuthorization: Bearer "
    client = f"""
import pathlib, socket, time
text = '{head}' + pathlib.Path('/etc/reap/api-key').read_text().strip() + '\\r\\n\\r\\n' + '{body}'
connection = socket.create_connection(('127.0.0.1', 8000))
connection.sendall(text.encode())
time.sleep(600)
"""
    service.run(f"cat > /tmp/client.py <<'EOF'\n{client}\nEOF\nsystemd-run --unit=client python3 /tmp/client.py")
    busy = "curl -s http://127.0.0.1:8000/metrics | grep -E '^vllm:num_requests_(running|waiting).* [1-9]'"
    await_true(lambda: service.run(busy, good=(0, 1)), "the request")
    service.run("systemctl stop reap.service")
    service.run("systemctl stop client", good=(0, 5))
    assert service.show("Result") == "success"
    assert service.status()["phase"] == "absent"
    service.nothing_is_left()


def test_a_generation_that_cannot_serve_gives_way_to_the_one_before(service: Service) -> None:
    good = service.state()["generation"]
    service.edit("c['entrypoint'] = '/bin/false'")
    outcome = service.apply(good=(1,))
    assert outcome["generation"] != good
    assert "did not serve: the container ended with exit status 1" in outcome["error"]
    assert f"The previous one, {good}, serves again" in outcome["error"]
    assert service.state()["generation"] == good
    assert service.answers()
    assert "NOT sim-needle-32k-" in service.status()["line"]
    # Going back makes it official, and loads nothing anew.
    before = service.state()["container_id"]
    service.run(f"/opt/reap/bin/reap serve --config {CONFIG} --rollback")
    assert json.loads(service.run(f"cat {CONFIG}"))["entrypoint"] == "vllm"
    assert service.state()["container_id"] == before
    assert service.apply()["changed"] is False


def test_failures_in_a_row_end_in_the_latch_with_the_reason(service: Service) -> None:
    """Ends with the service latched: the next test starts it."""
    service.run("systemctl stop reap.service; mv /var/lib/reap/service /var/lib/reap/service.aside")
    service.edit("c['entrypoint'] = '/bin/false'")
    service.apply(good=(1,))
    await_true(lambda: service.show("SubState") == "failed", "the latch", service.story)
    assert service.show("StatusText").startswith("latched after 3 failures, the last: the container ended")
    assert service.show("ExecMainStatus") == "76"
    assert "latched after 3 failures" in service.status()["line"]
    service.nothing_is_left()
    service.run("rm -r /var/lib/reap/service; mv /var/lib/reap/service.aside /var/lib/reap/service")
    service.edit("c['entrypoint'] = 'vllm'")


def test_a_missing_key_file_is_said_and_not_tried_again(service: Service) -> None:
    service.run("mv /etc/reap/api-key /root/")
    service.run("systemctl start reap.service", good=(1,))
    assert "API key file /etc/reap/api-key is missing and a key is required" in service.show("StatusText")
    assert service.show("SubState") == "failed"
    service.run("mv /root/api-key /etc/reap/")


def test_it_serves_again_after_a_reboot_in_the_middle_of_a_load(service: Service) -> None:
    service.run("systemctl start --no-block reap.service")
    await_true(lambda: service.state()["phase"] == "loading", "a load")
    subprocess.run([sys.executable, "-m", "sim", "reboot", NAME, "--hard"], cwd=ROOT, check=True, capture_output=True)
    await_true(lambda: service.run("cat /run/reap/service.json", good=(0, 1)), "the service after the boot")
    service.await_serving()
    assert service.show("ActiveState") == "active"
