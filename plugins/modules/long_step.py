#!/usr/bin/python
"""The host's half of ``long_step``: start, watch and collect a detached command."""

from __future__ import annotations

DOCUMENTATION = r"""
module: long_step
short_description: Run a command of minutes or hours on the host, detached, with live progress
description:
  - Starts the command in a session of its own, so that a lost connection or an interrupted playbook does not end it.
    A second run with the same command, or with the same O(identity), attaches to the one that runs.
  - The action plugin of the same name waits for the end and shows the progress file, as a live line for each step that
    runs on a host on a terminal and as a log line now and then elsewhere. A step that was only started is shown beside
    the one that is waited for. REAP_PROGRESS=line|log|off on the controller forces one form,
    REAP_PROGRESS_JSON=FILE appends every update to FILE as a JSON line.
  - If the host reboots meanwhile the command is started again, so it must be able to resume.
author: [reap]
options:
  step:
    description: Name of the step. One job per step and host; also names the progress file and the live line.
    type: str
    required: true
  argv:
    description: The command and its arguments; no shell. Required unless O(mode=wait).
    type: list
    elements: str
  environment:
    description: Environment added to the command's.
    type: dict
    default: {}
  secrets:
    description:
      - Environment whose values are masked everywhere and are never on a command line. Empty values are left out.
      - The C(environment) keyword of a task puts its values on the remote shell's command line; use this instead.
    type: dict
    default: {}
  identity:
    description:
      - What the step is about. A second run attaches where this is the same, whatever else its arguments say.
        Default is the whole command, O(argv), O(environment) and O(chdir).
    type: dict
  progress_file:
    description: JSON file that the command writes atomically. Default is /run/reap/progress/<step>.json.
    type: path
  chdir:
    description: Working folder of the command.
    type: path
    default: /
  timeout:
    description:
      - Seconds that the whole step may take; 0 is no limit. At the limit the command is ended, the task fails.
      - With O(mode=wait) they count from the start of the command.
    type: int
    default: 0
  rc_ok:
    description: Exit codes that are no failure.
    type: list
    elements: int
    default: [0]
  check_argv:
    description: Runs instead of O(argv) in check mode; it must change nothing.
    type: list
    elements: str
  mode:
    description: V(run) starts or attaches and waits; V(start) returns at once; V(wait) waits for a job started before,
      and starts it again where a restart of the host ended it.
    type: str
    choices: [run, start, wait]
    default: run
  reconnect:
    description: Seconds that a lost connection may last before the task fails. The command runs on regardless.
    type: int
    default: 600
  job_dir:
    description: Folder of the jobs on the host; a folder that does not outlive a reboot.
    type: path
    default: /run/reap/jobs
  wait_s:
    description: Internal. Seconds that one call waits on the host for the end.
    type: float
    default: 2
  job_id:
    description: Internal. The job an earlier call started.
    type: str
    default: ""
attributes:
  check_mode:
    support: full
    description: Runs O(check_argv), or reports what would run.
  diff_mode:
    support: none
    description: The command says what it changed.
"""

EXAMPLES = r"""
- name: The model revision is on the host
  long_step:
    step: model_fetch
    argv: [/opt/reap/bin/reap, fetch, --repo, org/name, --revision, "{{ revision }}", --dest, /var/lib/reap/models/x]
    secrets: {HF_TOKEN: "{{ lookup('ansible.builtin.env', 'HF_TOKEN') }}"}
"""

RETURN = r"""
rc:
  description: Exit status; null when nothing ran.
  returned: always
  type: int
stdout:
  description: Last 64 KiB of the command's output.
  returned: always
  type: str
stderr:
  description: Last 64 KiB of the command's error output.
  returned: always
  type: str
result:
  description: The last line of stdout when it is a JSON object.
  returned: always
  type: dict
progress:
  description: Last content of the progress file.
  returned: always
  type: dict
attached:
  description: The command was running already.
  returned: always
  type: bool
running:
  description: The command still runs (O(mode=start)).
  returned: always
  type: bool
others:
  description: Steps that run on the host beside this one, each with C(step), C(progress) and C(elapsed_s).
  returned: while the command runs
  type: list
elapsed_s:
  description: Seconds since the command started.
  returned: always
  type: float
"""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

TAIL_BYTES = 64 * 1024

