"""From what was found to one word, and the sentences behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .session import TaskResult

PASSED, SLOWER, FAILED, COULD_NOT_RUN = "passed", "passed-slower", "failed", "could-not-run"
# Only these prove a generation.
PASSING = (PASSED, SLOWER)

# A measured prompt may be this much shorter or longer than the published one and still be compared with it.
COMPARABLE_LENGTH = 0.02


def compare(
    measured: Mapping[str, float | None], reference: Mapping[str, Any], slower_below: float, fail_below: float
) -> list[dict[str, Any]]:
    """Measured figures beside the published ones.

    Args:
        measured: ttft_s, prefill_tok_s, decode_tok_s; None where it was not measured.
        slower_below, fail_below: shares of the published speed. TTFT is compared the other way round, as a speed.

    Returns:
        One entry for each figure that both have: name, unit, found, reference, speed (share of the published one,
        higher is faster) and state (same, faster, slower, too-slow).
    """
    rows = []
    for name, unit in (("ttft_s", "s"), ("prefill_tok_s", "tokens/s"), ("decode_tok_s", "tokens/s")):
        found, wanted = measured.get(name), reference.get(name)
        if not found or not wanted:
            continue
        speed = wanted / found if name == "ttft_s" else found / wanted
        state = (
            "too-slow" if speed < fail_below
            else "slower" if speed < slower_below
            else "faster" if speed > 1 / slower_below
            else "same"
        )  # fmt: skip
        rows.append(
            {"name": name, "unit": unit, "found": found, "reference": wanted, "speed": round(speed, 4), "state": state}
        )
    return rows


def headline(verdict: str, comparison: Sequence[Mapping[str, Any]]) -> str:
    """The verdict, and by how much what is slower is slower."""
    names = {"ttft_s": ("TTFT", "s"), "prefill_tok_s": ("prefill", "tok/s"), "decode_tok_s": ("decode", "tok/s")}
    slow = [row for row in comparison if row["state"] in ("slower", "too-slow")]
    said = "; ".join(
        "{} {:.1f} {}, {:.0f} % of published".format(names[row["name"]][0], row["found"], names[row["name"]][1],
                                                     100 * row["speed"])
        for row in slow
    )  # fmt: skip
    return f"{verdict} ({said})" if said else verdict


def comparable(prompt_tokens: int | None, reference: Mapping[str, Any] | None, simulated: bool) -> str | None:
    """Why figures are not compared with the reference; None when they are."""
    if reference is None:
        return "the profile has no published figures"
    if simulated:
        return "these are the figures of a simulated Spark: they say nothing about a Spark's speed"
    wanted = reference.get("prompt_tokens")
    if prompt_tokens is None or not wanted:
        return "no long prompt was measured"
    if abs(prompt_tokens - wanted) > COMPARABLE_LENGTH * wanted:
        return f"the measured prompt has {prompt_tokens:,} tokens, the published one {wanted:,}"
    return None


def judge(
    results: Sequence[TaskResult],
    comparison: Sequence[Mapping[str, Any]],
    memory: Mapping[str, Any] | None,
    fail_below: float,
) -> tuple[str, list[str]]:
    """The verdict and a sentence for each failure. Only expected tasks decide; one that did not run has failed."""
    failures = []
    for result in results:
        if not result.expected or result.passed:
            continue
        if not result.ran:
            failures.append(f"{result.name}: did not run ({result.note or 'an earlier failure ended the run'})")
        failures += [f"{result.name}: {c.name}: found {c.found}, wanted {c.wanted}" for c in result.failed_checks]
        if result.ran and not result.checks:
            failures.append(f"{result.name}: nothing was checked")
    for row in comparison:
        if row["state"] == "too-slow":
            unit = row["unit"]
            failures.append(
                f"{row['name']}: found {row['found']:.4g} {unit}, published {row['reference']:.4g} {unit}: "
                f"{row['speed']:.0%} of the published speed, wanted at least {fail_below:.0%}"
            )
    distance = memory.get("distance_to_floor_kb") if memory else None
    if distance is not None and distance < 0:
        assert memory is not None
        failures.append(
            f"memory: MemAvailable fell to {memory['min_kb']} kB during {memory['min_phase']}, "
            f"below the floor of {memory['floor_kb']} kB"
        )
    if failures:
        return FAILED, failures
    return (SLOWER if any(row["state"] == "slower" for row in comparison) else PASSED), []
