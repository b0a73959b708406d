"""`make test-aarch64`: the recipe on emulated aarch64 machines that look like a Spark (docs/aarch64.md).

Each stage prints its wall time; a failed one ends the run. What was found goes to artifacts/aarch64/.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sim.aarch64 import bed, machine
from sim.common import GIB, SimError, say, wait_for, write_json

FIRST, SECOND = "spark-aarch64", "spark-aarch64-b"
# MemTotal of two Sparks, GiB (docs/hosts.md), and what the emulator gives for the larger one, MiB.
MEM_TOTAL = {FIRST: 119.7, SECOND: 121.7}
SECOND_MIB = 127048
ARTIFACTS = ROOT / "artifacts" / "aarch64"
LIMIT_S = 40 * 60


class Failed(Exception):
    """A stage did not show what it must."""


def want(true: bool, text: str) -> None:
    """Raises Failed with `text` unless `true`."""
    if not true:
        raise Failed(text)


class Run:
    """The stages with their wall times and what each found."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self.key = ""

    def stage(self, key: str, name: str, work: Callable[[], dict[str, Any] | None]) -> None:
        say(f"=== {name}")
        began = time.monotonic()
        self.key = key
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry: dict[str, Any] = {"stage": name, "started": started, "passed": False}
        self.stages.append(entry)
        try:
            entry["found"] = work() or {}
            entry["passed"] = True
        except (Failed, SimError) as error:
            entry["error"] = str(error)
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - began, 1)
            entry["load"] = round(os.getloadavg()[0], 1)
            say(f"=== {name}: {'passed' if entry['passed'] else 'FAILED'} after {entry['seconds']:.0f} s")
            write_json(ARTIFACTS / f"{key}.json", {**entry, "versions": versions()})

    def play(self, playbook: str, hosts: str, *options: str) -> dict[str, dict[str, int]]:
        """Runs a playbook against the machines; returns the recap by host."""
        log = ARTIFACTS / f"{self.key}-{Path(playbook).stem}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        environment |= {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "REAP_PROGRESS": "log"}
        environment["ANSIBLE_TIMEOUT"] = "60"
        command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "inventories/aarch64", playbook]
        with log.open("w") as stream:
            done = subprocess.run(
                [*command, "-l", hosts, *options], cwd=ROOT, env=environment, stdout=stream, stderr=stream, check=False
            )
        text = log.read_text(errors="replace")
        found = {
            match[1]: {"changed": int(match[2]), "unreachable": int(match[3]), "failed": int(match[4])}
            for match in re.finditer(
                r"^(\S+)\s+: ok=\d+\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", text, re.MULTILINE
            )
        }
        if done.returncode != 0:
            tail = "\n".join(text.splitlines()[-40:])
            raise Failed(f"{playbook} ended with {done.returncode}; {log}:\n{tail}")
        return found

    def table(self) -> str:
        """Stages, wall times and the load average at their ends."""
        lines = [
            f"  {stage['stage']:<44} {'passed' if stage['passed'] else 'FAILED':<7} {stage['seconds']:7.0f} s"
            f"   load {stage['load']:.1f}"
            for stage in self.stages
        ]
        total = sum(stage["seconds"] for stage in self.stages)
        return "\n".join([*lines, f"  total {total:.0f} s; the limit is {LIMIT_S} s"])


def versions() -> dict[str, str]:
    """What emulated and what was emulated."""
    emulator = subprocess.run(["qemu-system-aarch64", "--version"], capture_output=True, text=True, check=False).stdout
    ansible = subprocess.run(
        [str(Path(sys.executable).parent / "ansible"), "--version"], capture_output=True, text=True, check=False
    ).stdout
    facts = json.loads(bed.FACTS.read_text()) if bed.FACTS.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return {
        "emulator": emulator.splitlines()[0] if emulator else "",
        "ansible": ansible.splitlines()[0] if ansible else "",
        "python": platform.python_version(),
        "machine_os": facts.get("disk", {}).get("os", ""),
        "machine_kernel": facts.get("boot", {}).get("kernel", ""),
        "commit": commit.strip(),
        "cores": str(os.cpu_count()),
    }


def memory(name: str) -> dict[str, int]:
    """/proc/meminfo of the machine, kB."""
    text = machine.ssh(name, "cat /proc/meminfo")
    return {match[1]: int(match[2]) for match in re.finditer(r"^(\w+):\s+(\d+)", text, re.MULTILINE)}


def remote_json(name: str, path: str) -> dict[str, Any]:
    """A JSON file of the machine; empty where it is not there."""
    text = machine.ssh(name, f"sudo cat {path}", check=False)
    found: dict[str, Any] = json.loads(text) if text.strip() else {}
    return found


