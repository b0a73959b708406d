"""`make demo`: site.yml against a simulated Spark, ending with an endpoint to ask and a page to open.

Run by the Python that has Ansible (``.venv``): ansible-runner's events give the stage times and the outcome by host.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ansible_runner

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "sim"
SSH_CONFIG = CACHE / "ssh_config"
HOLD = CACHE / "hold"
API_PORT = 8000


class Stages:
    """Adds up wall time by stage: what the test bed took, then each role of the play. Keeps why the run failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failure = ""
        self._stage = ""
        self._since = time.monotonic()

    def enter(self, stage: str) -> None:
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def event(self, event: dict[str, Any]) -> bool:
        """Handle one event of ansible-runner; True keeps it in the run's artifacts."""
        data = event.get("event_data") or {}
        if event.get("event") == "playbook_on_task_start":
            self.enter(data.get("role") or data.get("play") or "play")
        elif event.get("event") == "runner_on_failed" and not data.get("ignore_errors"):
            self.failure = str((data.get("res") or {}).get("msg") or "")
        return True

    def table(self) -> str:
        rows = [(stage, seconds) for stage, seconds in self.seconds.items() if seconds >= 0.05]
        width = max(len(stage) for stage, _ in rows)
        lines = [f"  {stage:<{width}} {seconds:8.1f} s" for stage, seconds in rows]
        lines.append(f"  {'total':<{width}} {sum(seconds for _, seconds in rows):8.1f} s")
        return "\n".join(lines)


def sim(*arguments: str) -> None:
    """Run one command of the test bed, its progress on our terminal."""
    done = subprocess.run([sys.executable, "-m", "sim", *arguments], cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """What `sim build` has started, `sim up` finds running; a hold that somebody else has stays theirs."""
    if HOLD.exists():
        yield
        return
    sim("hold")
    try:
        yield
    finally:
        sim("release")


def control_socket(host: str) -> Path:
    # In the temporary folder: a Unix socket's path may have 107 bytes, a clone's may have more.
    return Path(tempfile.gettempdir()) / f"reap-{os.getuid()}-{abs(hash_path(ROOT)):08x}-{host}.sock"


def hash_path(path: Path) -> int:
    """A short number that tells one clone from another, the same in every process."""
    value = 0
    for byte in str(path).encode():
        value = (value * 131 + byte) & 0xFFFFFFFF
    return value


def close_forward(host: str) -> None:
    """End the port forwarding of an earlier demo, if there is one."""
    path = control_socket(host)
    if path.exists():
        command = ["ssh", "-F", str(SSH_CONFIG), "-S", str(path), "-O", "exit", host]
        subprocess.run(command, check=False, capture_output=True)
        path.unlink(missing_ok=True)


def open_forward(host: str) -> int:
    """Forward a free port of this machine's loopback to the endpoint, which listens on the host's loopback only."""
    close_forward(host)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    forward = f"127.0.0.1:{port}:127.0.0.1:{API_PORT}"
    command = ["ssh", "-F", str(SSH_CONFIG), "-f", "-N", "-M", "-S", str(control_socket(host))]
    options = ["-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=10", "-L", forward, host]
    subprocess.run([*command, *options], check=True, stdin=subprocess.DEVNULL)
    return port


def newest_report(folder: Path, since: float = 0.0) -> Path | None:
    """The page of a host's latest verification; one from before ``since`` (s of the epoch) is another run's."""
    times = {path: path.stat().st_mtime for path in folder.glob("*/report.html")}
    path = max(times, key=lambda path: times[path], default=None)
    return path if path is not None and times[path] >= since else None


def site(host: str, model: str, stages: Stages) -> ansible_runner.Runner:
    """Run site.yml against the simulated Spark."""
    private = Path(tempfile.mkdtemp(prefix="reap-demo-"))
    inventory = ["-i", str(ROOT / "inventories" / "sim")]
    extra = {"reap_sim_model": model}
    try:
        return ansible_runner.run(
            private_data_dir=str(private),
            project_dir=str(ROOT),
            playbook=str(ROOT / "site.yml"),
            cmdline=" ".join([*inventory, "-l", host, "-e", f"'{json.dumps(extra)}'"]),
            envvars={
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "REAP_PROGRESS": "log",
            },
            event_handler=stages.event,
            settings={"suppress_env_files": True},
        )
    finally:
        stages.enter("")
        shutil.rmtree(private, ignore_errors=True)


def main() -> int:
    """Returns 0 when the demo ended as it should."""
    parser = argparse.ArgumentParser(prog="make demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="spark-sim", help="name of the simulated Spark, as in inventories/sim")
    parser.add_argument("--model", default="sim/needle", help="checkpoint of the local hub to serve")
    parser.add_argument("--expect-failure", action="store_true", help="the verification must fail, or the demo does")
    args = parser.parse_args()

    stages = Stages()
    with held():
        stages.enter("build test bed")
        sim("build")
        stages.enter("start simulated Spark")
        sim("up", args.host)
    stages.enter("preflight")
    begun = time.time()
    runner = site(args.host, args.model, stages)
    # A run that verified nothing, because this start of the service has passed already, has the report of that; one
    # that failed before it verified has none.
    report = newest_report(ROOT / "artifacts" / args.host, since=0.0 if runner.rc == 0 else begun)

    print("\nStages")
    print(stages.table())
    if args.expect_failure:
        if runner.rc == 0:
            print("\nFAILED: the verification passed with a model that cannot retrieve", file=sys.stderr)
            return 1
        if not stages.failure.startswith("verification failed: ") or "needle_value" not in stages.failure:
            print("\nFAILED: something else than the needle failed, see above", file=sys.stderr)
            return 1
        print("\nAs it should, the verification failed: the model cannot retrieve.")
        print(f"\nReport\n  {report}")
        print("Remove:  make demo-down")
        return 0
    if runner.rc != 0:
        print(f"\nFAILED: site.yml ended with {runner.rc}; report: {report or 'none was written'}", file=sys.stderr)
        return 1
    port = open_forward(args.host)
    body = {"model": "Needle-Sim", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    print("\nEndpoint (forwarded over SSH to the simulated Spark's loopback)")
    print(f"  http://127.0.0.1:{port}/v1")
    print(f"\n  curl -s http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' \\")
    print(f"    -d '{json.dumps(body)}'")
    print(f"\nReport\n  {report}")
    print(f"\nInside:  ssh -F {SSH_CONFIG.relative_to(ROOT)} {args.host}")
    print("Remove:  make demo-down")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
