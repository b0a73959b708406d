"""The part of the watchdog's benchmark that runs on the host with the container engine, as root; see watchdog.py.

Real parts: the installed `reap watch`, a process in a control group of the kernel; the naive loop with the real
docker and a container of it. The group is made by hand, because reap's kill never asks the engine, and to start a
container takes longer than everything that is measured. Double: meminfo is a file that this program makes fall, because
the machine's own memory cannot be moved so. With --stand-in, for a machine without an engine, docker is a script that
answers at once, so the loop's figures are a lower bound. Prints one JSON document; needs only the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIB_KB = 1024 * 1024
FLOOR_KB, HARD_KB, START_KB = 8 * GIB_KB, 3 * GIB_KB, 10 * GIB_KB
# K144 at 200K context serves with so much available.
SITS_KB = (int(8.3 * GIB_KB), int(8.5 * GIB_KB))
TICK_S = 0.001
CGROUPS = Path("/sys/fs/cgroup")
IMAGE = """
cd "$(mktemp -d)" && mkdir usr proc sys dev etc tmp
ln -s usr/bin bin && ln -s usr/lib lib && ln -s usr/lib64 lib64
tar -c . | docker import - reap-bench:latest
"""
STAND_IN = """#!/bin/sh
case $1 in
run) setsid sleep 3600 >/dev/null 2>&1 & echo $! >/tmp/reap-bench.pid ;;
inspect) cat /tmp/reap-bench.pid ;;
rm) [ ! -s /tmp/reap-bench.pid ] || kill -9 "$(cat /tmp/reap-bench.pid)"; : >/tmp/reap-bench.pid ;;
version) echo stand-in ;;
esac
exit 0
"""
NAIVE = r"""
while :; do
  docker ps --filter name=bench-naive --format '{{.Names}}' >/dev/null
  docker inspect -f '{{.State.Running}}' bench-naive >/dev/null
  available=$(awk '/^MemAvailable/ {print $2}' "$MEMINFO")
  if [ "$available" -lt "$FLOOR" ]; then docker rm -f bench-naive >/dev/null; exit; fi
  sleep 1
