"""What cannot be verified is one line and exit status 2; what can be done without is done without, and said."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from reap.cli import main
from reap.verify import CouldNotRun, Settings, verify
from tests.support import lying_servers as doubles


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["verify", *arguments])
    return status, capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], words: str, *arguments: str) -> str:
    status, error = run(capsys, *arguments)
    assert status == 2
    assert words in error
    assert len(error.strip().splitlines()) == 1
    return error


def short(server: doubles.DoubleServer, out: Path) -> list[str]:
    return ["--endpoint", server.url, "--model", doubles.MODEL, "--needle-tokens", "500", "--out", str(out)]


def test_endpoint_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with doubles.serving(doubles.Honest) as server:
        url = server.url
    refused(capsys, "does not answer", "--endpoint", url, "--model", "x", "--out", str(tmp_path))


def test_wrong_key(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REAP_API_KEY", "wrong-key-material")
    with doubles.serving(doubles.WantsAKey) as server:
        error = refused(capsys, "refuses the API key", *short(server, tmp_path), "--tasks", "smoke")
    assert "wrong-key-material" not in error


def test_right_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REAP_API_KEY", "right")
    with doubles.serving(doubles.WantsAKey) as server:
        assert main(["verify", *short(server, tmp_path), "--tasks", "smoke"]) == 0
    report = next(tmp_path.glob("*/report.json")).read_text(encoding="utf-8")
    assert "Bearer" not in report


def test_no_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with doubles.serving(doubles.WithoutUsage) as server:
        refused(capsys, "streams no usage", *short(server, tmp_path))


def test_no_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with doubles.serving(doubles.WithoutMetrics) as server:
        refused(capsys, "no vLLM metrics", *short(server, tmp_path))


def test_no_metrics_when_they_are_optional() -> None:
    with doubles.serving(doubles.WithoutMetrics) as server:
        report = verify(
            Settings(endpoint=server.url, model=doubles.MODEL, needle_tokens=500, metrics="optional", tasks=["needle"])
        )
    assert report["verdict"] == "passed"
    assert any("not proved cold" in note for note in report["notes"])


def test_no_tokenizer_is_an_estimate_and_said() -> None:
    with doubles.serving(doubles.WithoutTokenizer) as server:
        report = verify(Settings(endpoint=server.url, model=doubles.MODEL, needle_tokens=1500, tasks=["needle"]))
    assert report["verdict"] == "passed"
    needle = report["long_prompts"][0]
    assert needle["measured_by"] == "estimate"
    assert needle["exact"] is False
    # The figure is the server's own, near the wanted one.
    assert needle["tokens"] == report["prompt_tokens"]
    assert abs(needle["tokens"] - 1500) < 300
    assert any("/tokenize" in note for note in report["notes"])


def test_target_above_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with doubles.serving(doubles.Honest) as server:
        arguments = ["--endpoint", server.url, "--model", doubles.MODEL, "--out", str(tmp_path)]
        refused(capsys, "do not fit the served context of 4096", *arguments, "--needle-tokens", "4000")
        refused(capsys, "do not fit", *arguments, "--needle-tokens", "4000", "--max-model-len", "4096")
        lengths = ["--suite", "full", "--lengths", "500,5000", "--needle-tokens", "500"]
        refused(capsys, "needle of 5000 tokens and answer of 1536 do not fit", *arguments, *lengths)


def test_output_folder_not_writable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with doubles.serving(doubles.Honest) as server:
        refused(capsys, "is not writable", *short(server, file / "evidence"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --config FILE, or --endpoint URL and --model NAME"),
        (["--endpoint", "127.0.0.1:8000", "--model", "x"], "wanted a URL"),
        (["--endpoint", "http://127.0.0.1:notaport", "--model", "x"], "endpoint is"),
        (["--endpoint", "http://a..b:80", "--model", "x"], "endpoint is 'http://a..b:80'"),
        (["--endpoint", "http://[::1", "--model", "x"], "endpoint is 'http://[::1'"),
        (["--endpoint", f"http://{'a' * 64}.example", "--model", "x"], "wanted a URL"),
        (["--endpoint", "http://127.0.0.1:1/v\u00e9", "--model", "x"], "a character that no URL has"),
        (["--endpoint", "http://127.0.0.1:1/a b", "--model", "x"], "a character that no URL has"),
        (["--config", "/nonexistent/verify.json"], "cannot be read"),
        (["--endpoint", "http://127.0.0.1:1", "--model", "x", "--needle-depth", "1.5"], "wanted a number from 0 to 1"),
        (["--endpoint", "http://127.0.0.1:1", "--model", "x", "--tasks", "smoek"], "no task is called smoek"),
        (["--endpoint", "http://127.0.0.1:1", "--model", "x", "--repeats", "0"], "repeats is 0"),
        (["--endpoint", "http://127.0.0.1:1", "--model", "x", "--lengths", "8k"], "--lengths is '8k'"),
        (["--endpoint", "http://127.0.0.1:1", "--model", "x", "--warmup-tokens", "-1"], "warmup_tokens is -1"),
    ],
)
def test_wrong_use(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, words, *arguments)


def test_unknown_setting(tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    path.write_text(json.dumps({"model": "x", "neddle_tokens": 5}), encoding="utf-8")
    with pytest.raises(CouldNotRun, match="neddle_tokens, which is no setting"):
        Settings.from_file(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lengths", 8000), ("repeats", "3"), ("thinking", "yes"), ("total_s", None), ("identity", []), ("depths", ["0"]),
     ("memory_hertz", 0), ("answer_max_tokens", 0), ("needle_tokens", True)],
)  # fmt: skip
def test_settings_of_the_wrong_type(name: str, value: object) -> None:
    with pytest.raises(CouldNotRun, match=f"^{name} is .*wanted "):
        Settings.from_mapping({"model": "x", name: value}, "a test")


@pytest.mark.parametrize(
    "key", ["secret\nmaterial", "secret-m\u00e4terial", "secret\u2019material", "secret\0material"]
)
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "key"
    file.write_text(key, encoding="utf-8")
    config = tmp_path / "verify.json"
    settings = {"model": doubles.MODEL, "api_key_file": str(file), "evidence_dir": str(tmp_path / "evidence")}
    config.write_text(json.dumps(settings), encoding="utf-8")
    error = refused(capsys, "the API key holds", "--config", str(config))
    assert "secret" not in error
    assert "material" not in error
    file.write_bytes(b"secret\xff\xfematerial")
    assert "secret" not in refused(capsys, "is no text", "--config", str(config))


def test_a_key_from_the_environment_may_end_in_a_line_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REAP_API_KEY", "right\n")
    with doubles.serving(doubles.WantsAKey) as server:
        assert main(["verify", *short(server, tmp_path), "--tasks", "smoke"]) == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("reap.verify.evidence.write_atomic", full)
    with doubles.serving(doubles.Honest) as server:
        error = refused(capsys, "No space left on device", *short(server, tmp_path), "--tasks", "smoke")
    assert "the verdict was passed" in error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reap.verify.tasks.bare", stopped)
    with doubles.serving(doubles.Honest) as server:
        refused(capsys, "interrupted", *short(server, tmp_path), "--tasks", "smoke")


def test_what_is_no_api_at_all_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with doubles.serving(doubles.ListsModelsAsADeepHole) as server:
        refused(capsys, "is it an OpenAI-compatible endpoint?", *short(server, tmp_path))


def test_another_model_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with doubles.serving(doubles.Honest) as server:
        arguments = ["--endpoint", server.url, "--model", "Other", "--out", str(tmp_path)]
        refused(capsys, "serves Double, not Other", *arguments)
