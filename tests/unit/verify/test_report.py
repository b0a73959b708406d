"""The report keeps its published schema; the verdict follows the stated tolerances; evidence is found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from reap.cli import main
from reap.errors import ReapError
from reap.fetch.progress import Progress
from reap.verify import Settings, verify
from reap.verify.evidence import subject, verified_before
from reap.verify.profile import settings_for, warmup_tokens
from reap.verify.session import TaskResult
from reap.verify.verdict import comparable, compare, judge
from tests.support import lying_servers as doubles

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
PROFILES = yaml.safe_load((ROOT / "group_vars" / "all" / "profiles.yml").read_text(encoding="utf-8"))["reap_profiles"]
REFERENCE = {"prompt_tokens": 2000, "ttft_s": 1.0, "prefill_tok_s": 2000.0, "decode_tok_s": 100.0}


def report_of(double: type[doubles.Honest] = doubles.Honest, **changes: Any) -> dict[str, Any]:
    with doubles.serving(double) as server:
        given: dict[str, Any] = {"endpoint": server.url, "model": doubles.MODEL, "needle_tokens": 2000}
        return verify(Settings(**{**given, "tasks": ["smoke", "needle"], **changes}))


@pytest.mark.parametrize("double", [doubles.Honest, doubles.AlwaysTheSameCode, doubles.ErrorBodyWithStatus200])
def test_reports_keep_the_published_schema(double: type[doubles.Honest]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    report = json.loads(json.dumps(report_of(double)))
    jsonschema.Draft202012Validator(SCHEMA).validate(report)


def test_the_schema_refuses_a_report_without_a_verdict() -> None:
    report = report_of()
    del report["verdict"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(report)


def test_repeats_give_median_and_spread() -> None:
    report = report_of(tasks=["needle"], repeats=3)
    spread = report["measurements"]["ttft_s"]
    assert len(spread["values"]) == 3
    assert report["ttft_s"] == spread["median"] == sorted(spread["values"])[1]
    assert spread["smallest"] <= spread["median"] <= spread["largest"]
    # Each repetition has a code and a text of its own.
    assert len({item["code"] for item in report["long_prompts"]}) == 3


def test_two_runs_share_no_code() -> None:
    one, other = report_of(tasks=["needle"]), report_of(tasks=["needle"])
    assert one["long_prompts"][0]["code"] != other["long_prompts"][0]["code"]


def test_simulated_figures_are_never_compared() -> None:
    report = report_of(hardware="sim", reference=REFERENCE)
    assert report["simulated"] is True
    assert report["comparison"] == []
    assert "simulated" in report["not_compared"]


def test_ladder_stops_at_the_first_loss() -> None:
    report = report_of(doubles.TruncatesTheContext, tasks=["ladder"], lengths=[300, 1500, 2500], needle_depth=0.1)
    assert [item["wanted_tokens"] for item in report["tasks"]["ladder"]["data"]["needles"]] == [300, 1500]
    assert "lost at 1,500 tokens" in report["tasks"]["ladder"]["note"]


def test_grid_goes_on_after_a_loss() -> None:
    report = report_of(
        doubles.TruncatesTheContext,
        tasks=["grid"],
        lengths=[300, 1500],
        depths=[0.0, 1.0],
        max_model_len=None,
    )
    found = {(i["wanted_tokens"], i["depth"]): i["found"] for i in report["tasks"]["grid"]["data"]["needles"]}
    assert found == {(300, 0.0): True, (300, 1.0): True, (1500, 0.0): False, (1500, 1.0): True}


@pytest.mark.parametrize(
    ("measured", "states"),
    [
        ({"ttft_s": 1.0, "prefill_tok_s": 2000.0, "decode_tok_s": 100.0}, ["same", "same", "same"]),
        ({"ttft_s": 1.2, "prefill_tok_s": 1700.0, "decode_tok_s": 100.0}, ["slower", "slower", "same"]),
        ({"ttft_s": 0.5, "prefill_tok_s": 4000.0, "decode_tok_s": 49.0}, ["faster", "faster", "too-slow"]),
        ({"ttft_s": None, "prefill_tok_s": None, "decode_tok_s": 90.0}, ["same"]),
    ],
)
def test_tolerances(measured: dict[str, float | None], states: list[str]) -> None:
    assert [row["state"] for row in compare(measured, REFERENCE, 0.9, 0.5)] == states


def passed(name: str = "smoke", *, expected: bool = True, good: bool = True, ran: bool = True) -> TaskResult:
    result = TaskResult(name, "", expected, ran=ran)
    if ran:
        result.check("exact_text", good, "this", "that")
    return result


def test_verdicts() -> None:
    slower = compare({"ttft_s": 1.2}, REFERENCE, 0.9, 0.5)
    wedged = compare({"ttft_s": 4.0}, REFERENCE, 0.9, 0.5)
    assert judge([passed()], [], None, 0.5) == ("passed", [])
    assert judge([passed()], slower, None, 0.5) == ("passed-slower", [])
    verdict, failures = judge([passed()], wedged, None, 0.5)
    assert verdict == "failed"
    assert failures[0].startswith("ttft_s: found 4 s, published 1 s: 25%")
    assert judge([passed(good=False)], [], None, 0.5) == ("failed", ["smoke: exact_text: found this, wanted that"])
    assert judge([passed(good=False, expected=False)], [], None, 0.5) == ("passed", [])
    assert judge([passed(ran=False)], [], None, 0.5)[0] == "failed"
    memory = {"min_kb": 5, "floor_kb": 8, "distance_to_floor_kb": -3, "min_phase": "needle"}
    assert "below the floor of 8 kB" in judge([passed()], [], memory, 0.5)[1][0]


def test_another_length_is_not_compared() -> None:
    assert comparable(2010, REFERENCE, False) is None
    assert "1,500 tokens" in str(comparable(1500, REFERENCE, False))
    assert "no published" in str(comparable(2000, None, False))


def test_a_verified_start_is_not_verified_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "service.json"
    state.write_text(json.dumps({"generation": "a", "started_unix": 1.0}), encoding="utf-8")
    evidence = tmp_path / "evidence"
    with doubles.serving(doubles.Honest) as server:
        config = tmp_path / "verify.json"
        settings = {"endpoint": server.url, "model": doubles.MODEL, "tasks": ["smoke"], "needle_tokens": 500,
                    "service_file": str(state), "evidence_dir": str(evidence)}  # fmt: skip
        config.write_text(json.dumps(settings), encoding="utf-8")

        def run() -> dict[str, Any]:
            assert main(["verify", "--config", str(config), "--unless-verified", "--json"]) == 0
            last: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
            return last

        assert run()["changed"] is True
        again = run()
        assert again["changed"] is False
        assert again["skipped"] is True
        state.write_text(json.dumps({"generation": "a", "started_unix": 2.0}), encoding="utf-8")
        assert run()["changed"] is True
        state.unlink()
        assert run()["changed"] is True
    assert len(list(evidence.iterdir())) == 3


def test_a_failed_run_is_never_taken_for_verified(tmp_path: Path) -> None:
    settings = Settings(model="m")
    mark = subject(settings, {})
    folder = tmp_path / "20260101T000000Z-x"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"subject": mark, "verdict": "failed"}), encoding="utf-8")
    assert verified_before(tmp_path, mark) is None
    (folder / "report.json").write_text(json.dumps({"subject": mark, "verdict": "passed-slower"}), encoding="utf-8")
    assert verified_before(tmp_path, mark) is not None


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_profile_gives_settings(name: str) -> None:
    settings = Settings.from_mapping(settings_for(name, PROFILES[name], {"host": "h"}), name)
    assert settings.simulated is (PROFILES[name]["hardware"] != "spark")
    assert settings.ladder()[-1] == settings.needle_tokens == PROFILES[name]["needle_tokens"]
    assert settings.ladder() == sorted(set(settings.ladder()))
    assert settings.identity["model"]["revision"] == PROFILES[name]["model_revision"]


def test_a_needle_over_the_profile_s_context_is_refused() -> None:
    with pytest.raises(ReapError, match="do not fit the context"):
        settings_for("p", PROFILES["sim-needle-32k"], {"needle_tokens": 32768})


def test_warm_up_has_a_whole_piece_and_the_same_rest() -> None:
    assert warmup_tokens(186390, 8192) == 8192 + 186390 % 8192
    assert warmup_tokens(8000, 8192) == 0


@pytest.mark.parametrize(
    ("good", "passed_before", "go_back_to"),
    [
        (["new", "old", "older"], False, "old"),
        (["new"], False, None),
        (["new", "old"], True, None),
        (None, False, None),
    ],
)
def test_only_a_generation_that_never_passed_gives_way_to_another(
    good: list[str] | None,
    passed_before: bool,
    go_back_to: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state, generations, evidence = tmp_path / "service.json", tmp_path / "generations.json", tmp_path / "evidence"
    state.write_text(json.dumps({"generation": "new"}), encoding="utf-8")
    if good is not None:
        generations.write_text(json.dumps({"good": good}), encoding="utf-8")
    if passed_before:
        (evidence / "earlier").mkdir(parents=True)
        report = {"verdict": "passed", "identity": {"service": {"generation": "new"}}}
        (evidence / "earlier" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    with doubles.serving(doubles.AlwaysTheSameCode) as server:
        config = tmp_path / "verify.json"
        settings = {"endpoint": server.url, "model": doubles.MODEL, "tasks": ["smoke"], "needle_tokens": 500,
                    "service_file": str(state), "generations_file": str(generations),
                    "evidence_dir": str(evidence)}  # fmt: skip
        config.write_text(json.dumps(settings), encoding="utf-8")
        assert main(["verify", "--config", str(config), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["go_back_to"] == go_back_to


def test_progress_names_the_task_and_promises_no_time_for_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    class Recorder(Progress):
        def update(self, *arguments: Any, **named: Any) -> None:
            super().update(*arguments, **named)
            seen.append(dict(self.state))

    monkeypatch.setattr("reap.cli.verify.Progress", Recorder)
    with doubles.serving(doubles.Honest) as server:
        arguments = ["--endpoint", server.url, "--model", doubles.MODEL, "--tasks", "smoke,needle"]
        arguments += ["--needle-tokens", "500", "--out", str(tmp_path), "--progress", str(tmp_path / "progress.json")]
        assert main(["verify", *arguments]) == 0
    details = [state["detail"] for state in seen]
    assert details[:2] == ["asking the endpoint who it is", "smoke, task 1 of 2"]
    assert "needle, task 2 of 2: writing a prompt of 500 tokens" in details
    assert {(state["total"], state["rate"]) for state in seen if ": " not in state["detail"]} == {(None, None)}
    assert {state["total"] for state in seen if ": " in state["detail"]} == {500}
