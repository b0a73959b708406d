"""Rates of one request, and what repeated measurements say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from .client import Reply


@dataclass
class Rates:
    """Rates of one streamed request.

    prefill = prompt tokens / TTFT and decode = (completion tokens - 1) / (last - first token), the definitions of the
    published figures. The last token is the one that ends the answer: it is counted but has no text, and comes with the
    last event of the choice. `decode_tok_s` is None where fewer than two tokens or no time lie between first and last.
    """

    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rates(reply: Reply) -> Rates | None:
    """The rates of a streamed reply, or None when it carries no token or no usage."""
    first, last = reply.first_token_s, reply.last_chunk_s
    if first is None or last is None or reply.usage is None or first <= 0:
        return None
    completion = reply.usage.completion
    span = last - first
    decode = (completion - 1) / span if completion > 1 and span > 0 else None
    return Rates(reply.usage.prompt, completion, first, reply.usage.prompt / first, decode, reply.end_s)


@dataclass
class Spread:
    """Median, extremes and count; `relative` is (largest - smallest) / median."""

    values: list[float]
    median: float
    smallest: float
    largest: float
    relative: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spread(values: Sequence[float]) -> Spread | None:
    """None for no values."""
    if not values:
        return None
    middle = median(values)
    low, high = min(values), max(values)
    return Spread(list(values), middle, low, high, (high - low) / middle if middle else 0.0)
