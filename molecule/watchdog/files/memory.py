"""A double of /proc/meminfo: MemAvailable as K144 at 200K context moves it on a Spark, by the phase of the service.

Absent 112 GiB; a load dips under the floor of serving and recovers; serving is a sawtooth just above the floor; the
teardown dips under the floor again, and memory comes back a little after it. While /srv/hog exists, something else
takes 4 GiB/s and keeps it.
"""

import json
import os
import time
from pathlib import Path

GIB = 1024 * 1024
FREE, DIP, LOW, HIGH, TEARDOWN, HOG = 112.0, 6.4, 8.1, 10.4, 7.4, 4.0
TICK_S, TOOTH_S, LATE_S, DIP_S = 0.01, 2.0, 3.0, (3.0, 5.0)


def phase() -> str:
    try:
        return str(json.loads(Path("/run/reap/service.json").read_text(encoding="utf-8"))["phase"])
    except OSError:
        return "absent"


def wanted(now_phase: str, seconds: float) -> tuple[float, float]:
    """GiB to go to, and the GiB/s to go with; ``seconds`` since the phase began."""
    if Path("/srv/hog").exists():
        return HOG, 4.0
    if now_phase == "loading":
        return (DIP, 4.0) if DIP_S[0] < seconds < DIP_S[1] else (HIGH, 60.0)
    if now_phase == "serving":
        return (LOW if seconds % TOOTH_S < TOOTH_S / 2 else HIGH), 3.0
    late = now_phase == "absent" and seconds < LATE_S
    return (TEARDOWN, 3.0) if now_phase == "stopping" or late else (FREE, 60.0)


file = os.open("/srv/meminfo", os.O_WRONLY | os.O_CREAT)
gib, before, since = FREE, "", time.monotonic()
last = since
while True:
    now, current = time.monotonic(), phase()
    if current != before:
        before, since = current, now
    goal, speed = wanted(current, now - since)
    step = speed * (now - last)
    last = now
    gib = min(goal, gib + step) if goal > gib else max(goal, gib - step)
    os.pwrite(file, b"MemTotal: %15d kB\nMemAvailable: %15d kB\n" % (121 * GIB, int(gib * GIB)), 0)
    time.sleep(TICK_S)
