"""MemAvailable at a fixed rate in a thread of its own, with the phase each sample fell in."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

MEMINFO = Path("/proc/meminfo")


def mem_available_kb(meminfo: Path = MEMINFO) -> int | None:
    """MemAvailable in kB, or None where the kernel does not say."""
    try:
        for line in meminfo.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


@dataclass
class MemorySampler:
    """Samples (seconds since `started`, kB) at `hertz` until stopped.

    The next sample is due at a multiple of the period after the start, so a slow read does not shift the later ones.
    """

    started: float
    hertz: float = 2.0
    meminfo: Path = MEMINFO
    samples: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def _sample(self) -> None:
        value = mem_available_kb(self.meminfo)
        if value is not None:
            self.samples.append((time.monotonic() - self.started, value))

    def _run(self) -> None:
        period = 1.0 / self.hertz
        due = time.monotonic()
        while not self._stop.is_set():
            due += period
            now = time.monotonic()
            if due < now:
                # Late by whole periods (the machine stood still): take up the rhythm again instead of a burst.
                due = now
            if not self._stop.wait(max(0.0, due - time.monotonic())):
                self._sample()

    def __enter__(self) -> MemorySampler:
        # The first at once: the thread may wait for a processor for as long as a short run lasts.
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def summary(self, phases: list[dict[str, Any]], floor_kb: int | None, kept: int = 2000) -> dict[str, Any] | None:
        """What the report says of memory; None without a sample.

        Args:
            phases: {name, start_s, end_s} on the same clock.
            floor_kb: the watchdog's floor.
            kept: most samples in the report. More are thinned by keeping the lowest of each group, so that no low
                point is lost.
        """
        samples = list(self.samples)
        if not samples:
            return None
        at, lowest = min(samples, key=lambda sample: sample[1])
        phase = next((p["name"] for p in phases if p["start_s"] <= at <= p["end_s"]), None)
        group = -(-len(samples) // kept)
        thinned = [min(samples[i : i + group], key=lambda sample: sample[1]) for i in range(0, len(samples), group)]
        return {
            "hertz": self.hertz,
            "samples": [[round(t, 2), kb] for t, kb in thinned],
            "samples_taken": len(samples),
            "min_kb": lowest,
            "min_at_s": round(at, 2),
            "min_phase": phase,
            "floor_kb": floor_kb,
            "distance_to_floor_kb": None if floor_kb is None else lowest - floor_kb,
        }
