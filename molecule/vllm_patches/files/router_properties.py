"""Properties of the patched `fused_topk_bias` of the image this runs in, against a double-precision reference.

Run with the image's Python; Hypothesis lies in the folder given as PYTHONPATH. Prints the number of examples.
"""

import random
import sys

sys.path.append("/opt/reap/bin/reap")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.fused_moe.router import fused_topk_bias_router as router
from vllm.model_executor.layers.fused_moe.router import reap_router

from reap.patches.selftest import problem_of

PRUNED, SUPPORTED = (130, 144, 160, 180), (128, 192, 256, 320, 384, 512)
TOP_K, VOCABULARY, FIRST_IMAGE_TOKEN = 6, 64, 50
SPECIAL = (float("nan"), float("-inf"), 0.0, -100.0, 100.0, 1e-30)
examples = 0


@st.composite
def calls(draw):
    """One call of the router: few draws and a seed, because hundreds of drawn numbers teach Hypothesis nothing."""
    experts = draw(st.sampled_from(PRUNED + SUPPORTED))
    seed = random.Random(draw(st.integers(0, 2**32)))
    tokens = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(("plain", "ties", "zeros", "special")))
    values = {
        "plain": lambda: seed.gauss(0, 3),
        "ties": lambda: float(seed.randrange(-1, 2)),
        "zeros": lambda: float("-inf"),
        "special": lambda: seed.choice(SPECIAL) if seed.random() < 0.2 else seed.gauss(0, 3),
    }[kind]
    padding = [seed.random() < 0.3 for _ in range(tokens)] if draw(st.booleans()) else None
    # What stands in a padded row is whatever was there before: often no token id at all.
    nonsense = (-1, VOCABULARY, 2**31 - 1) if draw(st.booleans()) else tuple(range(VOCABULARY))
    token_ids = [
        seed.choice(nonsense) if padding and padding[number] else seed.randrange(VOCABULARY) for number in range(tokens)
    ]
    flat = kind in ("ties", "zeros") or draw(st.booleans())
    return {
        "experts": experts,
        "rows": [[values() for _ in range(experts)] for _ in range(tokens)],
        "bias": None if draw(st.booleans()) else [8.08 + (0.0 if flat else seed.gauss(0, 0.3)) for _ in range(experts)],
        "table": [seed.sample(range(experts), TOP_K) for _ in range(VOCABULARY)] if draw(st.booleans()) else None,
        "token_ids": token_ids,
        "padding": padding,
        "bias_vl": [seed.gauss(0, 0.3) for _ in range(experts)] if draw(st.booleans()) else None,
        "dtype": draw(st.sampled_from((torch.float32, torch.bfloat16))),
        "index": draw(st.sampled_from((torch.int32, torch.int64))),
        "ids": draw(st.sampled_from((torch.int32, torch.int64))),
        "renormalize": draw(st.booleans()),
        "scale": draw(st.sampled_from((1.0, 1.5, 2.5))),
    }


@settings(
    max_examples=int(sys.argv[1]),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(calls())
def equals_the_reference(call):
    global examples
    examples += 1
    logits = torch.tensor(call["rows"]).to(call["dtype"])
    bias = None if call["bias"] is None else torch.tensor(call["bias"])
    bias_vl = None if call["bias_vl"] is None else torch.tensor(call["bias_vl"])
    table = None if call["table"] is None else torch.tensor(call["table"], dtype=call["index"])
    padding = None if call["padding"] is None else torch.tensor(call["padding"])
    # The mask comes from the forward context of a running model; everything behind that look-up is the real thing.
    router._get_padding_mask = lambda tokens: padding
    weights, ids = router.fused_topk_bias(
        hidden_states=torch.zeros(len(call["rows"]), 4),
        gating_output=logits,
        scoring_func="sqrtsoftplus",
        e_score_correction_bias=bias,
        topk=TOP_K,
        renormalize=call["renormalize"],
        indices_type=call["ids"],
        input_tokens=torch.tensor(call["token_ids"], dtype=call["index"]),
        hash_indices_table=table,
        routed_scaling_factor=call["scale"],
        bias_vl=bias_vl,
        image_sentinel_lo=FIRST_IMAGE_TOKEN if bias_vl is not None else 0,
    )
    assert ids.dtype == call["ids"]
    assert weights.dtype == torch.float32
    bias_row = None if bias is None else bias.double().tolist()
    for number, row in enumerate(logits.double().tolist()):
        got_ids, got_weights = ids[number].tolist(), weights[number].double().tolist()
        if call["padding"] is not None and call["padding"][number]:
            assert got_ids == [-1] * TOP_K, got_ids
            assert got_weights == [0.0] * TOP_K, got_weights
            continue
        token = call["token_ids"][number]
        image = bias_vl is not None and FIRST_IMAGE_TOKEN <= token < FIRST_IMAGE_TOKEN + 5
        row_bias = bias_vl.double().tolist() if image else bias_row
        table_ids = call["table"][token] if call["table"] is not None and not image else None
        largest = max(1.0, *(abs(weight) for weight in got_weights))
        problem = problem_of(
            got_ids,
            got_weights,
            row,
            row_bias,
            table_ids,
            renormalize=call["renormalize"],
            scale=call["scale"],
            tolerance=1e-6 * largest,
            near_tie=4e-6 * largest,
        )
        assert problem is None, problem


equals_the_reference()
refused = {count for count, _ in reap_router._refused}
print(f"{examples} examples, replacement used for {sorted(refused)}")
assert refused >= set(PRUNED), refused
