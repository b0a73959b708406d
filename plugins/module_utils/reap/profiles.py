"""A profile as typed data, and what follows from it: vLLM's argument list and the container's environment.

The arguments and variables every profile shares are those of the runtime that served the validated profiles on
spark-2822 (27 May 2026); the numbers come from the profile alone. Everything here is pure: no file is read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ReapError
from .schema import mapping_faults, shown

Scalar = str | int | float | bool | None
ArgumentValue = Scalar | dict[str, Any]

# vLLM's sizes: 6G = 6 x 2^30, 6g = 6 x 10^9; a plain number is bytes.
_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?[kKmMgGtT]?")
_FLAG = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# They would end in a process list or in a file that everybody may read.
_SECRET_FLAGS = frozenset({"api-key", "hf-token"})
_SECRET_VARIABLES = frozenset({"VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})

# Environment of the validated container, the same for every profile, and HF_HUB_OFFLINE: with the hub down, a start
# with every file in place stalled without it.
SHARED_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_TRITON_MLA_SPARSE": "1",
    "VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH": "1",
    "VLLM_ENABLE_DEEPSEEK_V4_MHC_WARMUP": "1",
    "VLLM_ENABLE_DEEPSEEK_V4_SPARSE_MLA_WARMUP": "0",
    "FLASHINFER_DISABLE_VERSION_CHECK": "1",
    "TILELANG_CLEANUP_TEMP_FILES": "1",
    "DG_JIT_USE_NVRTC": "0",
    "DG_JIT_NVCC_COMPILER": "/usr/local/cuda/bin/nvcc",
    "NCCL_IB_DISABLE": "1",
    "NCCL_DEBUG": "WARN",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "HF_HUB_OFFLINE": "1",
}
# Compilers' caches kept from one start to the next (a warm one saves about 80 s): variable -> folder below the cache.
CACHE_FOLDERS: Mapping[str, str] = {
    "HF_HOME": "huggingface",
    "VLLM_CACHE_ROOT": "vllm",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "TILELANG_CACHE_DIR": "tilelang",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}


# Tokens a block of the KV cache in the validated command.
BLOCK_SIZE = 256


@dataclass(frozen=True)
class Profile:
    """One entry of ``reap_profiles``: group_vars/all/profiles.yml says what each key means."""

    description: str
    validated: bool
    hardware: str
    model_repo: str
    model_revision: str | None
    model_bytes: int
    model_expect: dict[str, Any]
    served_model_name: str
    max_model_len: int
    kv_cache_memory: str
    max_num_batched_tokens: int
    max_num_seqs: int
    gpu_memory_utilization: float
    kv_cache_dtype: str
    thinking: bool
    speculative: dict[str, Any] | None
    watchdog_min_available_kb: int
    vllm_extra_args: dict[str, ArgumentValue]
    environment: dict[str, Scalar]
    needle_tokens: int
    reference: dict[str, Any] | None
    needle_depth: float = 0.5
    needle_max_tokens: int = 6144
    verify_tasks: tuple[str, ...] | None = None

    @property
    def block_size(self) -> int | None:
        """Tokens a block of the KV cache; None where vLLM chooses."""
        size = self.vllm_extra_args.get("block-size", BLOCK_SIZE)
        return size if isinstance(size, int) else None

    @classmethod
    def from_mapping(cls, data: object, name: str = "profile") -> Profile:
        """Check the data of one profile.

        Args:
            data: the mapping under the profile's name in ``reap_profiles``.
            name: the profile's name, for the error only.

        Raises:
            ReapError: one line that names every key that is unknown, missing or of a wrong type, and what was wanted.
        """
        faults = mapping_faults(cls, data, special=("kv_cache_memory",))
        if isinstance(data, Mapping) and not faults:
            faults = _value_faults(data)
        if faults:
            raise ReapError(f"profile {name}: {'; '.join(faults)}")
        assert isinstance(data, Mapping)
        values = {field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data}
        values["kv_cache_memory"] = str(values["kv_cache_memory"])
        values["gpu_memory_utilization"] = float(values["gpu_memory_utilization"])
        return cls(**values)


def vllm_arguments(profile: Profile, *, model_dir: str, host: str, port: int) -> list[str]:
    """What follows ``vllm serve`` for a profile.

    Args:
        profile: the checked profile. ``vllm_extra_args`` adds a flag, replaces its value, or takes it away (null);
            true gives ``--flag``, false ``--no-flag``, a mapping its JSON.
        model_dir: folder of the checkpoint as the container sees it.
        host: address vLLM binds to.
        port: TCP port vLLM listens on, 1 to 65535.

    Returns:
        The argument list: the model's folder first, then the flags in the order of the validated command. Sizes are
        handed through as written, because 6G and 6g differ to vLLM.

    Raises:
        ReapError: a port out of range, or a secret among the extra arguments.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise ReapError(f"port: found {shown(port)}, wanted a number from 1 to 65535")
    flags: dict[str, ArgumentValue] = {
        "served-model-name": profile.served_model_name,
        "host": host,
        "port": port,
        "trust-remote-code": True,
        "tensor-parallel-size": 1,
        "pipeline-parallel-size": 1,
        "kv-cache-dtype": profile.kv_cache_dtype,
        "kv-cache-memory-bytes": profile.kv_cache_memory,
        "block-size": BLOCK_SIZE,
        "max-model-len": profile.max_model_len,
        "max-num-seqs": profile.max_num_seqs,
        "max-num-batched-tokens": profile.max_num_batched_tokens,
        "gpu-memory-utilization": profile.gpu_memory_utilization,
        "distributed-executor-backend": "mp",
        "tokenizer-mode": "deepseek_v4",
        "load-format": "safetensors",
        "disable-uvicorn-access-log": True,
        "enable-prefix-caching": True,
        "tool-call-parser": "deepseek_v4",
        "enable-auto-tool-choice": True,
        "reasoning-parser": "deepseek_v4",
        "reasoning-config": {
            "reasoning_parser": "deepseek_v4",
            "reasoning_start_str": "<think>",
            "reasoning_end_str": "</think>",
        },
        "default-chat-template-kwargs": {"thinking": profile.thinking},
        "compilation-config": {"cudagraph_mode": "FULL_AND_PIECEWISE", "custom_ops": ["all"]},
        "speculative-config": profile.speculative,
    }
    flags.update(profile.vllm_extra_args)
    arguments = [model_dir]
    for flag, value in flags.items():
        arguments += _rendered(flag, value)
    return arguments


