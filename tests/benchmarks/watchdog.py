"""The watchdog beside the loop it replaces, in one run on one machine.

    .venv/bin/python tests/benchmarks/watchdog.py [--rounds 20] [--idle 20] [--engine-host 'ssh -F CONFIG HOST sudo']

Real parts: both guards run as processes of their own and read a meminfo file that this program makes fall; the
container is a process that each guard kills in its own way. `reap watch` kills a control group's processes. The naive
loop, every second `docker ps`, `docker inspect`, `awk`, then `docker rm -f`, runs with the real docker where
--engine-host names a host that has one, else with a stand-in that answers at once, so that its figures are a lower
bound. Replayed parts: how far below the floor memory goes at 1, 4 and 14 GiB/s, through the policy and with the kill
times measured here. The last line is JSON. Nothing is judged by time: figures and ratios only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "plugins/module_utils")]

from reap.watch.policy import KB_PER_GIB, Action, Limits
from reap.watch.series import Piece, Series, replay

FLOOR, HARD = 8 * KB_PER_GIB, 3 * KB_PER_GIB
TICK_S = 0.001
AIMS = {"decision_p99_ms": 50, "kill_p99_ms": 150, "idle_percent": 0.3, "rss_mb": 25}

NAIVE = r"""
while :; do
  docker ps --filter name=model --format '{{.Names}}' >/dev/null
  docker inspect -f '{{.State.Running}}' model >/dev/null
  available=$(awk '/^MemAvailable/ {print $2}' "$MEMINFO")
  if [ "$available" -lt "$FLOOR" ]; then docker rm -f model >/dev/null; exit; fi
  sleep 1
