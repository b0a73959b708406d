"""A vLLM plugin that routes 144 experts in whatever process loads it, and writes down what came of it.

vLLM loads its general plugins in the API server, in the engine and in every worker.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

OUT = Path("/probe-out")


def register() -> None:
    """Entry point of the group vllm.general_plugins."""
    done = OUT / f"{os.getpid()}.json"
    if done.exists():
        return
    sys.path.append("/opt/reap/bin/reap")
    import torch
    from vllm.model_executor.layers.fused_moe.router import fused_topk_bias_router as router
    from vllm.model_executor.layers.fused_moe.router import reap_router

    from reap.patches import selftest

    problems = {}
    for hashed in (False, True):
        for experts in (144, 160):
            found = selftest._case(torch, router, "cpu", experts, hashed, torch.float32, torch.int32, experts)
            problems[f"{experts} {'hash' if hashed else 'bias'}"] = found
    record = {
        "process": multiprocessing.current_process().name,
        "problems": problems,
        "by_replacement": sorted(count for count, _ in reap_router._refused),
    }
    beside = done.with_suffix(".new")
    beside.write_text(json.dumps(record))
    beside.rename(done)
