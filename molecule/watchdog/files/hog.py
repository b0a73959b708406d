"""A stand-in for a model: waits for /go/now, then takes memory step by step up to a hard size, and keeps it.

Arguments: most MiB, MiB a step, seconds between steps.
"""

import pathlib
import sys
import time

most, step, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
held = []
while not pathlib.Path("/go/now").exists():
    time.sleep(0.01)
while len(held) * step < most:
    # Not zeros: pages that were only promised would not be missing from MemAvailable.
    held.append(b"\x01" * (step << 20))
    time.sleep(pause)
while True:
    time.sleep(1)
