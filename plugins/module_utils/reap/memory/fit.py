"""Does it fit: the terms added up against MemTotal and the floor, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ReapError
from ..safetensors import has_weights
from ..sizes import gib
from .config import DeepSeekV4, flash, read_config
from .host import HostMemory
from .kv import Accounting, accounting_of, kv_fit
from .terms import MARGIN, cuda_graphs, engine_term, host_term, runtime_tables
from .types import Basis, Fit, FitRequest, KvFit, Question, Term, Verdict, exact
from .weights import from_headers, predict


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of the weights.

    Attributes:
        experts: Bytes of the routed experts that are loaded.
        other: Bytes of everything else that is loaded.
        deepseek: The geometry, where the model is a DeepSeek V4.
        model_type: For messages.
        source: headers, prediction or given.
        basis: measured, derived or estimated.
        detail: Where the bytes come from, for a person.
    """

    experts: int
    other: int
    deepseek: DeepSeekV4 | None
    model_type: str
    source: str
    basis: Basis
    detail: str


def memory_fit(request: FitRequest, host: HostMemory, question: Question = "profile") -> Fit:
    """Whether what is asked fits the host, without advice (see reap.memory.advice).

    Two questions can be put. `profile`: does this profile fit this host. It is judged on MemTotal less what the host
    itself uses, so that a host which already serves the model gets the same answer as before it did. `start`: can this
    load begin now. It is judged on MemAvailable.

    Raises:
        ReapError: The checkpoint or a figure of the host cannot be read or is wrong.
    """
    return judge(request, find_model(request, question), host, question)


def find_model(request: FitRequest, question: Question = "profile") -> Model:
    """The weights, from the best source at hand: the headers, else K, else the bytes given.

    Raises:
        ReapError: A checkpoint that is damaged or of another model than asked; for a start, a checkpoint that is not
            there.
    """
    if request.model_dir is not None:
        folder = Path(request.model_dir)
        if has_weights(folder):
            return _measured(request, folder)
        if question == "start":
            raise ReapError(
                f"{folder} holds no weights, so nothing can be loaded: run the playbook's model_fetch first"
            )
    experts = request.routed_experts or request.expected_routed_experts
    if experts is not None:
        config = flash(experts)
        weights = predict(config)
        loaded = weights.loaded(request.mtp)
        drafter = " and its MTP layer" if request.mtp else ""
        detail = f"predicted for DeepSeek V4 Flash with K = {experts}{drafter}; no checkpoint was read"
        return Model(*loaded, config, "deepseek_v4", "prediction", "derived", detail)
    if request.weights_bytes is not None:
        return Model(
            0,
            request.weights_bytes,
            None,
            "this",
            "given",
            "estimated",
            "bytes of the files as the profile gives them; no checkpoint was read",
        )
    raise ReapError(
        f"{request.model_dir} holds no weights: download the model first, or give routed_experts or weights_bytes to"
        " predict"
    )


def judge(request: FitRequest, model: Model, host: HostMemory, question: Question = "profile") -> Fit:
    """Add up and judge. A pure function of its arguments."""
    kv_detail = "reserved whole at start, as given" if request.engine == "gb10" else "touched whole at start, as given"
    terms = [
        exact("weights_experts", model.experts, model.basis, model.detail),
        exact("weights_other", model.other, model.basis, model.detail),
        runtime_tables(model.deepseek),
        exact("kv_cache", request.kv_cache_memory, "derived", kv_detail),
        cuda_graphs(request.engine),
        engine_term(request),
    ]
    terms.append(host_term(host, question, request.engine, sum(term.expected for term in terms)))
    above = host.total - request.floor_bytes
    headroom = above - sum(term.expected for term in terms)
    worst = above - sum(term.high for term in terms)
    best = above - sum(term.low for term in terms)
    accounting = accounting_for(request, model)
    kv = kv_fit(
        accounting, model.model_type, request.kv_cache_memory, request.max_model_len, request.max_num_batched_tokens
    )
    verdict = _verdict(request, kv, headroom, worst)
    return Fit(
        question=question,
        verdict=verdict,
        profile=request.profile,
        ledger=tuple(terms),
        mem_total=host.total,
        mem_available=host.available,
        floor=request.floor_bytes,
        margin=MARGIN,
        headroom=headroom,
        headroom_worst=worst,
        headroom_best=best,
        kv=kv,
        weights_from=model.source,
        message=_message(request, host, question, verdict, terms, headroom, worst, kv),
    )


def accounting_for(request: FitRequest, model: Model) -> Accounting | None:
    """The KV accounting that holds for the model under this engine, or None."""
    return accounting_of(model.deepseek, request.mtp) if model.deepseek is not None else None


def _measured(request: FitRequest, folder: Path) -> Model:
    config = read_config(folder)
    for what, wanted in (
        ("expected_routed_experts", request.expected_routed_experts),
        ("routed_experts", request.routed_experts),
    ):
        if wanted is not None and config.routed_experts != wanted:
            found = (
                "no n_routed_experts" if config.routed_experts is None else f"n_routed_experts {config.routed_experts}"
            )
            raise ReapError(
                f"{folder}/config.json has {found}, but {what} is {wanted}: another model lies there than the profile"
                " wants"
            )
    weights = from_headers(folder, config, request.mtp)
    detail = f"summed from the headers of {weights.tensors} tensors in {folder}"
    return Model(*weights.loaded(request.mtp), config.deepseek, config.model_type, "headers", "measured", detail)


def _verdict(request: FitRequest, kv: KvFit, headroom: int, worst: int) -> Verdict:
    if headroom < 0 or (kv.min_bytes is not None and request.kv_cache_memory < kv.min_bytes):
        return "refuse"
    return "fits" if worst >= MARGIN else "tight"


def _message(
    request: FitRequest,
    host: HostMemory,
    question: Question,
    verdict: Verdict,
    terms: list[Term],
    headroom: int,
    worst: int,
    kv: KvFit,
) -> str:
    name = f"profile {request.profile}" if request.profile else "this profile"
    floor = gib(request.floor_bytes)
    if headroom < 0:
        load = sum(term.expected for term in terms if term.name != "host")
        if question == "start":
            have = f"MemAvailable is {gib(host.available or 0)}"
        else:
            have = f"the host has {gib(host.total)} and uses {gib(terms[-1].expected)} of it itself"
        return (
            f"refuse: {name} is short by {gib(-headroom)}: it takes {gib(load)} and must leave the watchdog's floor of"
            f" {floor} free, but {have}"
        )
    if verdict == "refuse" and kv.min_bytes is not None:
        return (
            f"refuse: {name} is short by {gib(kv.min_bytes - request.kv_cache_memory)} of KV cache: one sequence of"
            f" {request.max_model_len} tokens needs {gib(kv.min_bytes)}, kv_cache_memory is"
            f" {gib(request.kv_cache_memory)}; give at least {kv.min_bytes} bytes"
        )
    at_worst = f"{gib(worst)} above it" if worst >= 0 else f"{gib(-worst)} below it"
    text = f"{name} leaves {gib(headroom)} above the floor of {floor} as expected, at worst {at_worst}"
    return f"{verdict}: {text}"