done
"""


class Scene:
    """A meminfo file, and a container of one process with the real engine."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.name = f"bench-{name}"
        self.meminfo = self.folder / "meminfo"
        (self.folder / "run").mkdir(parents=True)
        self.set_memory(30 * GIB_KB)
        self.pid = 0
        self.process: subprocess.Popen[bytes] | None = None

    def set_memory(self, kb: int) -> None:
        """One write of a fixed length: a reading sees the old or the new number."""
        fd = os.open(self.meminfo, os.O_WRONLY | os.O_CREAT)
        os.write(fd, f"MemTotal:       {130 * GIB_KB:15d} kB\nMemAvailable:   {kb:15d} kB\n".encode())
        os.close(fd)

    def start_container(self) -> None:
        """A new container of the engine."""
        self.set_memory(START_KB)
        subprocess.run(["docker", "rm", "-f", self.name], capture_output=True, check=False)
        command = ["docker", "run", "-d", "--name", self.name, "--network", "none", "-v", "/usr:/usr:ro"]
        output(*command, "reap-bench", "sleep", "3600")
        self.pid = int(output("docker", "inspect", "-f", "{{.State.Pid}}", self.name))

    def start_group(self) -> None:
        """A process in a control group of its own; the state names it as `reap serve` would."""
        self.set_memory(START_KB)
        version = "v2" if (CGROUPS / "cgroup.controllers").exists() else "v1"
        root = CGROUPS if os.access(CGROUPS / "pids/cgroup.procs", os.W_OK) or version == "v2" else self.folder
        group = (root if version == "v2" else root / "pids") / self.name
        group.mkdir(exist_ok=True, parents=True)
        self.end_group()
        self.process = subprocess.Popen(["sleep", "3600"])
        self.pid = self.process.pid
        (group / "cgroup.procs").write_text(str(self.pid))
        path = f"/{self.name}"
        cgroup = {"v2": path, "v1": {}} if version == "v2" else {"v2": None, "v1": {"pids": path}}
        state = {"phase": "serving", "container_name": self.name, "container_pid": self.pid, "cgroup": cgroup}
        (self.folder / "run/new").write_text(json.dumps(state))
        (self.folder / "run/new").replace(self.folder / "run/service.json")

    def end_group(self) -> None:
        """Nothing is left of the last process but its control group."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def fall_until_gone(self, gib_s: float) -> tuple[float, float]:
        """Moments (monotonic, s) at which the floor was crossed and at which the container's process was gone."""
        pidfd = os.pidfd_open(self.pid)
        begin, crossed = time.monotonic(), 0.0
        try:
            while not select.select([pidfd], [], [], TICK_S)[0]:
                now = time.monotonic()
                kb = int(START_KB - (now - begin) * gib_s * GIB_KB)
                # Held above the hard floor for the loop that comes late: its depth is its time by the speed.
                self.set_memory(max(HARD_KB + GIB_KB // 4, kb))
                if not crossed and kb < FLOOR_KB:
                    crossed = now
                if now - begin > 120:
                    raise SystemExit(f"{self.name} was not stopped within 120 s")
        finally:
            os.close(pidfd)
        if not crossed:
            raise SystemExit(f"{self.name} was stopped before the floor was crossed")
        return crossed, time.monotonic()

    def events(self, kind: str) -> list[dict[str, Any]]:
        try:
            lines = (self.folder / "events.jsonl").read_text().splitlines()
        except OSError:
            return []
        return [event for event in map(json.loads, lines) if event["event"] == kind]


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def await_true(condition: Any, what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited 60 s for {what}")
        time.sleep(0.01)


def scheduled_s(pid: int) -> float:
    """CPU time of a process itself at the scheduler's resolution, s."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def with_children_s(pid: int) -> float:
    """CPU time of a process and of its ended children, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> dict[str, float]:
    """Resident and proportional memory of a process, MB of 1024 * 1024 bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    sizes = {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines}
    return {"rss_mb": sizes["Rss"], "pss_mb": sizes["Pss"]}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def reap_watch(scene: Scene, program: str) -> Iterator[subprocess.Popen[bytes]]:
    folder = scene.folder
    (folder / "watchdog.toml").write_text(
        f"""floor_kb = {FLOOR_KB}
hard_floor_kb = {HARD_KB}
cooldown_s = 0.001
budget = 100000
[paths]
service_state = "{folder}/run/service.json"
state = "{folder}/run/watchdog.json"
metrics = "{folder}/run/watchdog.prom"
events = "{folder}/events.jsonl"
evidence = "{folder}/evidence"
evidence_fallback = "{folder}/run/evidence"
meminfo = "{scene.meminfo}"
"""
    )
    command = [program, "watch", "--config", str(folder / "watchdog.toml")]
    guard = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        await_true(lambda: scene.events("start"), "the start of reap watch")
        yield guard
    finally:
        guard.terminate()
        guard.wait()


@contextlib.contextmanager
def naive_loop(scene: Scene) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "MEMINFO": str(scene.meminfo), "FLOOR": str(FLOOR_KB)}
    guard = subprocess.Popen(["bash", "-c", NAIVE], env=environment)
    try:
        yield guard
    finally:
        guard.terminate()
        guard.wait()


def moved_for(scene: Scene, seconds: float, low_kb: int, high_kb: int) -> None:
    """Move memory between two values, a hundred times a second, as a serving model does."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        part = abs(left % 4.0 - 2.0) / 2.0
        scene.set_memory(int(low_kb + (high_kb - low_kb) * part))
        time.sleep(0.01)


def at_rest(scene: Scene, guard: subprocess.Popen[bytes], idle_s: float) -> dict[str, Any]:
    """CPU in percent of a core, far from the floor and where K144 sits; memory of all processes."""
    (keeper,) = children(guard.pid)
    (writer,) = children(keeper)
    found: dict[str, Any] = {}
    for label, low_kb, high_kb in (("far", 30 * GIB_KB, 30 * GIB_KB), ("near", *SITS_KB)):
        moved_for(scene, 2.0, low_kb, high_kb)
        before, before_writer = scheduled_s(guard.pid), scheduled_s(writer)
        begin = time.monotonic()
        moved_for(scene, idle_s, low_kb, high_kb)
        took_s = time.monotonic() - begin
        found[f"{label}_percent"] = 100 * (scheduled_s(guard.pid) - before) / took_s
        found[f"{label}_writer_percent"] = 100 * (scheduled_s(writer) - before_writer) / took_s
    return found | {
        "guarding": memory_mb(guard.pid),
        "writing": memory_mb(writer),
        "keeping": memory_mb(keeper),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--program", default="/opt/reap/bin/reap")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--naive-rounds", type=int, default=100)
    parser.add_argument("--other-rounds", type=int, default=20, help="kills of each at 1 and at 14 GiB/s")
    parser.add_argument("--idle", type=float, default=20.0)
    parser.add_argument("--stand-in", action="store_true", help="no engine: a script in place of docker")
    args = parser.parse_args()
    folder = Path("/srv/watchdog-bench")
    shutil.rmtree(folder, ignore_errors=True)
    if args.stand_in:
        (folder / "tools").mkdir(parents=True)
        (folder / "tools/docker").write_text(STAND_IN)
        (folder / "tools/docker").chmod(0o755)
        os.environ["PATH"] = f"{folder}/tools:{os.environ['PATH']}"
    else:
        subprocess.run(["sh", "-c", IMAGE], check=True, capture_output=True)
    reap, naive = Scene(folder, "reap"), Scene(folder, "naive")
    result: dict[str, Any] = {"load_average_begin": os.getloadavg(), "reap": {}, "naive": {}}
    result["machine"] = {
        "cores": os.cpu_count(),
        "kernel": os.uname().release,
        "architecture": os.uname().machine,
        "python": sys.version.split()[0],
        "docker": output("docker", "version", "-f", "{{.Server.Version}}"),
        "cgroup": "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1",
    }
    others = [(guard, speed) for guard in ("reap", "naive") for speed in (1, 14)] * args.other_rounds
    rounds = [("reap", 4)] * args.rounds + [("naive", 4)] * args.naive_rounds + others
    random.shuffle(rounds)
    kills: dict[str, dict[str, list[dict[str, float]]]] = {"reap": {}, "naive": {}}
    try:
        with reap_watch(reap, args.program) as guard:
            reap.start_group()
            await_true(lambda: state_of(reap).get("guarding"), "a guarded container")
            result["reap"] |= at_rest(reap, guard, args.idle)
            naive.start_container()
            with naive_loop(naive) as loop:
                time.sleep(2)
                before, begin = with_children_s(loop.pid), time.monotonic()
                time.sleep(args.idle)
                spent = with_children_s(loop.pid) - before
                result["naive"]["far_percent"] = 100 * spent / (time.monotonic() - begin)
                result["naive"]["guarding"] = memory_mb(loop.pid)
            for number, (who, speed) in enumerate(rounds, 1):
                kill = reap_round(reap, speed) if who == "reap" else naive_round(naive, speed)
                kills[who].setdefault(str(speed), []).append(kill)
                if number % 10 == 0:
                    print(
                        f"{number} of {len(rounds)} rounds, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True
                    )
    finally:
        reap.end_group()
        subprocess.run(["docker", "rm", "-f", naive.name], capture_output=True, check=False)
        subprocess.run(["docker", "image", "rm", "reap-bench"], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)
    result["kills"] = kills
    result["load_average_end"] = os.getloadavg()
    print(json.dumps(result))
    return 0


def state_of(scene: Scene) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads((scene.folder / "run/watchdog.json").read_text())
    except (OSError, ValueError):
        return {}
    return loaded


def reap_round(scene: Scene, speed: float) -> dict[str, float]:
    """One kill by `reap watch`: seconds from the crossing to the kill as sent, and to the process being gone."""
    before = len(scene.events("kill"))
    scene.start_group()
    await_true(lambda: state_of(scene).get("guarding"), "a guarded container")
    # Any moment between two readings, with a second of rest before: the fall over it decides.
    time.sleep(1.0 + random.random() / 4)
    crossed, gone = scene.fall_until_gone(speed)
    scene.end_group()
    await_true(lambda: len(scene.events("killed")) > before, "the word that the container is gone")
    kill = scene.events("kill")[before]
    return {
        "sent_s": kill["monotonic"] - crossed,
        "gone_s": gone - crossed,
        "decided_kb": kill["mem_available_kb"],
        "shed": float(bool(len(scene.events("shed")) or "no supervisor" in kill["reason"])),
    }


def naive_round(scene: Scene, speed: float) -> dict[str, float]:
    scene.start_container()
    with naive_loop(scene):
        # Any moment of its turn of a second and more.
        time.sleep(0.5 + 1.5 * random.random())
        crossed, gone = scene.fall_until_gone(speed)
    return {"gone_s": gone - crossed}


if __name__ == "__main__":
    raise SystemExit(main())
