"""What would fit: the figures an operator can turn, each computed with the same sums as the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ReapError
from ..sizes import GIB, MIB, gib, human_bytes
from .fit import Model, accounting_for, find_model, judge
from .host import HostMemory
from .terms import HOST, prefill
from .types import Fit, FitRequest, Question

# Spare room over the least that one sequence needs, before rounding up: the pool is shared with cached prefixes.
_SPARE = 1.05
_BATCHES = (2048, 4096, 8192)


def advised_fit(
    request: FitRequest,
    host: HostMemory,
    question: Question = "profile",
    profiles: Mapping[str, Mapping[str, Any]] | None = None,
) -> Fit:
    """memory_fit with its advice.

    Args:
        request: What shall be served.
        host: What the host has.
        question: See reap.memory.fit.memory_fit.
        profiles: The profiles as data, name -> profile; those for the same kind of engine are judged on this host too.

    Raises:
        ReapError: As memory_fit, or a profile that lacks what a judgement needs.
    """
    model = find_model(request, question)
    fit = judge(request, model, host, question)
    data: dict[str, Any] = {}
    lines: list[str] = []
    lines += _kv_advice(request, model, host, question, fit, data)
    lines += _batch_advice(request, model, fit, data)
    lines += _allocator_advice(request)
    lines += _host_advice(request, host, fit, data)
    lines += _floor_advice(request, fit, data)
    lines += _start_advice(request, host, question)
    lines += _profile_advice(request, host, profiles or {}, data)
    return replace(fit, advice=tuple(lines), advice_data=data)


def suggested_kv(least: int, most: int) -> int | None:
    """A cache size to write into a profile: the least that is needed and 5 %, rounded up to whole GiB (whole MiB below
    1 GiB).

    None where `most`, the largest that fits, is less than `least`.
    """
    if least > most:
        return None
    unit = GIB if least >= GIB else MIB
    rounded = -(-int(least * _SPARE) // unit) * unit
    return rounded if rounded <= most else least


def request_from_profile(name: str, profile: Mapping[str, Any], **more: Any) -> FitRequest:
    """The request that a profile makes, as it stands in group_vars/all/profiles.yml.

    Args:
        name: The profile's name.
        profile: The profile.
        **more: Further keys of FitRequest, for example model_dir.

    Raises:
        ReapError: The profile lacks a key or has a value out of its range.
    """
    expect = profile.get("model_expect") or {}
    experts = expect.get("n_routed_experts") if isinstance(expect, Mapping) else None
    hardware = profile.get("hardware", "spark")
    if hardware not in ("spark", "sim"):
        raise ReapError(f"profile {name}: hardware is {hardware!r}; spark or sim is wanted")
    wanted = {
        "profile": name,
        "kv_cache_memory": profile.get("kv_cache_memory"),
        "max_model_len": profile.get("max_model_len"),
        "max_num_batched_tokens": profile.get("max_num_batched_tokens"),
        "max_num_seqs": profile.get("max_num_seqs"),
        "watchdog_min_available_kb": profile.get("watchdog_min_available_kb"),
        "gpu_memory_utilization": profile.get("gpu_memory_utilization"),
        "mtp": bool(profile.get("speculative")),
        "engine": "gb10" if hardware == "spark" else "cpu",
        "expected_routed_experts": experts,
        "routed_experts": experts,
        "weights_bytes": profile.get("model_bytes") if experts is None else None,
        **more,
    }
    try:
        return FitRequest.from_mapping(wanted)
    except ReapError as error:
        raise ReapError(f"profile {name}: {error}") from error


def _kv_advice(
    request: FitRequest, model: Model, host: HostMemory, question: Question, fit: Fit, data: dict[str, Any]
) -> list[str]:
    most_fit = request.kv_cache_memory + fit.headroom_worst - fit.margin
    most_tight = request.kv_cache_memory + fit.headroom
    data["kv_max_fit_bytes"] = max(most_fit, 0)
    data["kv_max_tight_bytes"] = max(most_tight, 0)
    lines: list[str] = []
    if most_fit > 0:
        lines.append(
            f"The largest kv_cache_memory that fits with its margin here is {_shown(most_fit)}; up to"
            f" {_shown(most_tight)} is tight."
        )
    elif most_tight > 0:
        lines.append(f"No kv_cache_memory fits with its margin here; up to {_shown(most_tight)} is tight.")
    else:
        lines.append(f"No kv_cache_memory fits here: without any, {gib(-most_tight)} are missing.")
    accounting = accounting_for(request, model)
    least = fit.kv.min_bytes
    if accounting is None or least is None:
        lines.append(fit.kv.reason or "")
        return lines
    together = accounting.min_bytes(request.max_model_len, request.max_num_batched_tokens, request.max_num_seqs)
    data["kv_min_bytes"] = least
    data["kv_min_all_sequences_bytes"] = together
    lines.append(
        f"One sequence of {request.max_model_len} tokens at {request.max_num_batched_tokens} batched tokens is"
        " admitted from"
        f" {least} bytes ({gib(least)}) on, counted in whole pages ({fit.kv.accounting})."
    )
    if request.max_num_seqs > 1:
        lines.append(f"For {request.max_num_seqs} such sequences at once it takes {together} bytes ({gib(together)}).")
    suggested = suggested_kv(together, max(most_fit, 0)) or suggested_kv(together, max(most_tight, 0))
    if suggested is None:
        lines.append(
            "Not even that fits here above the floor: take a smaller model, fewer batched tokens or a shorter context."
        )
        return lines
    data["kv_suggested"] = human_bytes(suggested)
    data["kv_suggested_bytes"] = suggested
    if request.kv_cache_memory >= 2 * together and suggested < request.kv_cache_memory:
        better = judge(replace(request, kv_cache_memory=suggested), model, host, question)
        freed = request.kv_cache_memory - suggested
        sequences = "one sequence" if request.max_num_seqs == 1 else f"{request.max_num_seqs} sequences"
        lines.append(
            f"kv_cache_memory reserves {gib(request.kv_cache_memory)} for {sequences} needing {gib(together)}:"
            f" {human_bytes(suggested)} would free {gib(freed)} and give the verdict {better.verdict}"
            f" ({gib(better.headroom)} above the floor as expected). Fewer prefixes of earlier requests would stay"
            " cached."
        )
        data["kv_suggested_verdict"] = better.verdict
        data["kv_is_what_makes_it_thin"] = fit.verdict != "fits" and better.verdict == "fits"
        if data["kv_is_what_makes_it_thin"]:
            lines.append(
                f"This reservation is what makes the margin thin: nothing else needs to change for {better.verdict}."
            )
    return lines


def _batch_advice(request: FitRequest, model: Model, fit: Fit, data: dict[str, Any]) -> list[str]:
    accounting = accounting_for(request, model)
    if request.engine != "gb10" or accounting is None:
        return []
    lines = []
    now_prompt = _prompt(request, request.max_num_batched_tokens)
    now_least = accounting.min_bytes(request.max_model_len, request.max_num_batched_tokens)
    data["batched_tokens"] = {}
    for batched in _BATCHES:
        if batched == request.max_num_batched_tokens or batched > request.max_model_len:
            continue
        least = accounting.min_bytes(request.max_model_len, batched)
        prompt = _prompt(request, batched)
        data["batched_tokens"][str(batched)] = {"kv_min_bytes": least, "prefill_bytes": round(prompt * GIB)}
        less = batched < request.max_num_batched_tokens
        lines.append(
            f"max_num_batched_tokens {batched} would need {gib(abs(now_least - least))} {'less' if less else 'more'}"
            " KV cache for one sequence and"
            f" hold about {abs(now_prompt - prompt):.2f} GiB {'less' if less else 'more'} after a long prompt; prefill"
            f" gets {'slower' if less else 'faster'}."
        )
    return lines


def _prompt(request: FitRequest, batched: int) -> float:
    return prefill(min(batched, request.max_model_len), request.mtp, request.expandable_segments).expected


def _allocator_advice(request: FitRequest) -> list[str]:
    if request.engine != "gb10" or request.expandable_segments:
        return []
    batched = min(request.max_num_batched_tokens, request.max_model_len)
    gain = prefill(batched, request.mtp, False).expected - prefill(batched, request.mtp, True).expected
    return [
        f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is expected to hold about {gain:.1f} GiB less after a long"
        " prompt."
    ]


def _host_advice(request: FitRequest, host: HostMemory, fit: Fit, data: dict[str, Any]) -> list[str]:
    term = fit.ledger[-1]
    lines = []
    if request.engine == "gb10":
        usual = round(HOST.expected * GIB)
        spare = term.expected - usual
        data["host_above_usual_bytes"] = max(spare, 0)
        if term.basis == "measured" and spare > GIB:
            lines.append(
                f"The host uses {gib(term.expected)} besides the model, a Spark without a desktop about {gib(usual)}:"
                " stopping the desktop session"
                f" (systemctl isolate multi-user.target) and other programs could give back up to {gib(spare)}."
            )
        elif term.basis == "estimated":
            lines.append(
                f"What the host itself uses is estimated at {gib(term.low)} to {gib(term.high)}; a desktop session"
                " takes up to 10 GB more."
                " Measure it by running this while no model is loaded."
            )
    if host.swap_total:
        lines.append(f"Swap ({gib(host.swap_total)}) is not counted: a Spark that swaps under a model freezes.")
    return lines


def _floor_advice(request: FitRequest, fit: Fit, data: dict[str, Any]) -> list[str]:
    reach = fit.headroom_worst - fit.margin if fit.verdict == "fits" else fit.headroom
    highest = (request.floor_bytes + reach) // 1024
    data["floor_max_kb"] = max(highest, 0)
    if fit.verdict == "refuse":
        if fit.headroom >= 0:
            return []
        if highest <= 0:
            return ["No floor would let it fit."]
        return [
            f"It would only pass with the floor at {highest} kB or lower. A lower floor gives the watchdog less time"
            " and does not make the model smaller:"
            " prefer less KV cache."
        ]
    return [
        f"The floor could be raised to {highest} kB ({gib(highest * 1024)}) and the verdict would still be"
        f" {fit.verdict}."
    ]


def _start_advice(request: FitRequest, host: HostMemory, question: Question) -> list[str]:
    lines = []
    if question == "start" and host.page_cache is not None and host.free is not None and host.page_cache > 2 * GIB:
        lines.append(
            f"{gib(host.page_cache)} of MemAvailable is page cache, which CUDA on GB10 does not get back by itself:"
            " drop it before loading"
            " (sync; echo 1 > /proc/sys/vm/drop_caches)."
        )
    if (
        request.engine == "gb10"
        and request.gpu_memory_utilization is not None
        and host.available is not None
        and not host.model_loaded
    ):
        wanted = round(request.gpu_memory_utilization * host.total)
        if host.available < wanted:
            lines.append(
                f"vLLM itself will not start: gpu_memory_utilization {request.gpu_memory_utilization} asks for"
                f" {gib(wanted)} free at start,"
                f" MemAvailable is {gib(host.available)}."
            )
    return lines


def _profile_advice(
    request: FitRequest, host: HostMemory, profiles: Mapping[str, Mapping[str, Any]], data: dict[str, Any]
) -> list[str]:
    verdicts: dict[str, str] = {}
    for name, profile in profiles.items():
        if name == request.profile or not isinstance(profile, Mapping):
            continue
        other = request_from_profile(name, profile)
        if other.engine == request.engine:
            # Judged by prediction: the other profile's files are most likely not on this host.
            verdicts[name] = judge(other, find_model(replace(other, model_dir=None)), host).verdict
    data["profiles"] = verdicts
    if not verdicts:
        return []
    parts = [
        f"{verdict}: {', '.join(sorted(names))}"
        for verdict in ("fits", "tight", "refuse")
        if (names := [n for n, v in verdicts.items() if v == verdict])
    ]
    return [f"Other profiles on this host: {'; '.join(parts)}."]


def _shown(value: int) -> str:
    unit = GIB if value >= GIB else MIB
    return f"{human_bytes(value // unit * unit)} ({gib(value)})"