def identity(name: str) -> dict[str, Any]:
    """It is what it should look like, without any help of the inventory."""
    product = machine.ssh(name, "cat /sys/class/dmi/id/product_name").strip()
    architecture = machine.ssh(name, "uname -m").strip()
    total = memory(name)["MemTotal"]
    want(product == "NVIDIA_DGX_Spark", f"product is {product}")
    want(architecture == "aarch64", f"architecture is {architecture}")
    gib = total * 1024 / GIB
    want(abs(gib - MEM_TOTAL[name]) < 0.05, f"MemTotal of {name} is {gib:.2f} GiB, wanted {MEM_TOTAL[name]}")
    return {"product": product, "architecture": architecture, "mem_total_kb": total}


def unchanged(recap: dict[str, dict[str, int]]) -> dict[str, Any]:
    """No host was changed and none failed."""
    want(bool(recap) and all(not any(one.values()) for one in recap.values()), f"wanted changed=0, found {recap}")
    return {"recap": recap}


def serving(name: str, seconds: float = 600) -> None:
    """Waits until the service says that its model has answered."""
    wait_for(
        lambda: remote_json(name, "/run/reap/service.json").get("phase") == "serving",
        seconds,
        f"reap.service on {name}",
        every=3.0,
    )


def watchdog(name: str) -> dict[str, Any]:
    """The model's memory grows over the production floor: a kill, and the service comes back by itself."""
    before, state = memory(name), remote_json(name, "/run/reap/watchdog.json")
    want(state.get("floor_kb") == 8388608, f"the floor is {state.get('floor_kb')} kB, wanted the profile's 8388608")
    grow = (before["MemAvailable"] - 7 * 1024 * 1024) * 1024
    body = json.dumps({"bytes": grow})
    machine.ssh(
        name,
        f"curl -s -m 60 -d '{body}' http://127.0.0.1:8000/double/grow",
        check=False,
    )
    wait_for(
        lambda: remote_json(name, "/run/reap/watchdog.json").get("kills", 0) > state.get("kills", 0),
        120,
        "the watchdog's kill",
        every=2.0,
    )
    serving(name)
    after = memory(name)
    text = machine.ssh(name, "sudo cat /var/lib/reap/watchdog/events.jsonl")
    events = [json.loads(line) for line in text.splitlines()]
    kinds = [event.get("event") for event in events]
    want("kill" in kinds and "killed" in kinds, f"events are {kinds}")
    return {
        "mem_available_before_kb": before["MemAvailable"],
        "grown_by_bytes": grow,
        "events": events[-14:],
        "mem_available_serving_again_kb": after["MemAvailable"],
    }


def first_snapshot() -> dict[str, Any]:
    """The first machine as its first boot leaves it; it is kept for later runs."""
    if (machine.SNAPSHOTS / "fresh" / "snapshot.json").exists():
        return {"kept": True}
    seconds = machine.up(FIRST)["up_s"]
    machine.snapshot(FIRST, "fresh")
    return {"up_s": seconds}


# key: what it shows, and the work
STAGES: dict[str, tuple[str, Callable[[Run], dict[str, Any] | None]]] = {
    "build": ("build (cached after the first time)", lambda run: bed.build()),
    "boot": ("cold boot and snapshot (kept)", lambda run: first_snapshot()),
    "restore": ("from the snapshot to SSH", lambda run: {"up_s": machine.up(FIRST, snapshot="fresh")["up_s"]}),
    "identity": ("it looks like a Spark", lambda run: identity(FIRST)),
    "preflight": ("preflight", lambda run: unchanged(run.play("playbooks/preflight.yml", FIRST))),
    "memory": ("memory_fit, 119.7 GiB", lambda run: unchanged(run.play("tests/aarch64/memory.yml", FIRST))),
    "site": ("site.yml", lambda run: {"recap": run.play("site.yml", FIRST)}),
    "again": ("site.yml again, changed=0", lambda run: unchanged(run.play("site.yml", FIRST))),
    "check-again": ("site.yml --check, converged", lambda run: unchanged(run.play("site.yml", FIRST, "--check"))),
    "watchdog": ("watchdog, floor 8 GiB", lambda run: watchdog(FIRST)),
    "second": ("second machine: cold boot", lambda run: {"up_s": machine.up(SECOND, SECOND_MIB)["up_s"]}),
    "second-identity": ("it looks like a Spark too", lambda run: identity(SECOND)),
    "second-memory": ("memory_fit, 121.7 GiB", lambda run: unchanged(run.play("tests/aarch64/memory.yml", SECOND))),
}


def main() -> int:
    """Returns 0 when every stage passed."""
    parser = argparse.ArgumentParser(prog="make test-aarch64", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], metavar="STAGE", help=f"of {', '.join(STAGES)}")
    options = parser.parse_args()
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    whole = not options.stages
    if whole:
        machine.down(machine.all_names())
    run = Run()
    try:
        for key in options.stages or STAGES:
            title, work = STAGES[key]
            run.stage(key, title, functools.partial(work, run))
    except (Failed, SimError) as error:
        say(f"FAILED: {error}")
        return 1
    finally:
        print(run.table())
        # Single stages go on from what is there, and leave it.
        if whole:
            machine.down(machine.all_names())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
