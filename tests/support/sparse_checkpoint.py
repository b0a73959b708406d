"""A DeepSeek V4 Flash checkpoint of full size that takes a few MB of disk: true headers, true index and config.json,
and no tensor data.

The files are sparse: each is as long as its header says, but only the header's blocks are written. So everything that
reads headers, sizes and config sees the published geometry; what reads tensors reads zeros.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from reap.memory.config import FLASH_CONFIG, DeepSeekV4, parse_deepseek
from reap.memory.weights import deepseek_tensors
from reap.safetensors import INDEX_NAME, Tensor

# Keys of the published config.json that say nothing about sizes.
_UNSIZED = {"architectures": ["DeepseekV4ForCausalLM"], "quantization_config": {"quant_method": "fp8"}}


@dataclass(frozen=True, slots=True)
class SparseCheckpoint:
    """What was written.

    Attributes:
        folder: Where.
        tensor_bytes: Bytes of all tensors, as the headers and the index's total_size say.
        apparent_bytes: Sum of the files' lengths.
        disk_bytes: What they take on disk.
        tensors: Number of tensors.
        files: Names of the safetensors files, in order.
    """

    folder: Path
    tensor_bytes: int
    apparent_bytes: int
    disk_bytes: int
    tensors: int
    files: tuple[str, ...]


def write_sparse_checkpoint(folder: Path, routed_experts: int = 144, **config: object) -> SparseCheckpoint:
    """Write the checkpoint.

    Args:
        folder: Created if missing; files of the same names are replaced.
        routed_experts: K in every layer, the drafter's included.
        **config: Other keys of config.json that differ from the published model's, for example num_hidden_layers and
        compress_ratios for
            a small one.

    Returns:
        What was written. One file for the embedding, one for each layer, one for the head and one for each drafter
        layer, as published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {**FLASH_CONFIG, **_UNSIZED, **config, "n_routed_experts": routed_experts}
    geometry = parse_deepseek(content, "sparse checkpoint")
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    groups = [list(members) for _, members in groupby(_in_file_order(geometry), key=lambda pair: pair[0])]
    weight_map: dict[str, str] = {}
    names = []
    total = 0
    for number, members in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = [tensor for _, tensor in members]
        write_sparse_file(folder / name, tensors)
        weight_map.update({tensor.name: name for tensor in tensors})
        total += sum(tensor.nbytes for tensor in tensors)
        names.append(name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    stats = [(folder / name).stat() for name in names]
    return SparseCheckpoint(
        folder,
        total,
        sum(s.st_size for s in stats),
        sum(s.st_blocks * 512 for s in stats),
        len(weight_map),
        tuple(names),
    )


def write_sparse_file(path: Path, tensors: list[Tensor]) -> None:
    """One safetensors file with the tensors' header and a hole where their data would be."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)


def _in_file_order(geometry: DeepSeekV4) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Tensors with the file they belong to: embedding, layers, head and norm, drafters."""

    def place(tensor: Tensor) -> tuple[int, int]:
        part, _, rest = tensor.name.partition(".")
        if part == "embed":
            return (0, 0)
        if part == "layers":
            return (1, int(rest.partition(".")[0]))
        if part == "mtp":
            return (3, int(rest.partition(".")[0]))
        return (2, 0)

    return iter(sorted(((place(tensor), tensor) for tensor in deepseek_tensors(geometry)), key=lambda pair: pair[0]))