done
"""
STAND_IN_DOCKER = '#!/bin/sh\n[ "$1" = rm ] && kill -9 "$(cat "$CONTAINER_PID")"\nexit 0\n'


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


class Scene:
    """A meminfo file, a container of one process, a folder that looks like its control group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meminfo = folder / "meminfo"
        (folder / "run").mkdir()
        (folder / "pids/docker/c").mkdir(parents=True)
        self.procs = folder / "pids/docker/c/cgroup.procs"
        self.set_memory(30 * KB_PER_GIB)
        self.container = self.new_container()

    def set_memory(self, kb: int) -> None:
        fd = os.open(self.meminfo, os.O_WRONLY | os.O_CREAT)
        os.write(fd, f"MemTotal:       {130 * KB_PER_GIB:15d} kB\nMemAvailable:   {kb:15d} kB\n".encode())
        os.close(fd)

    def new_container(self) -> subprocess.Popen[bytes]:
        if hasattr(self, "container"):
            self.container.kill()
            self.container.wait()
        child = subprocess.Popen(["sleep", "3600"])
        self.procs.write_text(f"{child.pid}\n")
        (self.folder / "container.pid").write_text(str(child.pid))
        state = {
            "phase": "serving",
            "container_id": "c",
            "container_pid": child.pid,
            "cgroup": {"v2": None, "v1": {"pids": "/docker/c"}},
        }
        (self.folder / "run/new").write_text(json.dumps(state))
        (self.folder / "run/new").replace(self.folder / "run/service.json")
        self.container = child
        return child

    def fall_until_killed(self, kb_per_s: float, from_kb: int) -> float:
        """Seconds from the crossing of the floor to the end of the container's process."""
        begin = time.monotonic()
        crossed: float | None = None
        pidfd = os.pidfd_open(self.container.pid)
        try:
            while self.container.poll() is None:
                now = time.monotonic()
                kb = max(HARD + KB_PER_GIB // 4, int(from_kb - (now - begin) * kb_per_s))
                self.set_memory(kb)
                if crossed is None and kb < FLOOR:
                    crossed = now
                time.sleep(TICK_S)
        finally:
            os.close(pidfd)
        self.procs.write_text("")
        assert crossed is not None, "killed before the floor was crossed"
        return time.monotonic() - crossed

    def events(self, kind: str) -> list[dict[str, Any]]:
        try:
            lines = (self.folder / "events.jsonl").read_text().splitlines()
        except OSError:
            return []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def end(self, guard: subprocess.Popen[bytes]) -> None:
        """Leave no process behind, however the measurement ended."""
        guard.terminate()
        guard.wait()
        self.container.kill()
        self.container.wait()


def cpu_s(pid: int) -> float:
    """CPU time of a process and of its ended children, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def scheduled_s(pid: int) -> float:
    """CPU time of a process itself at the scheduler's resolution, s."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_reap(scene: Scene) -> subprocess.Popen[bytes]:
    run = scene.folder / "run"
    (scene.folder / "watchdog.toml").write_text(
        f"""floor_kb = {FLOOR}
loading_floor_kb = {FLOOR}
hard_floor_kb = {HARD}
cooldown_s = 0.001
budget = 100000
[paths]
service_state = "{run}/service.json"
state = "{run}/watchdog.json"
metrics = "{run}/watchdog.prom"
events = "{scene.folder}/events.jsonl"
evidence = "{scene.folder}/evidence"
evidence_fallback = "{run}/evidence"
meminfo = "{scene.meminfo}"
cgroup_root = "{scene.folder}"
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "plugins/module_utils")}
    guard = subprocess.Popen(
        [sys.executable, "-m", "reap", "watch", "--config", str(scene.folder / "watchdog.toml")],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    await_phase(scene, "serving")
    return guard


def await_phase(scene: Scene, phase: str) -> None:
    while True:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((scene.folder / "run/watchdog.json").read_text())["phase"] == phase:
                return
        time.sleep(0.01)


def start_naive(scene: Scene) -> subprocess.Popen[bytes]:
    tools = scene.folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "docker").write_text(STAND_IN_DOCKER)
    (tools / "docker").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "MEMINFO": str(scene.meminfo),
        "FLOOR": str(FLOOR),
        "CONTAINER_PID": str(scene.folder / "container.pid"),
    }
    return subprocess.Popen(["bash", "-c", NAIVE], env=environment)


def measure_reap(rounds: int, idle_s: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scene = Scene(Path(name))
        guard = start_reap(scene)
        stack.callback(scene.end, guard)
        figures = {}
        for label, kb in (("idle", 30), ("near", 9.6)):
            scene.set_memory(int(kb * KB_PER_GIB))
            time.sleep(2)
            before = scheduled_s(guard.pid)
            time.sleep(idle_s)
            figures[f"{label}_percent"] = 100 * (scheduled_s(guard.pid) - before) / idle_s
        figures["rss_mb"] = rss_mb(guard.pid)
        figures["rss_writer_mb"] = sum(map(rss_mb, children(guard.pid)))
        times, decisions = [], []
        for _ in range(rounds):
            scene.set_memory(30 * KB_PER_GIB)
            scene.new_container()
            time.sleep(1.5 + random.random())
            times.append(1000 * scene.fall_until_killed(4 * KB_PER_GIB, 10 * KB_PER_GIB))
            # The group's folder is used again for the next container, which a kill under way would take with it.
            while len(scene.events("killed")) < len(times):
                time.sleep(0.01)
        for event in scene.events("kill"):
            # What memory had lost below the floor when it was decided, at the speed it fell with.
            decisions.append(1000 * (FLOOR - event["mem_available_kb"]) / (4 * KB_PER_GIB))
        assert len(decisions) == rounds, (len(decisions), rounds)
        figures |= {"decision_p50_ms": percentile(decisions, 0.5), "decision_p99_ms": percentile(decisions, 0.99)}
        return figures | {"kill_p50_ms": percentile(times, 0.5), "kill_p99_ms": percentile(times, 0.99)}


def measure_naive(rounds: int, idle_s: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        scene = Scene(Path(name))
        guard = start_naive(scene)
        try:
            time.sleep(1)
            before = cpu_s(guard.pid)
            time.sleep(idle_s)
            figures = {"idle_percent": 100 * (cpu_s(guard.pid) - before) / idle_s, "rss_mb": rss_mb(guard.pid)}
        finally:
            scene.end(guard)
        times = []
        for _ in range(rounds):
            scene.set_memory(30 * KB_PER_GIB)
            scene.new_container()
            guard = start_naive(scene)
            try:
                time.sleep(1.5 + random.random())
                times.append(1000 * scene.fall_until_killed(4 * KB_PER_GIB, 10 * KB_PER_GIB))
            finally:
                scene.end(guard)
        return figures | {"kill_p50_ms": percentile(times, 0.5), "kill_p99_ms": percentile(times, 0.99)}


def measure_engine(prefix: str, rounds: int) -> float:
    """Seconds that the naive loop's engine commands take on a host with a real engine, median over ``rounds``."""
    script = (
        "docker ps --filter name=model >/dev/null; docker inspect model >/dev/null 2>&1;"
        " awk '/^MemAvailable/ {print $2}' /proc/meminfo >/dev/null"
    )
    loop = f"for i in $(seq {rounds}); do a=$(date +%s%N); {script}; b=$(date +%s%N); echo $((b-a)); done"
    done = subprocess.run([*shlex.split(prefix), f"bash -c {shlex.quote(loop)}"], capture_output=True, check=True)
    return statistics.median(int(word) / 1e9 for word in done.stdout.split())


def below_floor(speed_gib_s: float, kill_s: float) -> list[float]:
    """GiB below the floor when a kill of ``kill_s`` has taken effect, for 100 different moments at which a fall begins.

    Replayed through the policy at the pace it asks for.
    """
    limits = Limits(floor_kb=FLOOR, loading_floor_kb=FLOOR, hard_floor_kb=HARD, kill_s=kill_s)
    start, lost = FLOOR + 2 * KB_PER_GIB, []
    for number in range(100):
        calm = 2.0 + number / 100
        pieces = [
            Piece(0.0, calm, start, start),
            Piece(calm, start / (speed_gib_s * KB_PER_GIB), start, 0),
        ]
        kill = next(event for event in replay(Series(limits, pieces)) if event.action is Action.KILL)
        lost.append((FLOOR - (kill.effect_kb or 0)) / KB_PER_GIB)
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="kills of each guard")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of each idle measurement")
    parser.add_argument("--engine-host", metavar="COMMAND", help="runs a command on a host with docker")
    args = parser.parse_args()

    reap, naive = measure_reap(args.rounds, args.idle), measure_naive(args.rounds, args.idle)
    if args.engine_host:
        naive["engine_commands_s"] = measure_engine(args.engine_host, args.rounds)
    print(f"{'':34}{'reap watch':>12}{'naive loop':>12}{'ratio':>8}{'aim':>8}")
    rows = {
        "crossing to decision, p50 ms": ("decision_p50_ms", ""),
        "crossing to decision, p99 ms": ("decision_p99_ms", "50"),
        "crossing to process gone, p50 ms": ("kill_p50_ms", ""),
        "crossing to process gone, p99 ms": ("kill_p99_ms", "150"),
        "CPU when idle, % of a core": ("idle_percent", "0.3"),
        "CPU 1.6 GiB above the floor, %": ("near_percent", ""),
        "RSS of the guarding process, MB": ("rss_mb", "25"),
        "RSS of the writing process, MB": ("rss_writer_mb", ""),
    }
    for label, (key, aim) in rows.items():
        mine, other = reap.get(key), naive.get(key)
        ratio = f"{other / mine:7.1f}x" if mine and other else ""
        other_text = f"{other:12.2f}" if other is not None else f"{'':12}"
        print(f"{label:34}{mine:12.2f}{other_text}{ratio:>8}{aim:>8}")
    depth = {}
    for speed in (1, 4, 14):
        # The naive loop's depth needs no replay: all the time from crossing to kill memory goes on falling.
        kill_s = max(0.001, (reap["kill_p99_ms"] - reap["decision_p50_ms"]) / 1000)
        mine, other = percentile(below_floor(speed, kill_s), 0.99), speed * naive["kill_p99_ms"] / 1000
        depth[f"{speed} GiB/s"] = {"reap": mine, "naive": other}
        print(f"{f'below the floor at {speed} GiB/s, p99 GiB':34}{mine:12.2f}{other:12.2f}{other / mine:7.1f}x")
    if args.engine_host:
        print(f"engine commands of one naive turn on that host: {naive['engine_commands_s']:.2f} s")
    print(json.dumps({"reap": reap, "naive": naive, "below_floor_gib": depth, "aims": AIMS}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