def container_environment(profile: Profile, *, cache_dir: str) -> dict[str, str]:
    """The container's environment for a profile, without secrets.

    Args:
        profile: the checked profile; its ``environment`` adds to the shared variables, or takes one away (null).
        cache_dir: folder of the persistent caches as the container sees it.

    Returns:
        Variable name -> value, sorted by name so that the same profile always gives the same text.
    """
    variables: dict[str, Scalar] = {
        **SHARED_ENVIRONMENT,
        **{name: f"{cache_dir.rstrip('/')}/{folder}" for name, folder in CACHE_FOLDERS.items()},
        **profile.environment,
    }
    return {name: _text(value) for name, value in sorted(variables.items()) if value is not None}


def _rendered(flag: str, value: ArgumentValue) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, Mapping):
        return [f"--{flag}", json.dumps(value, separators=(",", ":"))]
    return [f"--{flag}", str(value)]


def _text(value: Scalar) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _is_size(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and bool(_SIZE.fullmatch(str(value)))


def _value_faults(data: Mapping[str, Any]) -> list[str]:
    faults = []
    if not _is_size(data["kv_cache_memory"]):
        wanted = "a size such as 14G (2^30 bytes) or 14g (10^9 bytes)"
        faults.append(f"kv_cache_memory is {shown(data['kv_cache_memory'])}, wanted {wanted}")
    for key in ("model_bytes", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "watchdog_min_available_kb",
                "needle_tokens", "needle_max_tokens"):  # fmt: skip
        if key in data and data[key] < 1:
            faults.append(f"{key} is {data[key]}, wanted 1 or more")
    if not 0 < data["gpu_memory_utilization"] <= 1:
        faults.append(f"gpu_memory_utilization is {data['gpu_memory_utilization']}, wanted more than 0, at most 1")
    if data["hardware"] not in ("spark", "sim"):
        faults.append(f"hardware is {data['hardware']!r}, wanted spark or sim")
    for flag, value in data["vllm_extra_args"].items():
        if not _FLAG.fullmatch(str(flag)):
            faults.append(
                f"vllm_extra_args has {flag!r}, wanted a flag's name without leading dashes, as max-model-len"
            )
        elif flag in _SECRET_FLAGS:
            faults.append(f"vllm_extra_args has {flag!r}: a secret never goes on a command line")
        elif not isinstance(value, Scalar | Mapping):
            faults.append(f"vllm_extra_args {flag} is {shown(value)}, wanted a plain value, a mapping or null")
    for name, value in data["environment"].items():
        if not _VARIABLE.fullmatch(str(name)):
            faults.append(f"environment has {name!r}, wanted a variable's name")
        elif name in _SECRET_VARIABLES:
            faults.append(f"environment has {name}: a secret never goes into a profile")
        elif not isinstance(value, Scalar) or "\n" in str(value):
            faults.append(f"environment {name} is {shown(value)}, wanted a plain value on one line, or null")
    return faults
