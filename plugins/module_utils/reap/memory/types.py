"""Shapes of the memory ledger: what is asked, what a host has, what each term weighs, what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ..errors import ReapError
from ..sizes import to_bytes
from .host import HOST_MEMORY_FILE

Basis = Literal["measured", "derived", "estimated"]
Verdict = Literal["fits", "tight", "refuse"]
Question = Literal["profile", "start"]
Engine = Literal["gb10", "cpu"]

# Order of the ledger, and of the stack in the picture.
TERM_NAMES = ("weights_experts", "weights_other", "runtime_tables", "kv_cache", "cuda_graphs", "engine", "host")


@dataclass(frozen=True, slots=True)
class Term:
    """One line of the ledger. Bytes; low <= expected <= high, and all three are equal unless it is estimated.

    Attributes:
        name: One of `TERM_NAMES`.
        low: The least it may be.
        expected: The figure that is added up.
        high: The most it may be.
        basis: measured (read from files or from this host), derived (from a formula), estimated (from figures logged
            elsewhere).
        source: Where the figure comes from, for a person.
    """

    name: str
    low: int
    expected: int
    high: int
    basis: Basis
    source: str

    def to_dict(self) -> dict[str, Any]:
        """As in the module's result; `bytes` is the expected figure."""
        return {
            "name": self.name,
            "bytes": self.expected,
            "low_bytes": self.low,
            "high_bytes": self.high,
            "basis": self.basis,
            "source": self.source,
        }


def exact(name: str, value: int, basis: Basis, source: str) -> Term:
    """A term without a range."""
    return Term(name, value, value, value, basis, source)


