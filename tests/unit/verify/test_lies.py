"""Every lie is caught by the check that is named for it, and the honest double passes the same tasks."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import pytest

from reap.verify import Settings, verify
from reap.verify.client import Client, CouldNotRun, Deadlines
from reap.verify.prompts import UNICODE_SAMPLES
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
    (doubles.SamplesAtTemperatureZero, "temperature_zero", "alike_at_0"),
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
    (doubles.NamesAllCodes, "needle_among_distractors", "no_distractor"),
    (doubles.IsUnwell, "health", "health"),
    (doubles.HangsUpWhenAskedForItsHealth, "health", "connection"),
    (doubles.DoesNotThink, "smoke", "reasoning_apart"),
    (doubles.StreamsOneChunkAtTheEnd, "streaming", "incremental_events"),
    (doubles.WholeAnswersDiffer, "stream_equals_whole", "same_content"),
    (doubles.WholeAnswersDiffer, "stream_equals_whole", "same_finish_reason"),
    (doubles.ThinksInStreamsOnly, "stream_equals_whole", "reasoning_in_both"),
    (doubles.CountsWholeAnswersHigher, "stream_equals_whole", "same_usage"),
    (doubles.DropsMarks, "unicode", "exact_combining"),
    (doubles.SendsHalvesOfPairs, "unicode", "utf8_intact"),
    (doubles.DropsTheBeginning, "ladder", "needle_value"),
    (doubles.PlaysTheAnswerBack, "accounting", "decode_time_metrics"),
    (doubles.PlaysTheAnswerBack, "needle", "decode_time_metrics"),
    *((doubles.KnowsAsciiOnly, "unicode", f"exact_{name}") for name, _sample in UNICODE_SAMPLES),
    (doubles.RunsIntoTheLimit, "ascii", "finished"),
    (doubles.CallsNoTool, "tool_call", "tool_called"),
    (doubles.CallsForAnotherCity, "tool_call", "tool_arguments_value"),
    (doubles.EndsACallAsAnAnswer, "tool_call", "tool_finish_reason"),
    (doubles.CountsCallsFromMinusOne, "tool_call", "tool_index"),
    (doubles.CountsCallsFromTheSky, "tool_call", "tool_index"),
    (doubles.ForgetsTheToolResult, "tool_round_trip", "tool_result_used"),
    (doubles.CallsAToolForEverything, "tool_round_trip", "no_second_call"),
    (doubles.CannotMultiply, "tool_not_due", "answer"),
    (doubles.StatesNoContext, "over_context", "context_known"),
    (doubles.RefusesInHtml, "over_context", "error_message"),
    (doubles.StreamsOneChunkAtTheEnd, "cancellation", "was_running"),
    (doubles.HidesWhatRuns, "cancellation", "no_more_tokens"),
    (doubles.CountsInSteps, "needle", "prompt_length"),
    (doubles.TokenizerStopsAnswering, "needle", "could_run"),
    (doubles.ResetsTheConnection, "smoke", "connection"),
    (doubles.StopsInsideAChunk, "smoke", "connection"),
    (doubles.NeverStreams, "smoke", "event_stream"),
    (doubles.WritesALogIntoTheStream, "smoke", "event_stream"),
    (doubles.CutsAnEvent, "smoke", "event_json"),
    (doubles.AnswersInHtml, "smoke", "json_body"),
    (doubles.FailsInside, "smoke", "http_status"),
    (doubles.MixesTwoReplies, "smoke", "one_reply"),
    (doubles.ForgetsTheUsage, "smoke", "usage_present"),
    (doubles.AddsUpWrongly, "smoke", "usage_consistent"),
    (doubles.StatesOneToken, "smoke", "usage_consistent"),
    # What is not counted is not proved.
    (doubles.CountsNoCachedTokens, "needle", "prefix_cache_cold"),
    (doubles.StartsItsCountersAnew, "needle", "prefix_cache_cold"),
    (doubles.CountsNoGeneratedTokens, "accounting", "completion_tokens_metrics"),
]
# Settings under which a lie is met.
CHANGES: dict[type[doubles.Honest], dict[str, Any]] = {
    doubles.ShorterContextUnderTheName: {"needle_tokens": 500},
    doubles.HangsAfterTheFirstToken: {"between_tokens_s": 0.5},
    doubles.DoesNotThink: {"thinking": True},
    doubles.StatesNoContext: {"max_model_len": None},
    doubles.GoesOnAfterACancellation: {"cancel_wait_s": 1.0},
}


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
            "cancel_wait_s": 60.0,
            "between_tokens_s": 30.0,
        }
        return verify(Settings(**{**given, **CHANGES.get(double, {}), **changes}))


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


HONEST_IN_THEIR_WAY = [
    (doubles.StatesCachedTokensInTheUsage, "needle", {}),
    (doubles.ThinksWhenAsked, "smoke", {"thinking": True}),
    (doubles.RefusesAtLength, "over_context", {}),
    (doubles.ListsModelsThatAreNone, "identity", {}),
    (doubles.SaysNotANumber, "needle", {}),
]


@pytest.mark.parametrize(
    ("double", "task", "changes"), HONEST_IN_THEIR_WAY, ids=lambda item: getattr(item, "__name__", None)
)
def test_who_is_honest_in_another_way_passes(
    double: type[doubles.Honest], task: str, changes: dict[str, Any], model_dir: Path
) -> None:
    report = ask(double, model_dir, [task], **changes)
    assert report["failures"] == []


@pytest.mark.parametrize(
    ("double", "task", "words"),
    [
        (doubles.CountsNoCachedTokens, "needle", "does not say how many prompt tokens came from the prefix cache"),
        (doubles.CountsNoGeneratedTokens, "accounting", "vllm:generation_tokens_total"),
    ],
)
def test_what_is_not_counted_is_said_where_metrics_are_optional(
    double: type[doubles.Honest], task: str, words: str, model_dir: Path
) -> None:
    report = ask(double, model_dir, [task], metrics="optional")
    assert report["failures"] == []
    assert words in report["tasks"][task]["note"]


def test_an_echo_is_no_needle_retained(model_dir: Path) -> None:
    report = ask(doubles.EchoesThePrompt, model_dir, ["needle"])
    assert report["verdict"] == "failed"
    assert report["needle_retained"] is False
    assert report["long_prompts"][0]["found"] is False
    assert "not_an_echo" in report["long_prompts"][0]["failed"]


def test_a_fault_of_the_suite_itself_is_a_failed_check(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("reap.verify.tasks.bare", broken)
    report = ask(doubles.Honest, model_dir, ["smoke", "health"])
    assert failed_checks(report, "smoke") == {"could_run"}
    assert "IndexError" in report["failures"][0]
    assert report["tasks"]["health"]["passed"] is True


def test_an_engine_that_is_gone_before_the_warm_up_is_a_failed_run_with_evidence(model_dir: Path) -> None:
    report = ask(doubles.TokenizerStopsAnswering, model_dir, ["smoke", "needle"], warmup_tokens=500)
    assert report["verdict"] == "failed"
    assert any("The warm-up could not run" in note for note in report["notes"])
    assert "could_run" in failed_checks(report, "needle")


def test_nobody_else_is_measured(model_dir: Path) -> None:
    """No report: nothing is wrong with the endpoint, so no generation may give way for it."""
    with pytest.raises(CouldNotRun, match="1 requests of other clients") as caught:
        ask(doubles.ServesOthers, model_dir, ["smoke"], idle_wait_s=0.3)
    assert caught.value.report is None


def test_a_thought_in_other_words_is_no_other_answer(model_dir: Path) -> None:
    report = ask(doubles.ThinksInOtherWords, model_dir, ["stream_equals_whole", "temperature_zero"])
    assert report["failures"] == []
    assert "in different words" in report["tasks"]["stream_equals_whole"]["note"]


def test_a_whole_answer_may_take_as_long_as_all_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first byte comes when its last token is made, long after a first token would have been due."""
    given: list[float] = []
    real = Client._connection

    class Watched:
        def __init__(self, inner: http.client.HTTPConnection) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def getresponse(self) -> http.client.HTTPResponse:
            given.append(self.inner.sock.gettimeout())
            return self.inner.getresponse()

    monkeypatch.setattr(Client, "_connection", lambda self, timeout: Watched(real(self, timeout)))
    with doubles.serving(doubles.Honest) as server:
        client = Client(server.url, doubles.MODEL, deadlines=Deadlines(first_token_s=111.0, total_s=999.0))
        for stream in (False, True):
            client.chat([{"role": "user", "content": "Say yes."}], max_tokens=8, stream=stream)
    assert given == [999.0, 111.0]
