"""What the scenarios of reap.service ask of their host, over SSH and as root."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "/etc/reap/service.json"
AWAIT_S = 400.0
# sudo logs what the tests run: the key itself must not be in it.
HEADERS = """-H 'Content-Type: application/json' -H "Authorization: Bearer $(cat /etc/reap/api-key)\""""
URL = "http://127.0.0.1:8000/v1/chat/completions"
REQUEST = json.dumps({"model": "Needle-Sim", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8})


def long_request(tokens: int) -> str:
    """A streamed answer of so many tokens; ignore_eos is vLLM's own: the checkpoint would end its answer at once."""
    messages = [{"role": "user", "content": "go on"}]
    body = {"model": "Needle-Sim", "messages": messages, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    return json.dumps(body)


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
        done = self._host.run(f"curl -sf -m 300 {HEADERS} -d '{REQUEST}' {URL}")
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
        assert self.run("ls /dev/shm | grep -E '^(psm_|sem.mp-|torch_)'", good=(0, 1)) == ""
        assert self.run("pgrep -f '[V]LLM|[v]llm serve'", good=(0, 1)) == ""


def await_true(condition: Callable[[], object], what: str, story: Callable[[], str] = str) -> None:
    end = time.monotonic() + AWAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {AWAIT_S:.0f} s for: {what}\n{story()}"
        time.sleep(0.5)


def playbook(scenario: str, *arguments: str) -> str:
    """What a playbook says on a scenario's hosts, on one line that begins with "passed" or "failed"."""
    unwanted = ("ANSIBLE_", "MOLECULE_", "FORCE_COLOR", "PY_COLORS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    environment |= {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8"}
    inventories = ["-i", "molecule/shared/inventory", "-i", f"molecule/{scenario}/inventory"]
    command = [".venv/bin/ansible-playbook", *inventories, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return " ".join(("failed" if done.returncode else "passed", *(done.stdout + done.stderr).split()))
