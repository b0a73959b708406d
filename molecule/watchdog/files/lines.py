"""Write floors relative to what is available now into the watchdog's settings; prints the floor in kB.

Argument: MiB below what is available now.
"""

import pathlib
import sys

lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
available_kb = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
floor_kb = available_kb - int(sys.argv[1]) * 1024
new = {
    "floor_kb": floor_kb,
    "loading_floor_kb": floor_kb,
    "hard_floor_kb": min(floor_kb, available_kb) // 2,
    "return_kb": 1024,
}
settings = pathlib.Path("/etc/reap/watchdog.toml")
kept = [line for line in settings.read_text().splitlines() if line.split(" = ")[0] not in new]
settings.write_text("\n".join([f"{key} = {value}" for key, value in new.items()] + kept) + "\n")
print(floor_kb)
