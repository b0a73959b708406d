"""What the service asks of the memory watchdog: that it guards, and that it guards by the right settings."""

from __future__ import annotations

import subprocess
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..watch.config import from_dict
from .config import ServiceConfig
from .state import alive, read_json, write_text

UNIT = "reap-watchdog.service"
_SEEN_S = 30.0


def state_of(run_dir: Path) -> dict[str, Any]:
    """What the watchdog last wrote; empty where none ever ran in this boot."""
    return read_json(run_dir / "watchdog.json") or {}


def guards(state: Mapping[str, Any]) -> bool:
    """Whether the watchdog that wrote a state lives; its process number may belong to somebody else by now."""
    if not alive(dict(state)):
        return False
    try:
        return b"watch" in Path(f"/proc/{state['pid']}/cmdline").read_bytes()
    except OSError:
        return False


def missing(config: ServiceConfig) -> str | None:
    """Why a load must not begin for want of a watchdog, or nothing."""
    state = state_of(Path(config.run_dir))
    if not config.watchdog_required or guards(state):
        return None
    named = f"process {state.get('pid')}, which {config.run_dir}/watchdog.json names, is none"
    found = named if state else "none has run in this boot"
    return (
        f"no memory watchdog guards this host ({found}), wanted a running {UNIT}: systemctl start {UNIT}, and "
        f"journalctl -u {UNIT} where that fails"
    )


def kept_settings(config: ServiceConfig) -> str | None:
    """The watchdog's settings as they are now, to be kept with a generation that serves under them."""
    try:
        return Path(config.watchdog_settings).read_text(encoding="utf-8")
    except OSError:
        return None


def differs(config: ServiceConfig, settings: str | None) -> bool:
    """Whether the watchdog guards by other settings than those that a generation served under."""
    now = kept_settings(config)
    return settings is not None and now is not None and now != settings


def give_back(config: ServiceConfig, settings: str) -> None:
    """Make the watchdog guard by the settings that a generation served under: its floor may be another one.

    Raises:
        ReapError: this program cannot read them, they could not be written, or no watchdog guarded with them in time.
            Nothing was changed in the first two cases; in the last the settings of before are there again.
    """
    path, run_dir = Path(config.watchdog_settings), Path(config.run_dir)
    try:
        from_dict(tomllib.loads(settings), "the kept file")
    except (ReapError, tomllib.TOMLDecodeError) as error:
        raise ReapError(
            f"the watchdog keeps the settings it has: those kept of {config.generation} cannot be used: {error}"
        ) from error
    had = kept_settings(config)
    try:
        _guard_by(settings, path, run_dir)
    except ReapError:
        if had is not None:
            _guard_by(had, path, run_dir)
        raise


def _guard_by(settings: str, path: Path, run_dir: Path) -> None:
    before = state_of(run_dir).get("pid")
    try:
        write_text(path, settings, 0o644)
        done = subprocess.run(["systemctl", "restart", UNIT], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ReapError(f"the watchdog keeps the settings it has: {path}: {error}") from error
    if done.returncode:
        raise ReapError(f"systemctl restart {UNIT}: {done.stderr.strip()}")
    end = time.monotonic() + _SEEN_S
    while (state := state_of(run_dir)).get("pid") == before or not guards(state):
        if time.monotonic() > end:
            raise ReapError(f"{UNIT} was restarted and did not guard within {_SEEN_S:.0f} s: see its journal")
        time.sleep(0.05)
