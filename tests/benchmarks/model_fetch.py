"""A full verification, as a multiple of what programs need to hash the same files, and what one look at a model costs.

    python3 tests/benchmarks/model_fetch.py [--files 16] [--megabytes 64] [--rounds 3]

The verification is the whole step, ``engine.fetch(verify="full")``: lock, hashes, manifest. It is compared with two
programs: sha256sum of coreutils, which on many machines does not use the processor's own SHA instructions, and
``openssl dgst -sha256``, which does, as Python's hashlib. Prints one JSON object. Files are in the page cache, all use
as many processes or threads as there are cores; rounds alternate, and the quickest of each counts, because other
programs can only add time.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins" / "module_utils"))
from reap.fetch import engine, manifest
from reap.fetch.plan import Want
from reap.fetch.progress import Progress
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
        each = ["xargs", "-P", str(cores), "-n", "1"]
        programs = {"sha256sum": ["sha256sum"], "openssl": ["openssl", "dgst", "-sha256"]}
        said = subprocess.run([*each, "sha256sum"], input=listed, capture_output=True, text=True, check=True).stdout
        sums = {line.split()[1]: line.split()[0] for line in said.splitlines()}
        wants = [Want(path.name, path.stat().st_size, sums[str(path)]) for path in paths]
        entries: dict[str, manifest.Entry] = {}
        for want in wants:
            entry, problem = manifest.verify(folder / want.name, want)
            assert entry is not None, problem
            entries[entry.name] = entry
        manifest.Manifest(REPO, COMMIT, "disk", 0.0, entries).save(folder)
        request = engine.Request(repo=REPO, revision=COMMIT, dest=folder, verify="full")

        def ours() -> None:
            outcome = engine.fetch(request, Progress(None, "model_fetch"))
            assert (outcome.read, outcome.repaired) == (sum(want.size for want in wants), [])

        def theirs(program: str) -> None:
            command = [*each, *programs[program]]
            subprocess.run(command, input=listed, stdout=subprocess.DEVNULL, text=True, check=True)

        def warm() -> None:
            for path in paths:
                path.read_bytes()

        times: dict[str, list[float]] = {"reap": [], "sha256sum": [], "openssl": []}
        for _ in range(options.rounds):
            # reap gives the pages back when it has read them.
            warm()
            times["reap"].append(timed(ours))
            for program in programs:
                warm()
                times[program].append(timed(lambda program=program: theirs(program)))  # type: ignore[misc]
        look = min(timed(lambda: inspect(REPO, COMMIT, folder, {})) for _ in range(5))
    total = options.files * options.megabytes << 20
    best = {key: min(values) for key, values in times.items()}
    result = {
        "cores": cores,
        "bytes": total,
        "reap_s": round(best["reap"], 3),
        "sha256sum_s": round(best["sha256sum"], 3),
        "openssl_s": round(best["openssl"], 3),
        "multiple_of_sha256sum": round(best["reap"] / best["sha256sum"], 3),
        "multiple_of_openssl": round(best["reap"] / best["openssl"], 3),
        "reap_bytes_per_s": round(total / best["reap"]),
        "look_at_a_whole_model_s": round(look, 4),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
