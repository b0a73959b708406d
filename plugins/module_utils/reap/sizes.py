"""Sizes in bytes, read and printed by vLLM's rule.

vLLM's ``human_readable_int`` (vllm/utils/argparse_utils.py; the same rule in 0.20 to 0.32) reads a capital letter as a
power of two and a small one as a power of ten: ``6G`` is 6 x 2^30, ``6g`` is 6 x 10^9. A decimal point is allowed only
before a small letter. ``kv_cache_memory`` of a profile reaches vLLM as it stands, so what is computed from it here must
be the same number.
"""

from __future__ import annotations

import re

from .errors import ReapError

KIB = 2**10
MIB = 2**20
GIB = 2**30

_BINARY = {"T": 2**40, "G": GIB, "M": MIB, "K": KIB}
_DECIMAL = {"t": 10**12, "g": 10**9, "m": 10**6, "k": 10**3}
# Only ASCII digits and a bounded number of them: \d would take other scripts' digits, and int() refuses 4301 of them
# with its own words.
_SIZE = re.compile(r"([0-9]{1,30})(\.[0-9]{1,30})?([kKmMgGtT]?)")


def to_bytes(value: object, what: str = "size") -> int:
    """Bytes of a size as vLLM reads it.

    Args:
        value: A whole number of bytes, or text: digits, or digits and one of k m g t (powers of 10^3, decimals allowed)
            or K M G T (powers of 2^10, no decimals). Blanks round the text are allowed.
        what: How the message names the value.

    Returns:
        Bytes, zero or more.

    Raises:
        ReapError: Anything else, negative numbers and True/False included; the message says what was given.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ReapError(
            f"{what} is {value!r} ({type(value).__name__}): give bytes as a whole number, or text like 14G or 512M"
        )
    if isinstance(value, int):
        if value < 0:
            raise ReapError(f"{what} is {value}: a size cannot be negative")
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        shown = value if len(value) <= 40 else value[:40] + "..."
        raise ReapError(
            f"{what} is {shown!r}, which is no size: give digits and at most one letter, G for 2^30 bytes or g for 10^9"
            " (K M G T are powers of two, k m g t powers of ten)"
        )
    whole, fraction, letter = match.groups()
    if letter in _DECIMAL:
        return int(float(whole + (fraction or "")) * _DECIMAL[letter])
    if fraction:
        hint = f"did you mean {whole}{fraction}{letter.lower()}?" if letter else "bytes are whole"
        raise ReapError(f"{what} is {value.strip()!r}: vLLM allows no decimals before {letter or 'nothing'}; {hint}")
    return int(whole) * (_BINARY[letter] if letter else 1)


def human_bytes(value: int) -> str:
    """The shortest text that `to_bytes` (and vLLM) reads back as exactly this number of bytes.

    15032385536 -> ``14G``, 6000000000 -> ``6g``, 1536 -> ``1536``.

    Raises:
        ReapError: Not a whole number, or negative.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ReapError(f"bytes are {value!r} ({type(value).__name__}): a whole number is wanted")
    if value < 0:
        raise ReapError(f"bytes are {value}: a size cannot be negative")
    candidates = [str(value)]
    # 2^53 is where a float stops holding every whole number, and the decimal letters go through one in vLLM.
    for letter, unit in {**_BINARY, **_DECIMAL}.items():
        if value and value % unit == 0 and (letter in _BINARY or value < 2**53):
            candidates.append(f"{value // unit}{letter}")
    return min(candidates, key=lambda text: (len(text), text))


def gib(value: float, digits: int = 2) -> str:
    """Bytes as GiB for a person: ``14.00 GiB``. Not for machines: it rounds."""
    return f"{value / GIB:.{digits}f} GiB"
