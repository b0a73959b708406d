"""Why a start or a served model ended, and how often that may happen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .state import read_json, write_json


class Failure(Exception):
    """Why a start failed or a served model ended.

    ``permanent``: another start as configured cannot help. ``blames``: the generation is at fault, so a previous one
    may do better; a missing engine or short memory is not its fault. ``latches``: no start is allowed until a person or
    a provision lifts it.
    """

    def __init__(self, text: str, *, permanent: bool = False, blames: bool = True, latches: bool = False) -> None:
        super().__init__(text)
        self.permanent = permanent
        self.blames = blames
        self.latches = latches


class Stopped(Exception):
    """systemd, or a person, asked for the end."""


class Restarts:
    """Failures of this boot, in <run_dir>/restarts.json: what the backoff and the latch go by."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def recent(self, window_s: float) -> list[dict[str, Any]]:
        """Failures of the last so many seconds, oldest first."""
        now = time.monotonic()
        entries = (read_json(self._path) or {}).get("failures", [])
        # A monotonic clock: a jump of the wall clock neither forgives nor condemns.
        return [entry for entry in entries if now - window_s <= entry["monotonic_s"] <= now]

    def add(self, reason: str, window_s: float) -> int:
        """Record a failure; returns how many there were within the window."""
        entries = [*self.recent(window_s), {"monotonic_s": time.monotonic(), "reason": reason}]
        write_json(self._path, {"failures": entries})
        return len(entries)

    def clear(self) -> None:
        """Start counting anew."""
        self._path.unlink(missing_ok=True)
