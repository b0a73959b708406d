"""The terms that no file tells: tables made at load, CUDA graphs, the engine, and the host itself.

Figures marked GB10 were logged on spark-2822 (27 May 2026), those marked H200 by vLLM 0.22.0 with the same geometry, KV
cache and batch on one H200 (its "model loading took" and KV figures agree with GB10's to 0.1 GiB and to the token).
What neither tells is an estimate with a range.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ReapError
from ..sizes import GIB
from .config import DeepSeekV4
from .host import HostMemory
from .types import Engine, FitRequest, Question, Term, exact


@dataclass(frozen=True, slots=True)
class Range:
    """An estimate, GiB."""

    low: float
    expected: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.expected + other.expected, self.high + other.high)


# "loading took" less file bytes less the two RoPE tables: 0.14 (GB10, K160 + MTP), 0.20 (H200, the same), 0.33 (H200,
# K144).
LOAD_REMAINDER = Range(0.14, 0.20, 0.33)

# GB10, K160 + MTP2, one sequence: 1.15 to 1.66. (The H200 took 0.20: graphs are the one figure in which the two
# differ.)
GRAPHS = Range(1.15, 1.40, 1.66)

# H200, K144, when ready: 101.07 allocated against 100.32 of weights, KV and graphs; 101.70 reserved.
READY = Range(0.75, 0.79, 1.38)

# vLLM's processes and the CUDA context. With HOST below it makes 6.7, because GB10 logged 114.01 GiB free when the
# worker began and MemTotal is 119.7 to 121.7 GiB: 5.7 to 7.7 were taken by then. How the sum splits is not known.
PROCESSES = Range(2.0, 3.0, 4.0)
HOST = Range(2.7, 3.7, 4.7)

# H200, one prompt of 186,390 tokens, above ready; a prompt of 300 tokens took 0.07. (batched tokens, allocated GiB,
# reserved GiB)
SHORT_PROMPT = (300, 0.07)
PREFILL = {False: (8192, 2.01, 5.8), True: (4096, 1.2, 9.8)}

# How much of the slack between reserved and allocated stays with expandable segments, as a share. The H200 ran without
# them (share 1). On GB10 the validated profiles run with them, and K160 + MTP2 kept its prompt above its floor: 0.18 at
# most. Between 0.03 and 0.10 every outcome known from GB10 comes out for every MemTotal from 119.7 to 121.7 GiB; this
# is the middle. An H200 with them kept 0.30 of K144's slack (docs/evidence/2026-11-24-h200-full): with that, the K144
# that GB10 served would be refused, so it is not used, and lies below the high estimate.
EXPANDABLE_SHARE = 0.06

# The CPU build of vLLM, three processes, without weights and KV cache; 1.5 GB in all were seen with a KV cache of 1G,
# more on other machines.
CPU_ENGINE = Range(0.4, 1.2, 2.5)

# What must stay above the floor at the high estimate: GB10s were seen to lose 14 GiB/s, and a watchdog that looks every
# 50 ms needs this much.
MARGIN = GIB


def runtime_tables(config: DeepSeekV4 | None) -> Term:
    """What loading makes besides the files' tensors: two fp32 RoPE tables (one of each kind of layer), and a rest that
    was logged."""
    if config is None:
        return exact("runtime_tables", 0, "estimated", "part of the engine's estimate for this model")
    tables = 2 * config.max_position_embeddings * config.qk_rope_head_dim * 4
    source = (
        f"2 RoPE tables x {config.max_position_embeddings} x {config.qk_rope_head_dim} x 4 B,"
        " and 0.14 to 0.33 GiB that loading logged above them"
    )
    return _term("runtime_tables", LOAD_REMAINDER, source, plus=tables)


def cuda_graphs(engine: Engine) -> Term:
    """CUDA graphs captured at start."""
    if engine == "cpu":
        return exact("cuda_graphs", 0, "derived", "the CPU build captures none")
    return _term("cuda_graphs", GRAPHS, "logged on GB10 with K160, MTP2 and one sequence: 1.15 to 1.66 GiB")


def prefill(batched: int, mtp: bool, expandable: bool) -> Range:
    """What a long prompt leaves held above the state when ready, GiB.

    Args:
        batched: Tokens of one step (max_num_batched_tokens, no more than the context).
        mtp: Whether the drafter runs.
        expandable: Whether PyTorch's allocator uses expandable segments.

    Returns:
        low: what is really allocated at the peak. high: what the default allocator keeps reserved. Both measured at one
            step size each,
        and taken as linear in it: through the short prompt for the peak, through zero for the reserve.
    """
    at, allocated, reserved = PREFILL[mtp]
    short, least = SHORT_PROMPT
    peak = (
        least * batched / short if batched <= short else least + (allocated - least) * (batched - short) / (at - short)
    )
    kept = max(reserved * batched / at, peak)
    return Range(peak, peak + (EXPANDABLE_SHARE if expandable else 1.0) * (kept - peak), kept)


def engine_term(request: FitRequest) -> Term:
    """vLLM's own processes, the CUDA context, work space, and what a prompt of the whole context leaves held."""
    if request.engine == "cpu":
        return _term(
            "engine", CPU_ENGINE, "the CPU build of vLLM, three processes: 0.4 to 2.5 GiB without weights and KV cache"
        )
    batched = min(request.max_num_batched_tokens, request.max_model_len)
    prompt = prefill(batched, request.mtp, request.expandable_segments)
    source = (
        f"processes and CUDA context {PROCESSES.expected:.1f}, work space {READY.expected:.2f},"
        f" held after a long prompt at {batched} batched tokens {prompt.expected:.2f} GiB"
        f" ({prompt.low:.2f} allocated, {prompt.high:.2f} with the default allocator; scaled from figures of an H200)"
    )
    return _term("engine", PROCESSES + READY + prompt, source)


def host_term(host: HostMemory, question: Question, engine: Engine, model_bytes: int) -> Term:
    """What the host uses besides the model, kernel reserve included; see reap.memory.host.

    For a start it is what is gone now. For a profile it is that too while no model is loaded; while one is, what was
    gone before the last start; failing both, the estimate for a Spark without a desktop session (on another machine:
    what is gone less `model_bytes`, the expected bytes of the other terms).

    Raises:
        ReapError: A start is judged and MemAvailable is not known.
    """
    if question == "start" and host.available is None:
        raise ReapError(
            "MemAvailable is not known, so a start cannot be judged: give mem_available_kb, or run on the host itself"
        )
    if host.available is not None and (question == "start" or not host.model_loaded):
        return exact(
            "host",
            host.total - host.available,
            "measured",
            "MemTotal - MemAvailable now, kernel reserve included, page cache not",
        )
    if host.remembered is not None:
        return exact("host", host.remembered, "measured", "MemTotal - MemAvailable when the model was last started")
    if engine == "cpu":
        # No figure of a Spark says anything about the machine under a simulated one.
        if host.available is None:
            return exact(
                "host", 0, "estimated", "MemAvailable is not known, and no figure is known for this kind of host"
            )
        gone = host.total - host.available
        return exact(
            "host",
            max(gone - model_bytes, 0),
            "estimated",
            "MemTotal - MemAvailable now, less what the loaded model is reckoned to take",
        )
    return _term(
        "host", HOST, "a Spark without a desktop session: 114.01 GiB were free on spark-2822 when vLLM's worker began"
    )


def _term(name: str, estimate: Range, source: str, plus: int = 0) -> Term:
    low, expected, high = (plus + round(value * GIB) for value in (estimate.low, estimate.expected, estimate.high))
    return Term(name, low, expected, high, "estimated", source)
