"""A checkpoint of random weights in many files, for tests and benchmarks of a download; nothing can serve it."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any


def shard(tensor: str, data: bytes) -> bytes:
    """A safetensors file with one tensor of bytes."""
    header = json.dumps({tensor: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def write(folder: Path, *, shards: int = 3, shard_bytes: int = 300_000, seed: int = 1, **config: Any) -> Path:
    """A checkpoint with an index in a new folder; the same for the same arguments."""
    folder.mkdir(parents=True)
    source = random.Random(seed)
    names = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        (folder / name).write_bytes(shard(f"t{number}", source.randbytes(shard_bytes)))
        names[f"t{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "n_routed_experts": 144, **config}))
    (folder / "README.md").write_text("a model\n")
    (folder / "encoding").mkdir()
    (folder / "encoding" / "table.py").write_text("TABLE = {}\n")
    return folder
