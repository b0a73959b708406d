"""Why a task failed, as the last lines of a run say it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SPEC = importlib.util.spec_from_file_location("reap_summary", ROOT / "plugins" / "callback" / "reap_summary.py")
assert SPEC is not None
assert SPEC.loader is not None
PLUGIN = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PLUGIN)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"msg": "no such file", "stdout": "noise"}, "no such file"),
        ({"msg": "", "stderr": "two\nlines"}, "two lines"),
        ({"msg": "failed to validate", "stdout": "floor_kb is 9\n", "stderr": ""}, "failed to validate: floor_kb is 9"),
        ({"msg": "failed to validate", "stdout": "", "stderr": "no TOML"}, "failed to validate: no TOML"),
        ({"msg": "failed to validate"}, "failed to validate"),
        ({}, "no message"),
    ],
)
def test_a_failure_is_told_by_what_says_most(result: dict[str, Any], said: str) -> None:
    assert PLUGIN.first_message(result) == said


def test_a_long_message_is_cut() -> None:
    assert len(PLUGIN.first_message({"msg": "x" * 1000})) == PLUGIN.SHOWN_CHARACTERS
