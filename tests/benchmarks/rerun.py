"""What a run costs when there is nothing to do: a converged provision as a multiple of `ansible -m ping`.

    .venv/bin/python tests/benchmarks/rerun.py [-i inventories/sim] [-l spark-sim] [--runs 5]

Prints seconds (median, least, most) and the ratio of the medians; then the tasks that took the longest. The host must
be converged: a run that changes something is an error (exit 1).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
AIM = 15


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Wall seconds and output of a command that must succeed."""
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
        )
    return seconds, done.stdout


def converged(output: str) -> bool:
    """Whether the recap of a run has hosts, and says of every one that nothing of it was changed."""
    recap = output.rpartition("PLAY RECAP")[2]
    changes = re.findall(r"^\S+ +: ok=\d+ +changed=(\d+) ", recap, re.MULTILINE)
    return bool(changes) and set(changes) == {"0"}


def row(name: str, seconds: list[float]) -> str:
    return f"{name:<28} {statistics.median(seconds):7.2f} {min(seconds):7.2f} {max(seconds):7.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-i", "--inventory", default="inventories/sim")
    parser.add_argument("-l", "--limit", default="spark-sim")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "LC_ALL": "C.UTF-8",
        # The stock callback that prints each task's seconds at the end.
        "ANSIBLE_CALLBACKS_ENABLED": "reap_summary,ansible.posix.profile_tasks",
        "PROFILE_TASKS_TASK_OUTPUT_LIMIT": "all",
    }
    target = ["-i", args.inventory]
    ping = [str(BIN / "ansible"), *target, args.limit, "-m", "ansible.builtin.ping"]
    provision = [str(BIN / "ansible-playbook"), *target, "-l", args.limit, "playbooks/provision.yml"]

    pings: list[float] = []
    provisions: list[float] = []
    tasks: dict[str, list[float]] = defaultdict(list)
    timed(ping, environment)  # opens the connection that the others share
    for _ in range(args.runs):
        pings.append(timed(ping, environment)[0])
        seconds, output = timed(provision, environment)
        if not converged(output):
            print(output[-3000:])
            print("the host was not converged: run site.yml until changed=0, then measure", file=sys.stderr)
            return 1
        provisions.append(seconds)
        for match in re.finditer(r"^(.+?) -{3,} +([\d.]+)s$", output, re.MULTILINE):
            tasks[match[1]].append(float(match[2]))

    print(f"{'seconds, ' + str(args.runs) + ' runs each':<28} {'median':>7} {'least':>7} {'most':>7}")
    print(row("ansible -m ping", pings))
    print(row("converged provision", provisions))
    ratio = statistics.median(provisions) / statistics.median(pings)
    print(f"\nprovision / ping = {ratio:.1f} (aim: {AIM} or less)\n\nmedian seconds of the longest tasks")
    longest = sorted(tasks.items(), key=lambda item: -statistics.median(item[1]))[:12]
    for name, seconds in longest:
        print(f"  {statistics.median(seconds):6.2f}  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
