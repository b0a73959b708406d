"""Every profile's command line goes through vLLM's own argument parser: a flag it does not know fails here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reap.profiles import Profile, vllm_arguments
from reap.serve.gate import MIDDLEWARE

ROOT = Path(__file__).resolve().parents[2]
PROFILES: dict[str, Any] = yaml.safe_load((ROOT / "group_vars/all/profiles.yml").read_text(encoding="utf-8"))[
    "reap_profiles"
]
SPOILED = {
    "a misspelt flag": ["--max-modl-len", "200000"],
    "a misspelt key": ["--reasoning-config", '{"reasoning_parsr":"deepseek_v4"}'],
    "a wrong choice": ["--kv-cache-dtype", "fp9"],
    "a wrong size": ["--kv-cache-memory-bytes", "14 gigs"],
}

Ask = Callable[[dict[str, list[str]]], dict[str, Any]]


def arguments(name: str) -> list[str]:
    profile = Profile.from_mapping(PROFILES[name], name)
    arguments = vllm_arguments(profile, model_dir="/models/x", host="127.0.0.1", port=8000)
    return [*arguments, "--middleware", MIDDLEWARE]


@pytest.fixture(scope="module")
def answers(ask_vllm: Ask) -> dict[str, Any]:
    """One start of vLLM's parser (about 10 s) for all lists."""
    lists = {name: arguments(name) for name in PROFILES}
    lists |= {name: [*arguments("k144-nospec-200k"), *words] for name, words in SPOILED.items()}
    return ask_vllm(lists)


@pytest.mark.parametrize("name", PROFILES)
def test_vllm_takes_the_arguments_of_every_profile(answers: dict[str, Any], name: str) -> None:
    assert answers[name] is None


@pytest.mark.parametrize(
    ("name", "told"), list(zip(SPOILED, ("max-modl-len", "reasoning_parsr", "fp9", "14 gigs"), strict=True))
)
def test_vllm_refuses_what_it_does_not_know(answers: dict[str, Any], name: str, told: str) -> None:
    assert answers[name] is not None
    assert told in answers[name]
