"""Time and memory of judging a full-size K144 checkpoint (93.7 GB apparent, a few MB on disk) by its headers.

    .venv/bin/python tests/benchmarks/memory_fit.py [--repeat 5]

Prints seconds, the peak of resident memory, what an empty interpreter takes, and the ratio to reading the header bytes
alone. Each run is a process of its own, so that one's memory does not hide another's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins/module_utils")]

from tests.support.sparse_checkpoint import write_sparse_checkpoint

_WORK = {
    "nothing": "pass",
    "header bytes": (
        "from pathlib import Path\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.safetensors')):\n"
        "    with path.open('rb') as file: file.read(int.from_bytes(file.read(8), 'little'))"
    ),
    "memory_fit": (
        "from reap.memory import FitRequest, HostMemory, advised_fit\n"
        "fit = advised_fit(FitRequest(kv_cache_memory=14 << 30, max_model_len=200000, max_num_batched_tokens=8192,"
        " watchdog_min_available_kb=8388608, model_dir=sys.argv[1]), HostMemory(120 << 30))\n"
        "result['weights'] = sum(term.expected for term in fit.ledger if term.name.startswith('weights'))\n"
        "result['verdict'] = fit.verdict"
    ),
}
_PROGRAM = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {path!r})
result = {{}}
begin = time.perf_counter()
{work}
result["seconds"] = time.perf_counter() - begin
# Not getrusage: its peak is inherited from the process that forked this one.
status = Path("/proc/self/status").read_text()
result["peak_mb"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps(result))
"""


def measure(name: str, folder: Path) -> dict[str, float]:
    """One run in a fresh process: its own seconds and peak MB (2^20 bytes of resident memory), and the process's wall
    seconds."""
    program = _PROGRAM.format(path=str(ROOT / "plugins/module_utils"), work=_WORK[name])
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True, text=True)
    return {**json.loads(done.stdout), "process_seconds": time.perf_counter() - begin}


def main() -> int:
    """Write the checkpoint, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory(prefix="sparse-k144-") as temporary:
        begin = time.perf_counter()
        checkpoint = write_sparse_checkpoint(Path(temporary), 144)
        print(
            f"checkpoint: {checkpoint.tensors} tensors in {len(checkpoint.files)} files,"
            f" {checkpoint.apparent_bytes / 1e9:.2f} GB apparent,"
            f" {checkpoint.disk_bytes / 1e6:.1f} MB on disk, written in {time.perf_counter() - begin:.1f} s"
        )
        figures = {}
        for name in _WORK:
            runs = [measure(name, checkpoint.folder) for _ in range(repeat)]
            seconds = [run["seconds"] for run in runs]
            figures[name] = {
                "seconds_min": min(seconds),
                "seconds_median": statistics.median(seconds),
                "seconds_max": max(seconds),
                "peak_mb": max(run["peak_mb"] for run in runs),
            }
            print(
                f"{name:<14} {min(seconds):7.3f} {statistics.median(seconds):7.3f} {max(seconds):7.3f} s (min, median,"
                " max),"
                f" peak {figures[name]['peak_mb']:.1f} MB"
            )
            if name == "memory_fit" and runs[0]["weights"] != checkpoint.tensor_bytes - _mtp_bytes():
                print(f"WRONG: summed {runs[0]['weights']} bytes")
                return 1
    ratio = figures["memory_fit"]["seconds_median"] / figures["header bytes"]["seconds_median"]
    own = figures["memory_fit"]["peak_mb"] - figures["nothing"]["peak_mb"]
    print(f"ratio to reading the header bytes: {ratio:.1f}; memory above an empty interpreter: {own:.1f} MB; sum exact")
    print(json.dumps({"figures": figures, "ratio": ratio}))
    return 0


def _mtp_bytes() -> int:
    from reap.memory.config import flash
    from reap.memory.weights import predict

    weights = predict(flash(144))
    return weights.mtp_experts + weights.mtp_other


if __name__ == "__main__":
    raise SystemExit(main())
