"""What a checkpoint holds, from the headers of its safetensors files alone. No tensor is ever read.

File format (github.com/huggingface/safetensors, README "Format"): 8 bytes little-endian length N, N bytes of JSON that
begin with ``{``, then the buffer. The JSON maps a tensor's name to ``{"dtype", "shape", "data_offsets": [begin, end]}``
with offsets into the buffer; the key ``__metadata__`` maps text to text. Tensors do not overlap and leave no holes, and
the buffer ends where the file does. All of it is checked here, because the sums decide whether a host freezes and a
half-downloaded file is the usual liar.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ReapError

INDEX_NAME = "model.safetensors.index.json"

# The format allows 100 MB. The largest header of a real checkpoint here would be about 9 MB (all 69,187 tensors of the
# unpruned model in one file), and a header costs about ten times its size as Python objects: this bound keeps a liar
# from costing more than the check is worth.
MAX_HEADER_BYTES = 25_000_000
MAX_INDEX_BYTES = 50_000_000

# Bits of one element; names as the format spells them.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as a header describes it.

    Attributes:
        name: Its name in the checkpoint.
        dtype: A key of `DTYPE_BITS`.
        shape: Elements along each axis; empty for a scalar.
        nbytes: Bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, in the order in which they lie in it.

    Args:
        path: A regular file. Only its header is read, at most `MAX_HEADER_BYTES`.

    Raises:
        ReapError: Unreadable, truncated, or a header that does not describe exactly this file.
    """
    try:
        # Not a plain open(): a named pipe in the folder would wait for a writer for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ReapError(_unreadable(path, error)) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ReapError(f"{path} is no regular file: a safetensors file is wanted")
        size = status.st_size
        if size < 8:
            raise ReapError(
                f"{path} has {size} bytes: a safetensors file begins with 8 bytes of header length; download it again"
            )
        length = int.from_bytes(_read(handle, 8, 0, path), "little")
        if length > MAX_HEADER_BYTES:
            raise ReapError(
                f"{path} says its header has {length} bytes; at most {MAX_HEADER_BYTES} are read: it is no safetensors"
                " file, or it is damaged"
            )
        if 8 + length > size:
            raise ReapError(
                f"{path} says its header has {length} bytes, but the file ends after {size}: download it again"
            )
        return _parse(_read(handle, length, 8, path), size - 8 - length, path)
    except OSError as error:
        raise ReapError(_unreadable(path, error)) from error
    finally:
        os.close(handle)


def iter_tensors(folder: Path) -> Iterator[Tensor]:
    """Every tensor that vLLM's loader would find in a checkpoint folder, file by file, so that memory stays small.

    With an index, the files it names; without one, every ``*.safetensors`` (vLLM's default loader globs the folder, and
    keeps only the index's files where there is an index).

    Raises:
        ReapError: No folder, no weights, a named shard or tensor that is missing, a tensor that occurs twice, or a
            damaged file.
    """
    index = read_index(folder)
    if index is None:
        files = _weight_files(folder)
        expected: dict[str, str] = {}
    else:
        files = sorted(set(index.values()))
        expected = index
    seen: set[str] = set()
    for name in files:
        for tensor in read_header(folder / name):
            if tensor.name in seen:
                raise ReapError(
                    f"{folder}: tensor {tensor.name!r} is in more than one file: the folder mixes two checkpoints"
                )
            seen.add(tensor.name)
            yield tensor
    missing = [name for name in expected if name not in seen]
    if missing:
        where = expected[missing[0]]
        raise ReapError(
            f"{folder / INDEX_NAME} names {len(missing)} tensors that the files do not hold, the first {missing[0]!r}"
            f" in {where}:"
            " index and files are of different checkpoints; download the revision again"
        )


