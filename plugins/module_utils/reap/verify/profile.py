"""From a profile to the settings of its verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ReapError
from ..profiles import Profile
from .settings import Settings


def warmup_tokens(needle_tokens: int, batched_tokens: int) -> int:
    """Length of the request that goes before the first long one.

    A long prompt is read in pieces of `batched_tokens` and a rest; kernels are compiled for both sizes at the first
    sight of each. One whole piece and the same rest therefore warms all that the measurement will meet, at a fraction
    of its cost. 0 where the measured prompt is hardly longer than that.
    """
    if needle_tokens <= 2 * batched_tokens:
        return 0
    return batched_tokens + needle_tokens % batched_tokens


def _identity(profile: Profile) -> dict[str, Any]:
    """What tells two runs apart that the endpoint does not say: the model's commit, and how it is served."""
    names = ("kv_cache_memory", "kv_cache_dtype", "max_num_batched_tokens", "max_num_seqs", "gpu_memory_utilization")
    served = {name: getattr(profile, name) for name in (*names, "speculative", "vllm_extra_args")}
    return {"model": {"repo": profile.model_repo, "revision": profile.model_revision}, "settings": served}


def settings_for(name: str, profile: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The content of /etc/reap/verify.json.

    Args:
        name: the profile's name.
        profile: its data, an entry of ``reap_profiles``.
        given: further settings of `Settings`; a value of None leaves the profile's or the default.

    Raises:
        ReapError: one line with what is wrong.
    """
    checked = Profile.from_mapping(profile, name)
    chosen = {key: value for key, value in given.items() if value is not None}
    needle = int(chosen.get("needle_tokens", checked.needle_tokens))
    settings: dict[str, Any] = {
        "profile": name,
        "hardware": checked.hardware,
        "model": checked.served_model_name,
        "max_model_len": checked.max_model_len,
        "thinking": checked.thinking,
        "needle_tokens": needle,
        "needle_depth": checked.needle_depth,
        "needle_max_tokens": checked.needle_max_tokens,
        "block_size": checked.block_size,
        "prefill_piece": checked.max_num_batched_tokens,
        "warmup_tokens": warmup_tokens(needle, checked.max_num_batched_tokens),
        "expected_tasks": None if checked.verify_tasks is None else list(checked.verify_tasks),
        "reference": checked.reference,
        "floor_kb": checked.watchdog_min_available_kb,
    }
    settings.update(chosen)
    settings["identity"] = {**_identity(checked), **settings.get("identity", {})}
    try:
        Settings.from_mapping(settings, f"verification of profile {name}")
    except TypeError as error:
        raise ReapError(f"verification of profile {name}: {error}") from error
    return settings
