"""The driver of gpu-proof-full against a double of vLLM: a program that logs and streams as vLLM 0.22.0 does."""

from pathlib import Path
from typing import Any

import pytest

from reap.fetch.plan import config_problems
from tests.gpu import full_server

DOUBLE = """
import http.server, json, os, sys, time

print("(Worker pid=7) INFO [gpu_model_runner.py:5132] Model loading took 86.12 GiB memory and 31.250000 seconds")
print("(EngineCore pid=6) INFO [kv_cache_utils.py:1733] GPU KV cache size: 762,036 tokens")
print("(EngineCore pid=6) INFO [kv_cache_utils.py:1734] Maximum concurrency for 200,000 tokens per request: 3.81x")
if os.environ.get("DOUBLE_REFUSES"):
    sys.exit("RuntimeError: Unsupported expert number: 144")
print("(Worker pid=7) INFO [gpu_model_runner.py:6456] Graph capturing finished in 4 secs, took 0.20 GiB", flush=True)


def remember(**values):
    with open(os.environ["REAP_GPU_MEMORY_RECORD"], "a") as out:
        out.write(json.dumps({"at": time.time(), **values}) + "\\n")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        remember(allocated=100 << 30, reserved=101 << 30, peak=120 << 30)
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        remember(allocated=101 << 30, reserved=103 << 30, peak=102 << 30)
        self.send_response(200)
        self.end_headers()
        for number in range(body["max_tokens"]):
            self.event({"choices": [{"text": f" w{number}"}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\\n\\n")

    def event(self, data):
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\\n\\n")

    def log_message(self, *_):
        pass


port = int(sys.argv[sys.argv.index("--port") + 1])
assert sys.argv[sys.argv.index("--load-format") + 1] == "dummy"
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that holds the double only, and no GPU to ask."""
    site = tmp_path / "site-packages"
    main = site / "vllm" / "entrypoints" / "cli" / "main.py"
    main.parent.mkdir(parents=True)
    main.write_text(DOUBLE, encoding="utf-8")
    monkeypatch.setattr(full_server, "SITE_PACKAGES", site)
    monkeypatch.setattr(full_server, "gpu_used", lambda: 104.0)
    monkeypatch.setattr(full_server, "_reap", lambda *words, **_: {"ok": words[1] == "selftest"})
    work = tmp_path / "work"
    full_server.write_model(work / "model")
    return work


def test_a_patched_phase_measures_the_long_prompt(work: Path, tmp_path: Path) -> None:
    result = full_server.patched("torch", work, tmp_path)
    assert full_server.judge(result, 186390, 762036) is None
    assert [answer["prompt_tokens"] for answer in result["prompts"]] == [8192 + 186390 % 8192, 186390, 186390]
    assert result["memory_ready"] == {"allocated": 100.0, "reserved": 101.0, "device": 104.0}
    assert {answer["peak_allocated_gib"] for answer in result["prompts"]} == {102.0}
    assert result["logged"] == {
        "loading_gib": 86.12,
        "loading_s": 31.25,
        "kv_tokens": 762036,
        "kv_concurrency": 3.81,
        "graphs_s": 4,
        "graphs_gib": 0.2,
    }
    where = {"date": "2026-11-24", "gpu": "a GPU", "capability": [9, 0], "driver": "1", "cuda": "13.0", "torch": "2.11"}
    where |= {"triton": "3.6", "transformers": "5", "python": "3.12", "vllm": "0.22.0"}
    fit = full_server.predicted(full_server.PROFILE, 140 * 2**30)
    report = full_server.markdown({"environment": where, "predicted": fit, "phases": [{**result, "passed": True}]})
    assert "| KV cache, tokens | 762,036 | 762,036 |" in report


def test_the_unpatched_server_has_to_refuse(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering = full_server.unpatched(work, tmp_path)
    assert (answering["passed"], answering["problem"]) == (False, "it answered a prompt")
    monkeypatch.setenv("DOUBLE_REFUSES", "1")
    refusing = full_server.unpatched(work, tmp_path)
    assert refusing["passed"], refusing
    assert refusing["said"] == "RuntimeError: Unsupported expert number: 144"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"problem": "it did not get ready"}, "did not get ready"),
        ({"selftest": {"ok": False, "problem": "differs"}}, "self-test: differs"),
        ({"logged": {"kv_tokens": 1}}, "wanted 762036"),
        ({"prompts": [{}, {"prompt_tokens": 5, "output_tokens": 64}]}, "5 tokens in"),
    ],
)
def test_a_phase_that_misses_a_figure_has_failed(change: dict[str, Any], said: str) -> None:
    good = {
        "problem": None,
        "selftest": {"ok": True},
        "logged": {"kv_tokens": 762036},
        "prompts": [{}, {"prompt_tokens": 186390, "output_tokens": 64}],
    }
    assert full_server.judge(good, 186390, 762036) is None
    assert said in str(full_server.judge({**good, **change}, 186390, 762036))


def test_the_model_has_the_profile_s_geometry(tmp_path: Path) -> None:
    full_server.write_model(tmp_path)
    expected = full_server.profile_of(full_server.PROFILE).model_expect
    assert config_problems(tmp_path / "config.json", expected) == []
