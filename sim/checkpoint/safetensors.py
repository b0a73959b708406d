"""Write a safetensors file (bfloat16 matrices) with the standard library only.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the raw data.
Source: the safetensors format description, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence

Row = Sequence[float]
Matrix = Sequence[Row]


def to_bfloat16(row: Row) -> bytes:
    """Return the row as little-endian bfloat16, 2 bytes a value, rounded to nearest even."""
    bits = struct.unpack(f"<{len(row)}I", struct.pack(f"<{len(row)}f", *row))
    return struct.pack(f"<{len(row)}H", *((u + 0x7FFF + ((u >> 16) & 1)) >> 16 for u in bits))


def encode(tensors: Mapping[str, Matrix | Row]) -> bytes:
    """Return the bytes of a safetensors file; a tensor is a vector or a list of equally long rows.

    Tensors are stored in the order of their names, so that equal tensors give equal bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        rows, shape = _rows(name, tensors[name])
        blob = b"".join(to_bfloat16(row) for row in rows)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def _rows(name: str, tensor: Matrix | Row) -> tuple[list[Row], list[int]]:
    rows: list[Row] = []
    vector: list[float] = []
    for item in tensor:
        if isinstance(item, int | float):
            vector.append(item)
        else:
            rows.append(item)
    if vector:
        return [vector], [len(vector)]
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        raise ValueError(f"tensor {name}: rows of lengths {sorted(widths)}, wanted one length")
    return rows, [len(rows), len(rows[0])]