def has_weights(folder: Path) -> bool:
    """Whether the folder holds an index or a safetensors file; False for a folder that is not there.

    Raises:
        ReapError: The folder is there and cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return any(entry.name == INDEX_NAME or entry.name.endswith(".safetensors") for entry in entries)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ReapError(_unreadable(folder, error)) from error


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name from ``model.safetensors.index.json``, or None where there is none.

    Raises:
        ReapError: Not that JSON, or a shard that is missing or lies outside the folder.
    """
    path = folder / INDEX_NAME
    try:
        folder.stat()
        present = path.is_symlink() or path.exists()
    except OSError as error:
        raise ReapError(_unreadable(folder, error)) from error
    if not present:
        return None
    found = read_json(path, MAX_INDEX_BYTES)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ReapError(f"{path} has no weight_map: it is no safetensors index; download the revision again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\0" in name:
            raise ReapError(
                f"{path} puts tensor {tensor!r} into {name!r}: the name of a file in the same folder is wanted"
            )
    missing = [name for name in sorted(set(weight_map.values())) if not _there(folder / name)]
    if missing:
        raise ReapError(
            f"{path} names {len(missing)} files that are missing, the first {missing[0]}: finish the download"
        )
    return weight_map


def read_json(path: Path, limit: int = MAX_INDEX_BYTES) -> Any:
    """A JSON file of bounded size.

    Raises:
        ReapError: Unreadable, larger than `limit` bytes, or no JSON.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise ReapError(f"{path} is no regular file: a JSON file is wanted")
            if status.st_size > limit:
                raise ReapError(f"{path} has {status.st_size} bytes, more than the {limit} such a file may have")
            raw = _read(handle, status.st_size, 0, path)
        finally:
            os.close(handle)
    except OSError as error:
        raise ReapError(_unreadable(path, error)) from error
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ReapError(f"{path} is no JSON: {_first_line(error)}") from error


def _read(handle: int, count: int, offset: int, path: Path) -> bytes:
    parts: list[bytes] = []
    while count:
        part = os.pread(handle, count, offset)
        if not part:
            raise ReapError(f"{path} became shorter while it was read: wait until the download has finished")
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return b"".join(parts)


def _parse(raw: bytes, buffer_bytes: int, path: Path) -> list[Tensor]:
    if not raw.startswith(b"{"):
        raise ReapError(
            f"{path} has a header that does not begin with '{{': it is no safetensors file, or it is damaged"
        )
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ReapError(f"{path} has a header that cannot be read: {_first_line(error)}") from error
    places: list[tuple[int, int, Tensor]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise ReapError(f"{path}: __metadata__ must map text to text")
            continue
        places.append(_entry(name, entry, path))
    places.sort(key=lambda place: place[:2])
    end = 0
    for begin, stop, tensor in places:
        if begin != end:
            fault = "overlaps the tensor before it" if begin < end else f"leaves {begin - end} bytes unused before it"
            raise ReapError(
                f"{path}: tensor {tensor.name!r} begins at {begin} and {fault} (which ends at {end}): the header is"
                " damaged"
            )
        end = stop
    if end != buffer_bytes:
        fault = "past the end of the file" if end > buffer_bytes else "short of the end of the file"
        raise ReapError(
            f"{path}: the tensors end at {end}, {fault} ({buffer_bytes} bytes of data): the download is not complete,"
            " or damaged"
        )
    return [tensor for _, _, tensor in places]


def _entry(name: str, entry: Any, path: Path) -> tuple[int, int, Tensor]:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(entry, dict):
        raise ReapError(f"{where} is described by {type(entry).__name__}, not by dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ReapError(f"{where} has the unknown dtype {str(dtype)[:40]!r}: known are {', '.join(sorted(DTYPE_BITS))}")
    if not isinstance(shape, list) or not all(_count(size) for size in shape):
        raise ReapError(f"{where} has the shape {str(shape)[:80]}: a list of whole numbers, zero or more, is wanted")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_count(offset) for offset in offsets):
        raise ReapError(f"{where} has the data_offsets {str(offsets)[:80]}: two whole numbers are wanted")
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    if 0 in shape:
        bits = 0
    else:
        for size in shape:
            bits *= size
            if bits > _LARGEST:
                raise ReapError(f"{where} has more than 2^63 bits by its shape: the header is damaged")
    if bits % 8:
        raise ReapError(f"{where} has {bits} bits by its shape, which is no whole number of bytes")
    if end - begin != bits // 8:
        raise ReapError(
            f"{where} has {bits // 8} bytes by dtype and shape, but {end - begin} by its data_offsets: the header is"
            " damaged"
        )
    return begin, end, Tensor(name, dtype, tuple(shape), bits // 8)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _weight_files(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".safetensors"))
    except OSError as error:
        raise ReapError(_unreadable(folder, error)) from error
    if not names:
        raise ReapError(
            f"{folder} holds no safetensors file: download the model first, or give routed_experts to predict its size"
        )
    return names


def _there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ReapError(_unreadable(path, error)) from error
    return True


def _unreadable(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return f"{path} is a symbolic link that leads back to itself: remove the link and download the model again"
    if error.errno == errno.ENOENT:
        return f"{path} is not there"
    return f"{path} cannot be read: {os.strerror(error.errno) if error.errno else error}"


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text[:160]
