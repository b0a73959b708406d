"""The report keeps its published schema; the verdict follows the stated tolerances; evidence is found again."""

from __future__ import annotations

import io
import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import pages.report
from pages.report import render_report
from reap.cli import main
from reap.errors import ReapError
from reap.fetch.progress import Progress
from reap.verify import Settings, verify
from reap.verify.evidence import host_identity, running_image, subject, verified_before
from reap.verify.profile import settings_for, warmup_tokens
from reap.verify.session import TaskResult
from reap.verify.tasks import PrefillProgress
from reap.verify.verdict import comparable, compare, headline, judge
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
    assert "lost at 1,500 tokens: needle_value: found " in report["tasks"]["ladder"]["note"]


def test_a_ladder_that_ends_for_another_reason_does_not_say_that_the_needle_was_lost() -> None:
    report = report_of(doubles.AnswersFromThePrefixCache, tasks=["ladder"], lengths=[300, 1500, 2000])
    ladder = report["tasks"]["ladder"]
    assert ladder["note"].startswith("found, but ended at 1,500 tokens: prefix_cache_cold: found ")
    assert [item["found"] for item in ladder["data"]["needles"]] == [True, True]
    page = render_report(report)
    assert "Found at every length." not in page
    assert "Found, but ended at 1,500 tokens by prefix_cache_cold: found " in page


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


def test_a_slower_run_says_by_how_much() -> None:
    rows = compare({"ttft_s": 1.0, "prefill_tok_s": 1700.0, "decode_tok_s": 86.4}, REFERENCE, 0.9, 0.5)
    said = headline("passed-slower", rows)
    assert said == ("passed-slower (prefill 1700.0 tok/s, 85 % of published; decode 86.4 tok/s, 86 % of published)")
    assert headline("passed", compare({"ttft_s": 1.0}, REFERENCE, 0.9, 0.5)) == "passed"


def test_the_command_s_last_line_and_the_page_say_by_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with doubles.serving(doubles.Honest) as server:
        config = tmp_path / "verify.json"
        # The double's answer comes at about 300 tokens a second, a piece every 3 ms.
        reference = {"prompt_tokens": 2000, "ttft_s": 1e-6, "decode_tok_s": 1e6}
        settings = {"endpoint": server.url, "model": doubles.MODEL, "tasks": ["needle"], "needle_tokens": 2000,
                    "hardware": "spark", "reference": reference, "fail_below": 1e-9,
                    "evidence_dir": str(tmp_path / "evidence")}  # fmt: skip
        config.write_text(json.dumps(settings), encoding="utf-8")
        assert main(["verify", "--config", str(config), "--json"]) == 0
    *_rest, last, told = capsys.readouterr().out.splitlines()
    assert re.match(r"passed-slower \(TTFT \d+\.\d s, 0 % of published; decode \d+\.\d tok/s, 0 % of published\)", last)
    assert json.loads(told)["headline"] in last
    page = render_report(json.loads(next(tmp_path.glob("evidence/*/report.json")).read_text(encoding="utf-8")))
    assert "passed, but slower than published: time to first token at 0%, decode at 0%" in page


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


def test_a_long_prompt_shows_how_far_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefillProgress, "period", 0.05)
    seen: list[tuple[int, int | None, str]] = []

    def step(done: int, total: int | None, _unit: str, detail: str) -> None:
        if detail.startswith("reading the prompt"):
            seen.append((done, total, detail))

    with doubles.serving(doubles.ReadsSlowly) as server:
        settings = Settings(endpoint=server.url, model=doubles.MODEL, needle_tokens=2000, tasks=["needle"])
        assert verify(settings, step=step)["verdict"] == "passed"
    positions = [done for done, _total, _detail in seen]
    assert positions == sorted(positions)
    between = [done for done in positions if 0 < done < 2000]
    # A tenth of the prompt at each look.
    assert len(set(between)) >= 3
    assert {total for _done, total, _detail in seen} == {2000}