@dataclass(frozen=True, slots=True)
class FitRequest:
    """What shall be served, and what shall stay free. One of model_dir, routed_experts and weights_bytes is needed.

    Attributes:
        kv_cache_memory: What vLLM gets as kv-cache-memory-bytes; a size by vLLM's rule or bytes.
        max_model_len: Tokens of context, prompt and answer together.
        max_num_batched_tokens: Tokens of one step; sets the size of a prefill's activations.
        watchdog_min_available_kb: The floor, kB of MemAvailable below which the watchdog stops the model.
        model_dir: Folder of the checkpoint on this host; its headers are summed where it holds weights.
        routed_experts: K, to predict a DeepSeek V4 Flash checkpoint that is not here (yet).
        weights_bytes: Bytes of the weights where neither can be had: a checkpoint of another kind before its download.
        max_num_seqs: Sequences served at once.
        mtp: Whether the checkpoint's own multi-token-prediction layer is loaded as the drafter.
        engine: gb10 (CUDA in the host's own memory) or cpu (the CPU build of vLLM).
        expected_routed_experts: What the profile says config.json must say; None where it says nothing.
        expandable_segments: Whether PyTorch's CUDA allocator runs with expandable_segments:True.
        gpu_memory_utilization: vLLM's share that must be free when its worker starts; None leaves it unjudged.
        profile: Name for messages.
        enforce: False turns a refusal into a warning; the verdict stays.
        host_memory_file: Where the gate remembers what the host uses without a model.
    """

    kv_cache_memory: int
    max_model_len: int
    max_num_batched_tokens: int
    watchdog_min_available_kb: int
    model_dir: str | None = None
    routed_experts: int | None = None
    weights_bytes: int | None = None
    max_num_seqs: int = 1
    mtp: bool = False
    engine: Engine = "gb10"
    expected_routed_experts: int | None = None
    expandable_segments: bool = True
    gpu_memory_utilization: float | None = None
    profile: str | None = None
    enforce: bool = True
    host_memory_file: str = str(HOST_MEMORY_FILE)

    @property
    def floor_bytes(self) -> int:
        """The floor in bytes; /proc/meminfo's kB are 1024 bytes."""
        return self.watchdog_min_available_kb * 1024

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> FitRequest:
        """A request from plain values, as they come from JSON, YAML or a module's arguments. None counts as not given.

        Raises:
            ReapError: A key that is unknown or missing, or a value out of its range; the message names the key and what
                was given.
        """
        known = {item.name for item in fields(cls)}
        given = {str(key): value for key, value in values.items() if value is not None}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ReapError(f"memory fit: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        needed = ("kv_cache_memory", "max_model_len", "max_num_batched_tokens", "watchdog_min_available_kb")
        for key in needed:
            if key not in given:
                raise ReapError(f"memory fit: {key} is missing")
        if not {"model_dir", "routed_experts", "weights_bytes"} & set(given):
            raise ReapError(
                "memory fit: nothing says how large the weights are: give model_dir, routed_experts or weights_bytes"
            )
        engine = given.get("engine", "gb10")
        if engine not in ("gb10", "cpu"):
            raise ReapError(f"memory fit: engine is {engine!r}; gb10 or cpu is wanted")
        kv_cache_memory = to_bytes(given["kv_cache_memory"], "kv_cache_memory")
        if kv_cache_memory == 0:
            raise ReapError("memory fit: kv_cache_memory is 0; give a size like 14G")
        utilization = given.get("gpu_memory_utilization")
        if utilization is not None:
            try:
                utilization = float(utilization)
            except (TypeError, ValueError) as error:
                raise ReapError(f"memory fit: gpu_memory_utilization is {utilization!r}; a number is wanted") from error
            if not 0 < utilization <= 1:
                raise ReapError(
                    f"memory fit: gpu_memory_utilization is {utilization}; more than 0 and at most 1 is wanted"
                )
        return cls(
            kv_cache_memory=kv_cache_memory,
            max_model_len=_whole(given, "max_model_len", 1),
            max_num_batched_tokens=_whole(given, "max_num_batched_tokens", 1),
            watchdog_min_available_kb=_whole(given, "watchdog_min_available_kb", 0),
            model_dir=_text(given, "model_dir"),
            routed_experts=_whole(given, "routed_experts", 1, 100_000) if "routed_experts" in given else None,
            weights_bytes=_positive_size(given, "weights_bytes") if "weights_bytes" in given else None,
            max_num_seqs=_whole(given, "max_num_seqs", 1) if "max_num_seqs" in given else 1,
            mtp=_yes(given, "mtp", False),
            engine=engine,
            expected_routed_experts=_whole(given, "expected_routed_experts", 1)
            if "expected_routed_experts" in given
            else None,
            expandable_segments=_yes(given, "expandable_segments", True),
            gpu_memory_utilization=utilization,
            profile=_text(given, "profile"),
            enforce=_yes(given, "enforce", True),
            host_memory_file=_text(given, "host_memory_file") or str(HOST_MEMORY_FILE),
        )


@dataclass(frozen=True, slots=True)
class KvFit:
    """What the KV cache holds. Figures are None, with a reason, where no accounting is known for the model.

    Attributes:
        accounting: Name of the accounting, with the range of vLLM releases it was checked against.
        tokens: Tokens at max_model_len as vLLM logs them ("GPU KV cache size").
        concurrency: Sequences of max_model_len as vLLM logs them ("Maximum concurrency").
        page_true_tokens: Tokens by the pages that admission really takes; lower than the logged figure.
        page_true_concurrency: The same as sequences.
        min_bytes: The least cache with which one sequence of max_model_len is admitted, whole pages.
        reason: Why the figures are None.
    """

    accounting: str | None
    tokens: int | None
    concurrency: float | None
    page_true_tokens: int | None
    page_true_concurrency: float | None
    min_bytes: int | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer. Bytes throughout; headroom is what stays above the floor, negative where nothing does.

    Attributes:
        question: profile ("does this fit this host") or start ("can this load begin now").
        verdict: fits, tight or refuse.
        ledger: The terms, in the order of `TERM_NAMES`.
        mem_total: MemTotal.
        mem_available: MemAvailable, None where it was not read.
        floor: The watchdog's floor.
        margin: What must stay above the floor at the high estimate for `fits`.
        headroom: With every term as expected.
        headroom_worst: With every term high.
        headroom_best: With every term low.
        kv: What the KV cache holds.
        weights_from: headers, prediction or given.
        advice: Sentences for a person.
        advice_data: The figures in them, for programs.
        message: The verdict in one line.
    """

    question: Question
    verdict: Verdict
    profile: str | None
    ledger: tuple[Term, ...]
    mem_total: int
    mem_available: int | None
    floor: int
    margin: int
    headroom: int
    headroom_worst: int
    headroom_best: int
    kv: KvFit
    weights_from: str
    message: str
    advice: tuple[str, ...] = ()
    advice_data: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether it may be loaded: fits or tight."""
        return self.verdict != "refuse"

    def to_dict(self) -> dict[str, Any]:
        """The result of the module and of ``reap fit --json``; see the module's RETURN."""
        kv = asdict(self.kv)
        return {
            "question": self.question,
            "profile": self.profile,
            "verdict": self.verdict,
            "fits": self.fits,
            "message": self.message,
            "ledger": [term.to_dict() for term in self.ledger],
            "mem_total_bytes": self.mem_total,
            "mem_available_bytes": self.mem_available,
            "floor_bytes": self.floor,
            "margin_bytes": self.margin,
            "headroom_bytes": self.headroom,
            "headroom_worst_bytes": self.headroom_worst,
            "headroom_best_bytes": self.headroom_best,
            "kv_tokens": kv["tokens"],
            "kv_concurrency": kv["concurrency"],
            "kv_page_true_tokens": kv["page_true_tokens"],
            "kv_page_true_concurrency": kv["page_true_concurrency"],
            "kv_min_bytes": kv["min_bytes"],
            "kv_accounting": kv["accounting"],
            "kv_reason": kv["reason"],
            "weights_from": self.weights_from,
            "advice": list(self.advice),
            "advice_data": dict(self.advice_data),
        }


def _whole(given: Mapping[str, Any], key: str, least: int, most: int = 2**62) -> int:
    value = given[key]
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value.strip()) <= 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ReapError(f"memory fit: {key} is {value!r}; a whole number is wanted")
    if not least <= value <= most:
        raise ReapError(
            f"memory fit: {key} is {value}; {'at least ' + str(least) if value < least else 'at most ' + str(most)} is"
            " wanted"
        )
    return int(value)


def _positive_size(given: Mapping[str, Any], key: str) -> int:
    value = to_bytes(given[key], key)
    if value == 0:
        raise ReapError(f"memory fit: {key} is 0; the weights of a model are more than that")
    return value


def _yes(given: Mapping[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise ReapError(f"memory fit: {key} is {value!r}; true or false is wanted")
    return value


def _text(given: Mapping[str, Any], key: str) -> str | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise ReapError(f"memory fit: {key} is {value!r}; text is wanted")
    return value