# Runs in an interpreter of its own: the module's code is gone once the connection closes. It holds the lock for as
# long as the command lives and reads the job, secrets among it, from its standard input.
RUNNER = r"""
import fcntl, json, os, signal, subprocess, sys, time
job = json.load(sys.stdin)
folder = job["folder"]
# A handler, not SIG_IGN: the command gets the default back, and its end is still recorded.
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, lambda *_: None)
lock = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
for attempt in range(20):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:
        time.sleep(0.05)  # a look from elsewhere holds the lock for microseconds
else:
    print("busy", flush=True)
    sys.exit(0)
def put(name, value):
    path = os.path.join(folder, name)
    with open(path + ".new", "w", encoding="utf-8") as out:
        json.dump(value, out)
    os.replace(path + ".new", path)
for name in ("end.json", "stdout", "stderr"):
    if os.path.exists(os.path.join(folder, name)):
        os.unlink(os.path.join(folder, name))
try:
    os.unlink(job["progress_file"])
except OSError:
    pass
state = {k: job[k] for k in ("id", "argv", "signature", "boot_id", "progress_file")}
state["pid"] = os.getpid()
state["started_unix"] = time.time()
put("job.json", state)
print("started", flush=True)
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
began = time.monotonic()
with open(os.path.join(folder, "stdout"), "wb") as out, open(os.path.join(folder, "stderr"), "wb") as err:
    try:
        rc = subprocess.Popen(job["argv"], stdin=null, stdout=out, stderr=err, cwd=job["chdir"],
                              env={**os.environ, **job["environment"]}).wait()
    except OSError as error:
        err.write(("%s: %s\n" % (job["argv"][0], error.strerror)).encode())
        rc = 127
put("end.json", {"id": job["id"], "rc": rc if rc >= 0 else 128 - rc, "elapsed_s": time.monotonic() - began})
"""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _load(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as source:
            source.seek(0, os.SEEK_END)
            source.seek(max(0, source.tell() - TAIL_BYTES))
            return source.read().decode("utf-8", "replace")
    except OSError:
        return ""


def signature(argv: list[str], environment: dict[str, str], chdir: str, identity: dict[str, Any] | None = None) -> str:
    """Identity of a command: what must be equal for a second run to attach. Secrets are not part of it."""
    what = identity if identity is not None else [argv, environment, chdir]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class Job:
    """One step's folder on the host: ``job.json``, ``end.json``, ``stdout``, ``stderr`` and ``lock``."""

    def __init__(self, folder: Path, progress_file: Path) -> None:
        self.folder = folder
        self.progress_file = progress_file

    def running(self) -> bool:
        """Whether the runner holds its lock; the kernel frees it when the runner dies, however it dies."""
        try:
            lock = os.open(self.folder / "lock", os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def start(self, spec: dict[str, Any]) -> bool:
        """Start the command detached. False if another call was faster."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.progress_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # The folder may come from a run with another umask.
        self.folder.chmod(0o700)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ANSIBLE_", "_ANSIBLE", "SSH_"))}
        with subprocess.Popen(
            [sys.executable, "-I", "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
            umask=0o022,
        ) as runner:
            assert runner.stdin is not None
            assert runner.stdout is not None
            runner.stdin.write(json.dumps(spec).encode())
            runner.stdin.close()
            answer = runner.stdout.readline().decode().strip()
            runner.stdout.close()
            # Popen's exit would wait for the runner; it belongs to init from here.
            runner.returncode = 0
        if answer not in ("started", "busy"):
            raise OSError("the runner did not start")
        return answer == "started"

    def view(self, wait_s: float) -> dict[str, Any]:
        """State of the job, after waiting up to ``wait_s`` seconds for its end."""
        limit = time.monotonic() + wait_s
        pause = 0.02
        while self.running() and time.monotonic() < limit:
            time.sleep(min(pause, max(0.0, limit - time.monotonic())))
            pause = min(pause * 1.5, 0.5)
        running = self.running()
        state = _load(self.folder / "job.json") or {}
        # A state file of before the last boot says nothing about now, on hosts whose job folder is on a disk.
        if not running and state.get("boot_id") != _boot_id():
            state = {}
        end = _load(self.folder / "end.json") or {}
        ended = bool(state) and end.get("id") == state.get("id")
        elapsed = float(end["elapsed_s"]) if ended else time.time() - float(state.get("started_unix", time.time()))
        return {
            "job_id": state.get("id", ""),
            "pid": state.get("pid"),
            "signature": state.get("signature", ""),
            "command": state.get("argv", []),
            "running": running,
            "ended": ended and not running,
            # Not `rc`: of a module Ansible takes one that is not zero for the module's own failure, rc_ok or not.
            "exit_status": end.get("rc") if ended and not running else None,
            "elapsed_s": round(max(0.0, elapsed), 3),
            "progress": _load(self.progress_file),
            "others": self.others(),
            "stdout": "" if running else _tail(self.folder / "stdout"),
            "stderr": "" if running else _tail(self.folder / "stderr"),
        }

    def others(self) -> list[dict[str, Any]]:
        """Steps that run on this host beside this one, such as one that was only started: step, progress, elapsed_s."""
        rows = []
        for folder in sorted(self.folder.parent.iterdir()) if self.folder.parent.is_dir() else []:
            if folder == self.folder or not Job(folder, folder).running():
                continue
            state = _load(folder / "job.json") or {}
            elapsed = time.time() - float(state.get("started_unix", time.time()))
            progress = _load(Path(str(state.get("progress_file", ""))))
            rows.append({"step": folder.name, "progress": progress, "elapsed_s": round(max(0.0, elapsed), 3)})
        return rows

    def end(self) -> None:
        """End the command's whole session: SIGTERM, 15 seconds, SIGKILL."""
        state = _load(self.folder / "job.json") or {}
        pid = state.get("pid")
        if not isinstance(pid, int) or not self.running():
            return
        # The runner leads the session's only process group; it ignores nothing, so the group takes the signal whole.
        for number, wait in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
            limit = time.monotonic() + wait
            while time.monotonic() < limit and _group_lives(pid):
                time.sleep(0.1)


def _group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def main() -> None:
    """Run one call: ``run``/``start`` begin or attach, ``wait`` looks; each returns the job's state."""
    module = AnsibleModule(
        argument_spec={
            "step": {"type": "str", "required": True},
            "argv": {"type": "list", "elements": "str"},
            "environment": {"type": "dict", "default": {}},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
            "identity": {"type": "dict"},
            "progress_file": {"type": "path"},
            "chdir": {"type": "path", "default": "/"},
            "timeout": {"type": "int", "default": 0},
            "rc_ok": {"type": "list", "elements": "int", "default": [0]},
            "check_argv": {"type": "list", "elements": "str"},
            "mode": {"type": "str", "choices": ["run", "start", "wait", "end"], "default": "run"},
            "reconnect": {"type": "int", "default": 600},
            "job_dir": {"type": "path", "default": "/run/reap/jobs"},
            "wait_s": {"type": "float", "default": 2.0},
            "job_id": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    p = module.params
    step = p["step"]
    if not step.replace("_", "").replace("-", "").isalnum():
        module.fail_json(msg=f"step is {step!r}; wanted letters, digits, _ and - only")
    environment = {str(k): str(v) for k, v in p["environment"].items()}
    secrets = {str(k): str(v) for k, v in p["secrets"].items() if v not in (None, "")}

    if module.check_mode and p["mode"] != "wait":
        if not p["check_argv"]:
            said = f"would run {p['argv'][0]}"
            module.exit_json(changed=True, skipped=True, running=False, exit_status=None, msg=said)
        done = subprocess.run(
            p["check_argv"], capture_output=True, text=True, env={**os.environ, **environment, **secrets}, check=False
        )
        module.exit_json(
            changed=False,
            running=False,
            ended=True,
            attached=False,
            exit_status=done.returncode,
            stdout=done.stdout,
            stderr=done.stderr,
            progress=None,
            elapsed_s=0.0,
            job_id="",
        )

    progress_file = Path(p["progress_file"] or f"/run/reap/progress/{step}.json")
    job = Job(Path(p["job_dir"]) / step, progress_file)
    try:
        if p["mode"] == "end":
            job.end()
        elif p["mode"] in ("run", "start"):
            wanted = signature(p["argv"], environment, p["chdir"], p["identity"])
            started = False
            if not job.running():
                started = job.start(
                    {
                        "id": uuid.uuid4().hex,
                        "folder": str(job.folder),
                        "argv": p["argv"],
                        "signature": wanted,
                        "environment": {**environment, **secrets},
                        "chdir": p["chdir"],
                        "boot_id": _boot_id(),
                        "progress_file": str(progress_file),
                    }
                )
            view = job.view(p["wait_s"])
            if not started and view["signature"] != wanted:
                pid, command = view["pid"], " ".join(view["command"])[:300]
                module.fail_json(
                    msg=f"step {step} is already running with another command (pid {pid}: {command}); "
                    f"wait for its end or stop it with: kill -TERM -- -{pid}"
                )
            module.exit_json(changed=False, attached=not started, **view)
        view = job.view(p["wait_s"])
        module.exit_json(changed=False, attached=True, **view)
    except OSError as error:
        module.fail_json(msg=f"step {step} could not run: {error.strerror or error} ({error.filename or job.folder})")


if __name__ == "__main__":
    main()
