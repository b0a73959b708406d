"""The progress file of a long step: written beside and renamed, so that a reader never sees half of it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The rate is that of the last so many seconds: short enough to show a stall, long enough not to jump.
RATE_WINDOW_S = 15.0


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write JSON beside ``path`` and rename it into place, flushed to disk before."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as out:
            json.dump(value, out, indent=1, sort_keys=True)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def without(text: str, secret: str | None) -> str:
    """A text that may quote somebody else's message, without the secret."""
    return text.replace(secret, "***") if secret else text


class Progress:
    """Writes one JSON object: step, state, done, total, unit, rate, eta_s, detail, source, updated_unix, error.

    ``rate`` is in units per second over the last 15 seconds of the monotonic clock, so a clock that jumps bends
    nothing but ``updated_unix``. A progress file that cannot be written never fails the step.

    The file may be read by everyone, and its texts quote what a hub or another host said: ``secret`` is masked in them.
    """

    def __init__(
        self,
        path: Path | None,
        step: str,
        total: int | None = None,
        unit: str = "bytes",
        source: str | None = None,
        *,
        every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        secret: str | None = None,
    ) -> None:
        self.path = path
        self.every_s = every_s
        self._secret = secret
        self._clock = clock
        self._lock = threading.Lock()
        self._points: deque[tuple[float, int]] = deque()
        self._written = float("-inf")
        self.state: dict[str, Any] = {
            "step": step,
            "state": "running",
            "done": 0,
            "total": total,
            "unit": unit,
            "rate": None,
            "eta_s": None,
            "detail": "",
            "source": source,
            "updated_unix": time.time(),
            "error": None,
        }

    def update(
        self, done: int | None = None, *, total: int | None = None, detail: str | None = None, source: str | None = None
    ) -> None:
        """Record how far the step is; written at most once a second."""
        with self._lock:
            for key, value in (("done", done), ("total", total), ("detail", detail), ("source", source)):
                if value is not None:
                    self.state[key] = without(value, self._secret) if isinstance(value, str) else value
            now = self._clock()
            if done is not None:
                self._measure(now, done)
            if now - self._written >= self.every_s:
                self._write(now)

    def restart_rate(self, done: int) -> None:
        """Forget the rate so far: what was found on disk did not come over the network."""
        with self._lock:
            self._points.clear()
            self._measure(self._clock(), done)

    def done(self, detail: str = "") -> None:
        """The step is over and good."""
        self._end("done", detail, None)

    def failed(self, error: str) -> None:
        """The step is over and failed; ``error`` is one line for a person."""
        self._end("failed", "", error)

    def _measure(self, now: float, done: int) -> None:
        if self._points and done < self._points[-1][1]:
            self._points.clear()
        self._points.append((now, done))
        while len(self._points) > 2 and now - self._points[0][0] > RATE_WINDOW_S:
            self._points.popleft()
        (then, before), total = self._points[0], self.state["total"]
        rate = (done - before) / (now - then) if now - then >= 0.5 else None
        self.state["rate"] = None if rate is None else round(rate, 1)
        self.state["eta_s"] = round((total - done) / rate) if rate and total is not None and total >= done else None

    def _end(self, state: str, detail: str, error: str | None) -> None:
        with self._lock:
            self.state.update(state=state, detail=without(detail, self._secret), rate=None, eta_s=None)
            self.state["error"] = None if error is None else without(error, self._secret)
            self._write(self._clock())

    def _write(self, now: float) -> None:
        self._written = now
        self.state["updated_unix"] = time.time()
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.state)
        except OSError:
            # Nobody watching is no reason to stop a download; the result says what happened.
            self.path = None