def test_the_position_in_a_prompt_is_right_with_several_kinds_of_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefillProgress, "period", 0.05)
    seen: list[int] = []

    def step(done: int, _total: int | None, _unit: str, detail: str) -> None:
        if detail.startswith("reading the prompt"):
            seen.append(done)

    with doubles.serving(doubles.ReadsAsDeepSeek) as server:
        settings = Settings(endpoint=server.url, model=doubles.MODEL, needle_tokens=2000, tasks=["needle"],
                            block_size=256, prefill_piece=200)  # fmt: skip
        assert verify(settings, step=step)["verdict"] == "passed"
    positions = sorted({done for done in seen if done})
    # The first look may come when some tenths are read: it counts as the first piece, and each tenth after it as one.
    assert positions[0] == 200
    assert len(positions) >= 4
    assert all(abs(later - earlier - 200) <= 5 for earlier, later in itertools.pairwise(positions[:-1]))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bare_command_says_on_a_terminal_how_far_it_is(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(PrefillProgress, "period", 0.05)
    with doubles.serving(doubles.ReadsSlowly) as server:
        arguments = ["--endpoint", server.url, "--model", doubles.MODEL, "--tasks", "smoke,needle"]
        assert main(["verify", *arguments, "--needle-tokens", "2000", "--out", str(tmp_path)]) == 0
    said = stream.getvalue()
    if not terminal:
        assert said == ""
        return
    assert "smoke, task 1 of 2" in said
    assert re.search(r"needle, task 2 of 2: reading the prompt, \d+ s so far, [\d,]+ of 2,000 tokens", said)
    # Nothing of it is left below the result.
    assert said.endswith("\r\x1b[K")
    assert "\x1b" not in capsys.readouterr().out


def programs(folder: Path, **scripts: str) -> Path:
    """Programs of these names that run these lines of shell."""
    for name, script in scripts.items():
        program = folder / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
    return folder


def test_host_identity_names_gpu_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'test "$1" = --query-gpu=name,driver_version && echo "NVIDIA GB10, 580.95.05"'
    monkeypatch.setenv("PATH", f"{programs(tmp_path, nvidia_smi=said)}:/usr/bin:/bin")
    found = host_identity()
    assert (found["gpu"], found["driver"]) == ("NVIDIA GB10", "580.95.05")
    assert found["kernel"]
    assert found["mem_total_kb"] > 0
    programs(tmp_path, nvidia_smi="echo 'No devices were found'; exit 6")
    assert (host_identity()["gpu"], host_identity()["driver"]) == (None, None)


def test_the_running_image_is_the_container_s_and_not_the_configured_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker = """
case "$*" in
"container inspect --format {{.Image}} c0ffee") echo sha256:abc ;;
"image inspect --format {{json .Config.Labels}} sha256:abc")
  echo '{"io.reap.patch-set": "5e7", "io.reap.router": "torch", "io.reap.base-id": "sha256:ba5e",
         "io.reap.base": "my/test:1", "io.reap.base-matched": "reference my/test:1",
         "io.reap.base-validated": "false"}' ;;
*) echo "no such object" >&2; exit 1 ;;
esac"""
    monkeypatch.setenv("PATH", f"{programs(tmp_path, docker=docker)}:/usr/bin:/bin")
    wanted = {
        "image_id": "sha256:abc",
        "patch_set": "5e7",
        "router": "torch",
        "base": "my/test:1",
        "base_id": "sha256:ba5e",
        "base_matched": "reference my/test:1",
        "base_validated": False,
    }
    assert running_image({"container_id": "c0ffee"}) == wanted
    assert running_image({"container_id": "gone"}) is None
    assert running_image({}) is None
    state = tmp_path / "service.json"
    state.write_text(json.dumps({"container_id": "c0ffee", "generation": "g"}), encoding="utf-8")
    report = report_of(tasks=["smoke"], service_file=str(state))
    assert report["identity"]["running"] == wanted
    assert "The image is made of my/test:1, which is NOT the validated image." in report["notes"]
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(report)))


@pytest.mark.parametrize(
    ("distance", "words"), [(-1024 * 1024, "1.00 GiB below the floor"), (2097152, "2.00 GiB above the floor")]
)
def test_the_page_says_on_which_side_of_the_floor(distance: int, words: str) -> None:
    report = report_of(tasks=["smoke"], sample_memory=True, floor_kb=1000)
    report["memory"]["distance_to_floor_kb"] = distance
    assert words in render_report(report)


def test_the_grid_says_that_a_found_needle_failed_another_check() -> None:
    report = report_of(doubles.AnswersFromThePrefixCache, tasks=["grid"], lengths=[1500], depths=[0.0, 1.0])
    page = render_report(report)
    assert "All needles found (✓). Of those found some failed another check: prefix_cache_cold." in page


def test_a_run_with_one_sample_of_memory_keeps_its_picture_in_shape() -> None:
    report = report_of(tasks=["smoke"], sample_memory=True)
    report["memory"]["samples"] = report["memory"]["samples"][:1]
    # The second phase has no ground of its own that would widen the axis.
    phases = [{"name": "smoke", "start_s": 0.0, "end_s": 3.0}, {"name": "needle", "start_s": 3.0, "end_s": 60.0}]
    report |= {"seconds": 60.0, "phases": phases}
    with warnings.catch_warnings():
        # Names of phases far outside the axis left no room for it.
        warnings.simplefilter("error")
        assert "Available memory during the run" in render_report(report)


