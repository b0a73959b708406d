"""Every lie is caught by the check that is named for it, and the honest double passes the same tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap.verify import Settings, verify
from tests.support import lying_servers as doubles

TASKS_OF_THE_HONEST = [
    "health", "identity", "smoke", "streaming", "accounting", "stream_equals_whole", "temperature_zero",
    "temperature_high", "unicode", "tool_call", "tool_round_trip", "tool_not_due", "over_context", "cancellation",
    "needle_among_distractors", "needle", "after_needle",
]  # fmt: skip

# The double, the task it is met in, the check that must catch it.
LIES = [
    (doubles.EchoesThePrompt, "needle", "not_an_echo"),
    (doubles.EchoesThePrompt, "smoke", "exact_text"),
    (doubles.AnswersInTheReasoningOnly, "needle", "answer_in_content"),
    (doubles.AlwaysTheSameCode, "needle", "needle_value"),
    (doubles.TruncatesTheContext, "needle", "prompt_tokens_exact"),
    (doubles.TruncatesTheContext, "needle", "needle_value"),
    (doubles.StatesTooManyTokens, "accounting", "completion_tokens_metrics"),
    (doubles.StatesTooManyTokens, "needle", "completion_tokens_metrics"),
    (doubles.StatesADifferentPromptLength, "needle", "prompt_tokens_exact"),
    (doubles.StatesADifferentPromptLength, "accounting", "prompt_tokens_metrics"),
    (doubles.StreamsOneChunkAtTheEnd, "streaming", "incremental_reads"),
    (doubles.StreamsABurstAtTheEnd, "streaming", "incremental_reads"),
    (doubles.CutsCharactersBetweenEvents, "unicode", "utf8_intact"),
    (doubles.SendsHalfCharacters, "unicode", "utf8_intact"),
    (doubles.SaysDoneTwice, "streaming", "done_once"),
    (doubles.NeverSaysDone, "streaming", "stream_complete"),
    (doubles.ErrorBodyWithStatus200, "smoke", "no_error_body"),
    (doubles.ErrorEventInTheStream, "smoke", "no_error_body"),
    (doubles.HangsAfterTheFirstToken, "smoke", "deadline"),
    (doubles.ToolCallWithInvalidJson, "tool_call", "tool_arguments_json"),
    (doubles.ToolCallWithAnotherSchema, "tool_call", "tool_arguments_schema"),
    (doubles.CallsAToolForEverything, "tool_not_due", "no_tool_called"),
    (doubles.SamplesAtTemperatureZero, "temperature_zero", "deterministic_at_0"),
    (doubles.GreedyAtAnyTemperature, "temperature_high", "diverse_at_1_5"),
    (doubles.AnotherModelUnderTheName, "identity", "tokenizer"),
    (doubles.ShorterContextUnderTheName, "identity", "context_length"),
    (doubles.AnotherPathUnderTheName, "identity", "model_path"),
    (doubles.AnswersUnderAnotherName, "smoke", "model_name"),
    (doubles.DropsTheConnectionAt90Percent, "needle", "stream_complete"),
    (doubles.AnswersFromThePrefixCache, "needle", "prefix_cache_cold"),
    (doubles.GoesOnAfterACancellation, "cancellation", "nothing_runs"),
    (doubles.AcceptsAnyLength, "over_context", "status_400"),
    (doubles.MixesUpTheNeedles, "needle_among_distractors", "needle_value"),
]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    added = [{"content": text, "id": number} for text, number in doubles.SPECIAL.items()]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}), encoding="utf-8")
    return tmp_path


def ask(double: type[doubles.Honest], model_dir: Path, tasks: list[str], **changes: Any) -> dict[str, Any]:
    with doubles.serving(double) as server:
        given: dict[str, Any] = {
            "endpoint": server.url,
            "model": doubles.MODEL,
            "model_path": doubles.ROOT,
            "model_dir": str(model_dir),
            "max_model_len": doubles.CONTEXT,
            "needle_tokens": 2000,
            "needle_depth": 0.2,
            "tasks": tasks,
            "cancel_wait_s": 1.0,
            "between_tokens_s": 0.5 if double is doubles.HangsAfterTheFirstToken else 30.0,
        }
        if double is doubles.ShorterContextUnderTheName:
            given["needle_tokens"] = 500
        return verify(Settings(**{**given, **changes}))


def failed_checks(report: dict[str, Any], task: str) -> set[str]:
    return {check["name"] for check in report["tasks"][task]["checks"] if not check["passed"]}


def test_the_honest_double_passes_every_task(model_dir: Path) -> None:
    report = ask(doubles.Honest, model_dir, TASKS_OF_THE_HONEST)
    assert report["failures"] == []
    assert report["verdict"] == "passed"
    assert report["prompt_tokens"] == 2000
    assert report["needle_retained"] is True


@pytest.mark.parametrize(("double", "task", "check"), LIES, ids=lambda item: getattr(item, "__name__", item))
def test_a_lie_is_caught_by_name(double: type[doubles.Honest], task: str, check: str, model_dir: Path) -> None:
    report = ask(double, model_dir, [task])
    assert report["verdict"] == "failed"
    assert check in failed_checks(report, task), report["failures"]
    assert any(line.startswith(f"{task}: {check}: ") for line in report["failures"])
