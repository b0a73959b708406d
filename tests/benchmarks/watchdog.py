"""The watchdog beside the loop it replaces, in one run on one host with a real container engine.

    .venv/bin/python tests/benchmarks/watchdog.py --on 'ssh -F .cache/sim/ssh_config HOST sudo' [--out FILE]

Measured (watchdog_host.py, which runs on that host): the installed `reap watch` and the original's loop, every second
`docker ps`, `docker inspect`, `awk`, then `docker rm -f`. In random order each has to stop a process while a meminfo
file, a double, falls at 1, 4 and 14 GiB/s from 10 GiB through a floor of 8; the loop's is in a container of the engine.
Replayed: the lowest MemAvailable at which a kill of 150 ms takes effect, for each phase and floor of a Spark. Figures,
ratios and aims are printed and, as JSON, written to FILE; nothing is judged by time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "plugins/module_utils")]

from reap.watch.config import from_dict
from reap.watch.policy import KB_PER_GIB, Action, Limits, Phase
from reap.watch.series import Change, Piece, Series, replay

AIMS = {"sent_p99_ms": 50, "gone_p99_ms": 150, "percent": 0.3, "rss_mb": 25}
SPEEDS = (1, 4, 14)
FALLS = 40


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def lowest_kb(limits: Limits, phase: Phase, speed: float) -> int:
    """Lowest MemAvailable when a kill has taken effect, kB: from 3 heights, 40 falls each at different moments."""
    floors = {Phase.SERVING: limits.floor_kb, Phase.LOADING: limits.loading_floor_kb}
    line_kb = max(floors.get(phase, 0), limits.kill_line_kb)
    found = []
    for above_gib in (0.1, 0.4, 6.0):
        start_kb = line_kb + int(above_gib * KB_PER_GIB)
        for number in range(FALLS):
            calm = 2.0 + number * 0.00713
            series = Series(limits, changes=[Change(0.0, phase=phase)])
            series.pieces.append(Piece(0.0, calm, start_kb, start_kb))
            series.pieces.append(Piece(calm, start_kb / (speed * KB_PER_GIB), start_kb, 0))
            kill = next(event for event in replay(series) if event.action is Action.KILL)
            found.append(kill.effect_kb or 0)
    return min(found)


def replayed() -> dict[str, dict[str, float]]:
    """{floor and phase: {speed: GiB}}."""
    table: dict[str, dict[str, float]] = {}
    for floor_gib in (8, 6):
        limits = from_dict({"floor_kb": floor_gib * KB_PER_GIB}, "benchmark").limits
        for phase in (Phase.LOADING, Phase.SERVING, Phase.STOPPING):
            name = f"floor {floor_gib} GiB, {phase.value}"
            table[name] = {f"{speed} GiB/s": lowest_kb(limits, phase, speed) / KB_PER_GIB for speed in SPEEDS}
    return table


def figures(measured: dict[str, Any]) -> list[tuple[str, float | None, float | None, str]]:
    """(what, reap watch, naive loop, aim) of what was measured on the host."""
    reap, naive, kills = measured["reap"], measured["naive"], measured["kills"]

    def ms(who: str, key: str, speed: int, part: float) -> float:
        return 1000 * percentile([kill[key] for kill in kills[who][str(speed)]], part)

    rows: list[tuple[str, float | None, float | None, str]] = []
    for part in (0.5, 0.99):
        aim = f"{AIMS['sent_p99_ms']}" if part > 0.5 else ""
        rows.append((f"4 GiB/s: crossing to kill sent, p{part * 100:.0f} ms", ms("reap", "sent_s", 4, part), None, aim))
    for speed in (4, 1, 14):
        for part in (0.5, 0.99):
            aim = f"{AIMS['gone_p99_ms']}" if part > 0.5 and speed == 4 else ""
            mine, other = (ms(who, "gone_s", speed, part) for who in ("reap", "naive"))
            rows.append((f"{speed} GiB/s: crossing to process gone, p{part * 100:.0f} ms", mine, other, aim))
    for speed in SPEEDS:
        mine, other = (speed * ms(who, "gone_s", speed, 0.99) / 1000 for who in ("reap", "naive"))
        rows.append((f"{speed} GiB/s: below the floor, p99 GiB", mine, other, ""))
    rows += [
        ("CPU far from the floor, % of a core", reap["far_percent"], naive["far_percent"], f"{AIMS['percent']}"),
        (
            "CPU at 8.3 to 8.5 GiB, floor 8, % of a core",
            reap["near_percent"],
            naive["far_percent"],
            f"{AIMS['percent']}",
        ),
        ("CPU of the writing process, near, %", reap["near_writer_percent"], None, ""),
        ("guarding process, RSS MB", reap["guarding"]["rss_mb"], naive["guarding"]["rss_mb"], f"{AIMS['rss_mb']}"),
        ("guarding process, PSS MB", reap["guarding"]["pss_mb"], naive["guarding"]["pss_mb"], ""),
        ("writing process and keeper, RSS MB", reap["writing"]["rss_mb"] + reap["keeping"]["rss_mb"], None, ""),
        ("writing process and keeper, PSS MB", reap["writing"]["pss_mb"] + reap["keeping"]["pss_mb"], None, ""),
    ]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--on", required=True, metavar="COMMAND", help="runs a command as root on a host of the recipe")
    parser.add_argument("--rounds", type=int, default=100, help="kills of reap watch at 4 GiB/s")
    parser.add_argument("--naive-rounds", type=int, default=100, help="kills of the naive loop at 4 GiB/s")
    parser.add_argument("--other-rounds", type=int, default=20, help="kills of each guard at 1 and at 14 GiB/s")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of each measurement of CPU time")
    parser.add_argument("--program", default="/opt/reap/bin/reap", help="path of the reap program on that host")
    parser.add_argument("--stand-in", action="store_true", help="no engine there: a script in place of docker")
    parser.add_argument("--out", type=Path, help="keep all figures as JSON")
    args = parser.parse_args()

    rounds = [f"--rounds={args.rounds}", f"--naive-rounds={args.naive_rounds}", f"--other-rounds={args.other_rounds}"]
    options = [*rounds, f"--idle={args.idle}", f"--program={args.program}", *(["--stand-in"] if args.stand_in else [])]
    with (Path(__file__).parent / "watchdog_host.py").open("rb") as script:
        command = [*shlex.split(args.on), "python3", "-", *options]
        done = subprocess.run(command, stdin=script, stdout=subprocess.PIPE, check=True)
    measured = json.loads(done.stdout)
    table = replayed()

    print(f"{'':48}{'reap watch':>12}{'naive loop':>12}{'ratio':>8}{'aim':>8}")
    for label, mine, other, aim in figures(measured):
        ratio = f"{other / mine:7.1f}x" if mine and other else ""
        cells = [f"{value:12.2f}" if value is not None else f"{'':12}" for value in (mine, other)]
        print(f"{label:48}{cells[0]}{cells[1]}{ratio:>8}{aim:>8}")
    print("\nreplayed: lowest MemAvailable when a kill of 150 ms takes effect, GiB (hard floor 3)")
    for name, by_speed in table.items():
        print(f"{name:48}" + "".join(f"{speed}: {gib:.2f}   " for speed, gib in by_speed.items()))
    print(f"\n{json.dumps(measured['machine'])}, load average {measured['load_average_begin']} to", end=" ")
    print(measured["load_average_end"])
    if args.out is not None:
        document = {
            "schema": "reap-watchdog-benchmark/1",
            "unix": round(time.time()),
            "command": "tests/benchmarks/watchdog.py " + " ".join(options),
            "figures": [dict(zip(("what", "reap", "naive", "aim"), row, strict=True)) for row in figures(measured)],
            "replayed_lowest_gib": table,
            "measured": measured,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