COULD_NOT_RUN = [
    (doubles.WithoutUsage, {}, "streams no usage"),
    (doubles.Honest, {"model": "Other"}, "serves Double, not Other"),
    (doubles.WithoutMetrics, {}, "no vLLM metrics"),
    (doubles.ShorterContextUnderTheName, {}, "do not fit the served context"),
    (None, {}, "does not answer"),
]


@pytest.mark.parametrize(
    ("double", "changes", "words"), COULD_NOT_RUN, ids=lambda item: getattr(item, "__name__", None)
)
@pytest.mark.parametrize("passed_before", [False, True])
def test_a_generation_that_cannot_be_verified_is_evidence_and_gives_way(
    double: type[doubles.Honest] | None,
    changes: dict[str, Any],
    words: str,
    passed_before: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state, generations, evidence = tmp_path / "service.json", tmp_path / "generations.json", tmp_path / "evidence"
    state.write_text(json.dumps({"generation": "new"}), encoding="utf-8")
    generations.write_text(json.dumps({"good": ["new", "old"]}), encoding="utf-8")
    if passed_before:
        keep = {"verdict": "passed", "identity": {"service": {"generation": "new"}}}
        (evidence / "19990101T000000Z-x").mkdir(parents=True)
        (evidence / "19990101T000000Z-x" / "report.json").write_text(json.dumps(keep), encoding="utf-8")
    with doubles.serving(double or doubles.Honest) as server:
        if double is None:
            server.shutdown()
            server.server_close()
        settings = {"endpoint": server.url, "model": doubles.MODEL, "tasks": ["smoke"], "needle_tokens": 2000,
                    "service_file": str(state), "generations_file": str(generations),
                    "evidence_dir": str(evidence), **changes}  # fmt: skip
        config = tmp_path / "verify.json"
        config.write_text(json.dumps(settings), encoding="utf-8")
        assert main(["verify", "--config", str(config), "--json"]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert len(err.strip().splitlines()) == 1
    told = json.loads(out.splitlines()[-1])
    assert told["verdict"] == "could-not-run"
    assert words in told["failures"][0]
    assert told["go_back_to"] == (None if passed_before else "old")
    report = json.loads(Path(told["report"]).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    assert "could not be verified" in render_report(report)
    # What was known before is not thrown away: two runs are compared by it.
    assert report["vllm_version"] == (None if double is None or changes else "0.0-double")
    assert verified_before(evidence, report["subject"]) is None


def test_a_fault_of_who_asks_says_nothing_of_the_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, key = tmp_path / "service.json", tmp_path / "key"
    state.write_text(json.dumps({"generation": "new"}), encoding="utf-8")
    key.write_text("a\nb", encoding="utf-8")
    settings = {"model": doubles.MODEL, "service_file": str(state), "api_key_file": str(key),
                "evidence_dir": str(tmp_path / "evidence")}  # fmt: skip
    config = tmp_path / "verify.json"
    config.write_text(json.dumps(settings), encoding="utf-8")
    assert main(["verify", "--config", str(config), "--json"]) == 2
    assert capsys.readouterr().out == ""
    assert list((tmp_path / "evidence").iterdir()) == []


def test_the_published_settings_are_the_profile_s(tmp_path: Path) -> None:
    """Whoever has a Spark and not this recipe compares with the same figures, by the same rules."""
    data = json.loads((ROOT / "docs" / "verify-k144-nospec-200k.json").read_text(encoding="utf-8"))
    settings = Settings.from_mapping(data, "docs")
    assert settings.simulated is False
    wanted = settings_for("k144-nospec-200k", PROFILES["k144-nospec-200k"], {})
    # YAML has dates, JSON has none.
    wanted = json.loads(json.dumps(wanted, default=str))
    assert data == {**{name: wanted[name] for name in data if name in wanted}, "endpoint": "http://127.0.0.1:8000"}
    assert {"reference", "hardware", "profile", "floor_kb", "warmup_tokens", "max_model_len"} <= set(data)


def test_a_page_is_drawn_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with doubles.serving(doubles.Honest) as server:
        arguments = ["--endpoint", server.url, "--model", doubles.MODEL, "--tasks", "smoke", "--needle-tokens", "500"]
        assert main(["verify", *arguments, "--out", str(tmp_path)]) == 0
    run = next(tmp_path.iterdir())
    for folder in (run, tmp_path):
        assert pages.report.main([str(folder)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")
        assert "<h2>Tasks</h2>" in (run / "report.html").read_text(encoding="utf-8")
        (run / "report.html").unlink()
    for content in ('{"schema": "reap-verification/9"}', "half a rep", "[]", '{"schema": "reap-verification/1"}'):
        (run / "report.json").write_text(content, encoding="utf-8")
        assert pages.report.main([str(run)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert pages.report.main([str(tmp_path / "nothing")]) == 2
