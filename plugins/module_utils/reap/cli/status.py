"""``reap status``: what this host serves, in one line or as JSON. Reads files only; changes nothing."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..serve import evidence
from ..serve.host import mem_available_kb
from ..serve.state import alive, read_json

HELP = "say in one line or in JSON what this host serves"


_WATCHDOG = (
    "phase", "guarding", "mem_available_kb", "floor_kb", "hard_floor_kb", "kills", "sheds", "stops_in_window", "budget",
    "latched", "hold_until_available_kb", "last_event",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="one JSON document instead of one line")
    parser.add_argument("--run-dir", type=Path, default=Path("/run/reap"), metavar="DIR")
    parser.add_argument("--evidence-dir", type=Path, default=Path("/var/lib/reap/evidence"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Print it; exit 0 when a model serves, 1 when not."""
    found = collect(args.run_dir, args.evidence_dir)
    line = one_line(found)
    print(json.dumps(found | {"line": line}, sort_keys=True) if args.json else line)
    return 0 if found["phase"] == "serving" else 1


def collect(run_dir: Path, evidence_dir: Path) -> dict[str, Any]:
    """What the service, the watchdog and the last verification left in their files.

    Returns:
        phase (serving, loading, stopping, absent), generation, profile, model, image, endpoint, since_unix (s), detail,
        progress, replaced; mem_available_kb (kB); watchdog {running, phase, guarding (true, false where a container is
        named but not held, null where there is none), mem_available_kb, floor_kb, hard_floor_kb, kills, sheds,
        stops_in_window, budget, latched, hold_until_available_kb, last_event} or null; evidence (path of the newest
        bundle of a kill) or null; wedge {path, reason, unix} of the last wedged engine's evidence or null;
        verification {verdict, report, finished_unix} or null.
    """
    state = read_json(run_dir / "service.json") or {}
    names = ("generation", "profile", "image", "endpoint", "since_unix", "detail", "progress", "replaced")
    found: dict[str, Any] = {"phase": state.get("phase", "absent"), "model": state.get("served_model_name")}
    found |= {name: state.get(name) for name in names}
    if not state:
        found["detail"] = "the service has not run since the last boot"
    elif found["phase"] != "absent" and not alive(state):
        found |= {"phase": "absent", "progress": None, "detail": f"the main process is gone; it was {state['phase']}"}
    try:
        found["mem_available_kb"] = mem_available_kb()
    except (OSError, ReapError):
        found["mem_available_kb"] = None
    watchdog = read_json(run_dir / "watchdog.json")
    if watchdog is not None:
        watchdog = {"running": alive(watchdog)} | {key: watchdog.get(key) for key in _WATCHDOG}
    found["watchdog"] = watchdog
    found["evidence"] = _newest_bundle(run_dir, evidence_dir)
    found["wedge"] = evidence.newest(evidence_dir / "service")
    found["verification"] = _last_verification(evidence_dir)
    return found


def one_line(found: dict[str, Any]) -> str:
    """The same for a person."""
    phase = found["phase"]
    since = f" for {_age(found['since_unix'])}" if found.get("since_unix") else ""
    parts = [f"{phase}{since}"]
    if phase in ("serving", "stopping", "loading"):
        parts.append(f"{found['model']} ({found['profile']}) on {found['endpoint']}")
    if phase != "serving" and found.get("detail"):
        parts.append(str(found["detail"]))
    if found.get("replaced"):
        parts.append(f"NOT {found['replaced']['generation']}, which failed: {found['replaced']['reason']}")
    if found.get("mem_available_kb") is not None:
        parts.append(f"{found['mem_available_kb'] / 1024**2:.1f} GiB available")
    parts += _watchdog_line(found["watchdog"])
    if found.get("wedge"):
        parts.append(f"last wedge {_age(found['wedge']['unix'])} ago: {found['wedge']['path']}")
    check = found.get("verification")
    parts.append("never verified" if check is None else f"last verification {check['verdict']}")
    return "; ".join(parts)


def _watchdog_line(watchdog: dict[str, Any] | None) -> Iterator[str]:
    if watchdog is None or not watchdog["running"]:
        yield "NO WATCHDOG RUNS: systemctl start reap-watchdog"
        return
    spent = f"{watchdog['stops_in_window']} of {watchdog['budget']} stops in the budget's window"
    yield f"watchdog on guard, {watchdog['kills']} kills, {spent}"
    if watchdog["guarding"] is False:
        yield "THE MODEL'S CONTAINER IS NOT GUARDED: journalctl -u reap-watchdog says why"
    if watchdog["latched"]:
        yield "LATCHED, no start until: reap watch --lift"
    elif watchdog["hold_until_available_kb"] is not None:
        yield f"no start until {watchdog['hold_until_available_kb'] / 1024**2:.1f} GiB are available"
    event = watchdog["last_event"]
    if event is not None:
        yield f"its last decision, {_age(event['unix'])} ago: {event['reason']}"


def _newest_bundle(run_dir: Path, evidence_dir: Path) -> str | None:
    """On a full disk the watchdog keeps its evidence in memory; the folder's name begins with the time."""
    bundles = [*(evidence_dir / "watchdog").glob("*/bundle.json"), *(run_dir / "evidence").glob("*/bundle.json")]
    return str(max(bundles, key=lambda path: path.parent.name)) if bundles else None


def _last_verification(folder: Path) -> dict[str, Any] | None:
    reports = sorted(folder.glob("*/report.json"))
    if not reports:
        return None
    report = read_json(reports[-1]) or {}
    finished = reports[-1].stat().st_mtime
    return {"verdict": report.get("verdict", "unreadable"), "report": str(reports[-1]), "finished_unix": finished}


def _age(since_unix: float) -> str:
    seconds = max(0, int(time.time() - since_unix))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
