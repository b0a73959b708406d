"""The ledger as plain text, for a terminal and for the journal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from ..errors import ReapError
from ..sizes import GIB

LABELS = {
    "weights_experts": "weights, routed experts",
    "weights_other": "weights, everything else",
    "runtime_tables": "tables made at load",
    "kv_cache": "KV cache",
    "cuda_graphs": "CUDA graphs",
    "engine": "engine and activations",
    "host": "the host itself",
}


def ledger_table(fit: Mapping[str, Any], width: int = 100, advice: bool = True) -> str:
    """The ledger of a result of memory_fit.

    Args:
        fit: `Fit.to_dict()`, or what the module returned.
        width: Columns to wrap sentences at; the table itself takes 72.
        advice: Whether the advice follows.

    Returns:
        Lines of ASCII without trailing blanks; figures in GiB.

    Raises:
        ReapError: It is no such result.
    """
    try:
        rows = [
            (
                LABELS.get(str(term["name"]), str(term["name"])),
                int(term["bytes"]),
                int(term["low_bytes"]),
                int(term["high_bytes"]),
                str(term["basis"]),
            )
            for term in fit["ledger"]
        ]
        total, floor = int(fit["mem_total_bytes"]), int(fit["floor_bytes"])
        headroom = [int(fit[key]) for key in ("headroom_bytes", "headroom_best_bytes", "headroom_worst_bytes")]
        message, sentences = str(fit["message"]), [str(line) for line in fit.get("advice", [])]
    except (KeyError, TypeError, ValueError) as error:
        raise ReapError(f"no result of memory_fit: {error!r}") from error
    lines = [f"{'':26}{'expected':>10}{'low':>9}{'high':>9}   basis", "-" * 72]
    for label, expected, low, high, basis in rows:
        span = f"{_g(low):>9}{_g(high):>9}" if low != high else " " * 18
        lines.append(f"{label:<26}{_g(expected):>10}{span}   {basis}")
    lines.append("-" * 72)
    expected, low, high = (sum(column) for column in zip(*(row[1:4] for row in rows), strict=True))
    lines.append(f"{'sum':<26}{_g(expected):>10}{_g(low):>9}{_g(high):>9}   GiB")
    lines.append(f"{'floor of the watchdog':<26}{_g(floor):>10}")
    lines.append(f"{'MemTotal':<26}{_g(total):>10}")
    # The best case belongs to the low sum, so it stands in the low column.
    lines.append(f"{'left above the floor':<26}{_g(headroom[0]):>10}{_g(headroom[1]):>9}{_g(headroom[2]):>9}")
    lines = [line.rstrip() for line in lines]
    lines += textwrap.wrap(message, width, break_long_words=False, break_on_hyphens=False)
    if fit.get("kv_tokens") is not None:
        lines += textwrap.wrap(
            f"KV cache: {fit['kv_tokens']:,} tokens, {fit['kv_concurrency']:.2f}x as vLLM logs it;"
            f" {fit['kv_page_true_tokens']:,} tokens, {fit['kv_page_true_concurrency']:.2f}x by whole pages.",
            width,
        )
    if advice:
        for line in sentences:
            lines += textwrap.wrap(
                line, width, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
    return "\n".join(lines) + "\n"


def _g(value: int) -> str:
    return f"{value / GIB:.2f}"
