"""``reap watch``: guard this host's memory, check the settings, replay a memory series, lift a latch."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from ..errors import ReapError
from ..watch import series
from ..watch.config import Settings, load
from ..watch.lift import lift
from ..watch.loop import Guardian

HELP = "guard the host's memory and stop the model before the host freezes"


# As a unit that systemd starts again at once, it would otherwise fill the journal with the same line for ever.
_PAUSE_AFTER_REFUSAL_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--config", type=Path, default=Path("/etc/reap/watchdog.toml"), help="settings (TOML)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="check the settings and end")
    what.add_argument("--lift", action="store_true", help="allow a start again after a kill or a spent budget")
    what.add_argument("--replay", type=Path, metavar="FILE", help="print the decisions on a memory series")


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 when the settings do not fit profile or host, or a replayed series did not go as expected."""
    if args.replay is not None:
        return _replay(args.replay)
    if args.check or args.lift:
        settings = load(args.config)
        return _check(settings, args.config) if args.check else _lift(settings.paths.state)
    try:
        return Guardian(load(args.config), dict(os.environ)).run()
    except ReapError as error:
        _tell_systemd(error)
        raise


def _tell_systemd(error: ReapError) -> None:
    from ..serve.notify import Notifier

    notifier = Notifier()
    if notifier.listens:
        notifier.status(f"guards nothing: {error}")
        time.sleep(_PAUSE_AFTER_REFUSAL_S)


def _check(settings: Settings, path: Path) -> int:
    # Only here: the guarding process does not need it and would carry it in locked memory.
    from ..watch.fitcheck import floor_problems

    problems = floor_problems(settings)
    for problem in problems:
        print(problem if settings.enforce_fit else f"not enforced: {problem}")
    if problems and settings.enforce_fit:
        return 1
    print(f"{path}: good")
    return 0


def _replay(path: Path) -> int:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReapError(f"cannot read the series {path}: {error}") from error
    parsed = series.parse(text, path.name)
    events = series.replay(parsed)
    for event in events:
        effect = "" if event.effect_kb is None else f" (MemAvailable when it takes effect: {event.effect_kb} kB)"
        print(f"{event.at:10.3f} s  {event.action.value:9s} {event.reason}{effect}")
    failures = series.check(parsed, events)
    for failure in failures:
        print(f"not as expected: {failure}")
    return 1 if failures else 0


def _lift(path: Path) -> int:
    lift(path)
    print("lifted: a start is allowed")
    return 0
