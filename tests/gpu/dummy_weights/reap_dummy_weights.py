"""A vLLM plugin for `tests.gpu.full_server`, no part of the patches: sane dummy weights, and a record of GPU memory.

vLLM's own dummy weights leave the bytes of quantised experts as they are found in memory and give scales and norms
values near 0, so that every layer would answer 0 or NaN.
"""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

# Weights of about 2^-7 x fp4 or fp8 values keep activations near 1 through 43 layers.
SCALE_EXPONENTS = (119, 122)  # E8M0 bytes, the end excluded; 127 is 2^0
SCALE = 2.0**-7
CORRECTION_BIAS = 8.08  # of DeepSeek V4, nearly uniform
INTERVAL_S = 0.02


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    DummyModelLoader.load_weights = fill


def fill(loader: Any, model: Any, model_config: Any) -> None:
    """Stands for `DummyModelLoader.load_weights`."""
    import torch

    record = os.environ.get("REAP_GPU_MEMORY_RECORD")
    if record:
        threading.Thread(target=_record, args=(torch, record), daemon=True).start()
    torch.manual_seed(144)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype == torch.float8_e8m0fnu:
                tensor.view(torch.uint8).random_(*SCALE_EXPONENTS)
            elif tensor.dtype == torch.uint8:
                tensor.random_(*(SCALE_EXPONENTS if name.endswith("_scale") else (0, 256)))
            elif tensor.dtype == torch.float8_e4m3fn:
                tensor.copy_(torch.randn(tensor.shape, dtype=torch.bfloat16, device=tensor.device))
            elif name.endswith("weight_scale_inv"):
                tensor.fill_(SCALE)
            elif name.endswith("norm.weight"):
                tensor.fill_(1.0)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(CORRECTION_BIAS, 0.3)
            elif tensor.is_floating_point():
                tensor.normal_(0.0, 0.02)
            # What is left are the hash layers' tables, which the model itself fills with random experts.


def _record(torch: Any, path: str) -> None:
    """Write what PyTorch's allocator holds, and its peak since the line before, whenever either changed."""
    last = None
    ready = Path(f"{path}.ready")
    with Path(path).open("a", encoding="utf-8", buffering=1) as out:
        while True:
            values = {
                "allocated": torch.cuda.memory_allocated(),
                "reserved": torch.cuda.memory_reserved(),
                "peak": torch.cuda.max_memory_allocated(),
            }
            # vLLM reads the peak itself while it starts.
            if ready.exists():
                torch.cuda.reset_peak_memory_stats()
            if values != last:
                out.write(json.dumps({"at": time.time(), **values}) + "\n")
                last = values
            time.sleep(INTERVAL_S)
