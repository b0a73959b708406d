"""Hashing as a multiple of what sha256sum over the same files in parallel needs, and what one look at a model costs.

    python3 tests/benchmarks/model_fetch.py [--files 16] [--megabytes 64] [--rounds 3]

Prints one JSON object. Files are in the page cache for both, and both use as many processes or threads as there are
cores; rounds alternate, and the quickest of each counts, because other programs can only add time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins" / "module_utils"))
from reap.fetch import manifest
from reap.fetch.plan import Want
from reap.fetch.state import inspect

REPO, COMMIT = "bench/model", "0" * 40


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name) / REPO / COMMIT
        folder.mkdir(parents=True)
        source = random.Random(1)
        for number in range(options.files):
            (folder / f"model-{number:05d}.safetensors").write_bytes(source.randbytes(options.megabytes << 20))
        (folder / "config.json").write_text("{}")
        paths = sorted(folder.iterdir())
        listed = "".join(f"{path}\n" for path in paths)
        command = ["xargs", "-P", str(cores), "-n", "1", "sha256sum"]
        said = subprocess.run(command, input=listed, capture_output=True, text=True, check=True).stdout
        sums = {line.split()[1]: line.split()[0] for line in said.splitlines()}
        wants = [Want(path.name, path.stat().st_size, sums[str(path)]) for path in paths]
        entries: dict[str, manifest.Entry] = {}

        def ours() -> None:
            with ThreadPoolExecutor(cores) as pool:
                for entry, problem in pool.map(lambda want: manifest.verify(folder / want.name, want), wants):
                    assert entry is not None, problem
                    entries[entry.name] = entry

        def theirs() -> None:
            subprocess.run(command, input=listed, stdout=subprocess.DEVNULL, text=True, check=True)

        def warm() -> None:
            for path in paths:
                path.read_bytes()

        times: dict[str, list[float]] = {"reap": [], "sha256sum": []}
        for _ in range(options.rounds):
            for name_, work in (("reap", ours), ("sha256sum", theirs)):
                # reap gives the pages back when it has read them.
                warm()
                times[name_].append(timed(work))
        manifest.Manifest(REPO, COMMIT, "disk", 0.0, entries).save(folder)
        look = min(timed(lambda: inspect(REPO, COMMIT, folder, {})) for _ in range(5))
    total = options.files * options.megabytes << 20
    best = {key: min(values) for key, values in times.items()}
    result = {
        "cores": cores,
        "bytes": total,
        "reap_s": round(best["reap"], 3),
        "sha256sum_s": round(best["sha256sum"], 3),
        "multiple": round(best["reap"] / best["sha256sum"], 3),
        "reap_bytes_per_s": round(total / best["reap"]),
        "look_at_a_whole_model_s": round(look, 4),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
