"""Needles, checkers, metrics, memory samples: each judged by what it must refuse as well."""

from __future__ import annotations

import random
import threading
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reap.verify import prompts
from reap.verify.checks import (
    bare,
    language_share,
    mojibake,
    parse_flowchart,
    refusal,
    repetition,
    schema_problem,
    shorten,
)
from reap.verify.client import CouldNotRun
from reap.verify.metrics import parse_metrics
from reap.verify.needle import Messages, Needle, build_prompt, filler_sentence, new_code
from reap.verify.sampler import MemorySampler
from tests.support.lying_servers import tokens


def bytes_counter(messages: Messages) -> int:
    return 11 + len(messages[0]["content"].encode())


def words_counter(messages: Messages) -> int:
    return 7 + len(tokens(messages[0]["content"]))


def merging_counter(messages: Messages) -> int:
    """Four characters or a part of them are a token, whatever they are: single characters often change nothing."""
    return 5 + -(-len(messages[0]["content"]) // 4)


COUNTERS = [bytes_counter, words_counter, merging_counter]


@pytest.mark.parametrize("counter", COUNTERS)
@given(wanted=st.integers(150, 3000), depth=st.floats(0, 1), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_a_prompt_has_exactly_the_wanted_number_of_tokens(counter, wanted, depth, seed) -> None:  # type: ignore[no-untyped-def]
    if counter is bytes_counter:
        wanted += 200
    needle = Needle("The secret code is ABCD-EFGH.", depth)
    prompt = build_prompt(wanted, [needle], "What is it?", counter, random.Random(seed), label="run/1")
    assert prompt.exact
    assert counter(prompt.messages) == prompt.tokens == wanted
    text = prompt.messages[0]["content"]
    assert text.count(needle.sentence) == 1
    assert text.startswith("[run/1]")
    assert text.endswith("What is it?")


def test_a_long_prompt_needs_few_measurements() -> None:
    calls = 0

    def counting(messages: Messages) -> int:
        nonlocal calls
        calls += 1
        return words_counter(messages)

    prompt = build_prompt(186_390, [Needle("N.", 0.5)], "Q?", counting, random.Random(1), label="x")
    assert prompt.tokens == 186_390
    assert calls <= 40


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_needle_stands_at_its_depth(depth: float) -> None:
    prompt = build_prompt(4000, [Needle("<<N>>", depth)], "Q?", words_counter, random.Random(2), label="x")
    text = prompt.messages[0]["content"]
    assert text.index("<<N>>") / len(text) == pytest.approx(depth, abs=0.04)


def test_a_prompt_too_short_for_the_question_is_refused() -> None:
    with pytest.raises(CouldNotRun, match="ask for more tokens"):
        build_prompt(10, [Needle("N", 0)], "Q?", bytes_counter, random.Random(1), label="x")


def test_filler_does_not_repeat_into_compressibility() -> None:
    rng = random.Random(3)
    text = " ".join(filler_sentence(rng) for _ in range(4000)).encode()
    repeated = (text[:400] * (len(text) // 400)).strip()
    assert len(zlib.compress(text, 9)) / len(text) > 0.25
    words = text.split()
    runs = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    assert len(set(runs)) > 0.99 * len(runs)
    assert len(zlib.compress(repeated, 9)) / len(repeated) < 0.02


def test_codes_do_not_meet() -> None:
    rng = random.Random(4)
    assert len({new_code(rng) for _ in range(5000)}) == 5000


def test_repetition_finds_loops_and_leaves_prose_alone() -> None:
    rng = random.Random(5)
    prose = " ".join(filler_sentence(rng) for _ in range(60))
    assert repetition(prose) is None
    assert repetition(prose + " and then the light went out again" * 60) is not None
    assert repetition("哈" * 400) is not None
    assert repetition("short") is None


@pytest.mark.parametrize("text", ["Grüße, 東京, שלום, 👩‍🚀 and naïve café", "Â propos", "line\nnext\ttab"])
def test_mojibake_leaves_good_text_alone(text: str) -> None:
    assert mojibake(text) is None


@pytest.mark.parametrize(
    "text", ["Gr\u00c3\u00bc\u00c3\u009fe", "don\u00e2\u20ac\u2122t", "a\ufffdb", "a\x00b", "\u00f0\u0178\u2018\u0081"]
)
def test_mojibake_is_found(text: str) -> None:
    assert mojibake(text) is not None


@given(st.text(alphabet="äöüßéèñçåøæœ", min_size=1, max_size=40))
def test_text_read_with_the_wrong_character_set_is_found(text: str) -> None:
    assert mojibake(text.encode().decode("latin-1")) is not None


def test_refusals() -> None:
    assert refusal("I'm sorry, but I can't help with that.") is not None
    assert refusal("I can’t discuss religion.") is not None
    assert refusal("Kant cannot help but insist on the duty.") is None


def test_languages() -> None:
    german = "Das Fasten ist im Islam ein Gebot und die Zeit des Ramadan ist nicht nur für den Einzelnen von Bedeutung"
    english = "The fast is one of the duties of the faith, and it is kept by all who are able to do so in the month"
    assert language_share(german, "German") > 0.12 > language_share(english, "German")
    assert language_share(english, "English") > 0.12 > language_share(german, "English")
    assert language_share("東京の夏は暑い", "Japanese") > 0.9


GOOD_CHART = """
flowchart TD
    S[Start] --> B(Build)
    B --> T{Test passes?}
    T -->|yes| D[["Deploy"]]
    T -- no --> B
    subgraph done
      D
    end
    style D fill:#0f0
"""


def test_a_flowchart_is_parsed() -> None:
    chart = parse_flowchart(GOOD_CHART)
    assert chart.nodes == {"S": "Start", "B": "Build", "T": "Test passes?", "D": "Deploy"}
    assert ("T", "B", "no") in chart.edges
    assert ("T", "D", "yes") in chart.edges


@pytest.mark.parametrize(
    "source",
    ["", "sequenceDiagram\nA->>B: x", "graph XX\nA --> B", "graph TD\nA -->", "graph TD\nA[Start --> B",
     "graph TD\n--> B", "graph TD\nsubgraph x\nA --> B", "graph TD\nA --> B\nend", "graph TD\nA gets B"],
)  # fmt: skip
def test_what_is_no_flowchart_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_flowchart(source)


def failed(checks: list[prompts.Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def test_mermaid_answers() -> None:
    assert failed(prompts.mermaid_graph(f"```mermaid{GOOD_CHART}```")) == set()
    assert failed(prompts.mermaid_graph("Start --> Build --> Test --> Deploy")) == {"mermaid_block"}
    assert failed(prompts.mermaid_graph("```mermaid\ngraph TD\nStart -> ->\n```")) == {"mermaid_parses"}
    no_loop = "```mermaid\ngraph LR\nStart --> Build --> Test --> Deploy\n```"
    assert failed(prompts.mermaid_graph(no_loop)) == {"mermaid_edge_test_build"}


def test_ascii_answers() -> None:
    box = "```\n+----------+\n|  SPARK   |\n|          |\n+----------+\n```"
    assert failed(prompts.ascii_box(box)) == set()
    assert failed(prompts.ascii_box(box.replace("SPARK", "SPORK"))) == {"box_text"}
    assert failed(prompts.ascii_box(box.replace("-", "─"))) == {"ascii_only", "box_closed"}
    assert "box_closed" in failed(prompts.ascii_box(box.replace("|          |\n", "")))


def test_the_planted_fault_must_be_named_and_mended() -> None:
    good = "range(len(values) + 1) is an off-by-one error: use\n```python\nfor i in range(len(values)):\n```"
    assert failed(prompts.names_the_bug(good)) == set()
    assert failed(prompts.names_the_bug("The function divides by zero for an empty list.")) == {
        "bug_named",
        "bug_fixed",
    }
    assert prompts.BUGGY.count("+ 1") == 1


def test_prose_is_judged_by_length_language_and_shape() -> None:
    task = next(task for task in prompts.PROMPTS if task.name == "religion")
    german = "Das Fasten ist im Islam ein Gebot, und im Ramadan ist es für die Gläubigen eine Zeit der Stille. "
    other = "Im Christentum ist das Fasten vor Ostern, im Judentum der Jom Kippur; das ist nicht ein und das Gleiche. "
    third = (
        "Die Regeln sind von Ort zu Ort verschieden, und die Menschen halten sich auf ihre Weise daran, mit Freude. "
    )
    assert failed(prompts.prose(task, german + other + third + "Und so ist das in der Welt. " * 1 + "x" * 100)) == set()
    assert "language" in failed(prompts.prose(task, "The fast is one of the duties of the faith. " * 12))
    assert "no_repetition" in failed(prompts.prose(task, german * 30))
    assert failed(prompts.prose(task, "")) == {"length"}


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_tool_arguments_against_a_schema() -> None:
    assert schema_problem({"city": "Paris", "days": 2, "unit": "C"}, SCHEMA) is None
    for wrong in (
        {},
        {"city": 5},
        {"city": "x", "days": True},
        {"city": "x", "unit": "K"},
        {"city": "x", "more": 1},
        [],
    ):
        assert schema_problem(wrong, SCHEMA) is not None


def test_unicode_samples_fit_a_copying_model() -> None:
    for _name, sample in prompts.UNICODE_SAMPLES:
        assert len(sample.encode()) <= 40
        assert not set(sample) & set(".\n,;\"'`)<")


def test_answers_are_bared_and_texts_shortened() -> None:
    assert bare(' **"K7QM-93FX"**. ') == "K7QM-93FX"
    assert shorten("x" * 100, 10).startswith("xxxxx\n[... 90 characters")
    assert shorten("short", 10) == "short"


def test_metrics_are_summed_over_labels() -> None:
    snapshot = parse_metrics(
        '# HELP x\nvllm:prompt_tokens_total{engine="0"} 5.0\nvllm:prompt_tokens_total{engine="1"} 7\n'
        'vllm:cache_config_info{block_size="256",num_gpu_blocks="12"} 1.0\nbroken line\nother NaN-ish\n'
    )
    assert snapshot.get("vllm:prompt_tokens_total") == 12
    assert snapshot.kv_tokens() == 3072
    assert snapshot.growth(parse_metrics("vllm:prompt_tokens_total 2"), "vllm:prompt_tokens_total") == 10
    assert snapshot.growth(parse_metrics(""), "vllm:prompt_tokens_total") is None


def test_memory_is_sampled_and_its_lowest_point_kept(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    values = iter([9_000, 4_000, *[8_000] * 1000])
    taken = threading.Event()

    class Feed:
        def read_text(self, **_options: str) -> str:
            value = next(values)
            if value == 8_000:
                taken.set()
            return f"MemTotal: 1 kB\nMemAvailable:    {value} kB\n"

    with MemorySampler(time.monotonic(), 200.0, Feed()) as sampler:  # type: ignore[arg-type]
        assert taken.wait(10)
    summary = sampler.summary([{"name": "needle", "start_s": 0.0, "end_s": 60.0}], 5_000, kept=3)
    assert summary is not None
    assert summary["min_kb"] == 4_000
    assert summary["min_phase"] == "needle"
    assert summary["distance_to_floor_kb"] == -1_000
    assert len(summary["samples"]) <= 3
    assert [kb for _t, kb in summary["samples"] if kb == 4_000] == [4_000]
    assert not meminfo.exists()
