"""Lift the hold, the latch and the spent budget of the watchdog that runs on this host."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from ..errors import ReapError
from .state import read_boot_id, read_json

_SEEN_S = 30.0


def lift(state_path: Path) -> None:
    """Ask the watchdog that wrote a state file, and wait until the file shows it: a start that follows sees no hold.

    Raises:
        ReapError: no running watchdog is named there, it cannot be reached, or does not answer.
    """
    state = read_json(state_path)
    pid = state.get("pid") if isinstance(state, dict) and state.get("boot_id") == read_boot_id() else None
    if not isinstance(pid, int):
        raise ReapError(f"no running watchdog is named in {state_path}; start reap-watchdog.service first")
    try:
        if "watch" not in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace"):
            raise ProcessLookupError(pid)
        os.kill(pid, signal.SIGUSR1)
    except OSError as error:
        raise ReapError(f"the watchdog of {state_path} (process {pid}) cannot be reached: {error}") from error
    end = time.monotonic() + _SEEN_S
    while (read_json(state_path) or {}).get("hold_until_available_kb") is not None:
        if time.monotonic() > end:
            raise ReapError(f"the watchdog (process {pid}) did not lift it within {_SEEN_S:.0f} s: see its journal")
        time.sleep(0.02)
