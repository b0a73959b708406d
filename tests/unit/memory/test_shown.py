"""The ledger as text and as a page."""

from __future__ import annotations

import html.parser
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pages.ledger import TERMS, render_ledger_page, render_ledger_svg
from reap.errors import ReapError
from reap.memory import FitRequest, HostMemory, advised_fit
from reap.memory.table import ledger_table
from reap.sizes import GIB

ROOT = Path(__file__).resolve().parents[3]
BASE = {
    "profile": "k144 <b>&",
    "routed_experts": 144,
    "kv_cache_memory": "14G",
    "max_model_len": 200000,
    "max_num_batched_tokens": 8192,
    "watchdog_min_available_kb": 8388608,
}


def result(host=None, **changes):
    return advised_fit(FitRequest.from_mapping({**BASE, **changes}), host or HostMemory(round(119.7 * GIB))).to_dict()


def test_the_table_adds_up_in_print():
    text = ledger_table(result())
    rows = dict(re.findall(r"^([a-zA-Z, ]+?)  +(-?\d+\.\d\d)", text, flags=re.MULTILINE))
    assert len(rows) == 7 + 4
    terms = [
        float(value)
        for name, value in rows.items()
        if name not in ("sum", "floor of the watchdog", "MemTotal", "left above the floor")
    ]
    assert sum(terms) == pytest.approx(float(rows["sum"]), abs=0.04)
    left = float(rows["MemTotal"]) - float(rows["floor of the watchdog"]) - float(rows["sum"])
    assert left == pytest.approx(float(rows["left above the floor"]), abs=0.011)


@pytest.mark.parametrize("width", [60, 100])
def test_the_table_is_plain_text(width):
    text = ledger_table(result(), width)
    assert text.isascii()
    assert all(line == line.rstrip() and len(line) <= max(width, 72) for line in text.splitlines())
    assert "762,036 tokens, 3.81x" in text
    assert "- kv_cache_memory reserves 14.00 GiB" in text
    assert "- " not in ledger_table(result(), width, advice=False).partition("MemTotal")[2]


def test_a_table_of_a_model_without_accounting():
    text = ledger_table(
        result(
            HostMemory(16 * GIB, 12 * GIB),
            routed_experts=None,
            weights_bytes=3000000,
            engine="cpu",
            kv_cache_memory="1G",
        )
    )
    assert "tokens" not in text.partition("\n- ")[0]


@pytest.mark.parametrize(
    "bad", [{}, {"ledger": None}, {"ledger": [{"name": "x"}]}, {**{"ledger": []}, "mem_total_bytes": "x"}]
)
def test_a_table_of_something_else(bad):
    with pytest.raises(ReapError, match="no result of memory_fit"):
        ledger_table(bad)


CASES = {
    "tight": result(),
    "fits": result(kv_cache_memory="5G"),
    "refuse": result(HostMemory(round(121.7 * GIB), 105 * GIB), mtp=True),
    "no accounting": result(
        HostMemory(16 * GIB, 12 * GIB), routed_experts=None, weights_bytes=3000000, engine="cpu", kv_cache_memory="1G"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_picture_holds_every_term_and_both_lines(name):
    figure = render_ledger_svg(CASES[name])
    drawings = re.findall(r"<svg.*?</svg>", figure, flags=re.DOTALL)
    assert len(drawings) == 2  # for a desk and for a phone
    for drawing in drawings:
        parsed = ElementTree.fromstring(drawing.replace("xlink:", ""))
        said = " ".join(" ".join(parsed.itertext()).split())
        for term in CASES[name]["ledger"]:
            assert f"{TERMS[term['name']][0]} {term['bytes'] / GIB:.2f}" in said
        total, floor = CASES[name]["mem_total_bytes"] / GIB, CASES[name]["floor_bytes"] / GIB
        assert f"MemTotal: {total:.1f}" in said
        assert f"MemTotal - floor: {total - floor:.1f}" in said
        assert "GiB" in said


class Page(html.parser.HTMLParser):
    """Tags that are open, and everything that would be loaded."""

    def __init__(self):
        super().__init__()
        self.loaded, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [
            value for key, value in attrs if key in ("src", "href") and value and not value.startswith(("#", "data:"))
        ]


@pytest.mark.parametrize("name", CASES)
def test_the_page_needs_nothing_else(name):
    text = render_ledger_page("spark-2822<script>", CASES[name])
    page = Page()
    page.feed(text)
    assert page.loaded == []
    assert "script" not in page.tags
    assert "spark-2822&lt;script&gt;" in text
    assert "k144 <b>&" not in text
    assert "prefers-color-scheme: dark" in text
    for line in CASES[name]["advice"]:
        assert line.replace("&", "&amp;") in text
    assert text == render_ledger_page("spark-2822<script>", CASES[name])


def playbook(tmp_path, fit, folder, *more):
    play = [
        {
            "hosts": "localhost",
            "gather_facts": False,
            "tasks": [{"name": "The page is drawn", "memory_page": {"fit": fit, "folder": str(folder)}}],
        }
    ]
    path = tmp_path / "play.json"
    path.write_text(json.dumps(play))
    program = Path(sys.executable).with_name("ansible-playbook")
    return subprocess.run(
        [program, "-i", "localhost,", "-c", "local", str(path), *more],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_action_writes_page_and_json(tmp_path):
    folder = tmp_path / "artifacts/spark-2822"
    done = playbook(tmp_path, {**CASES["tight"], "changed": False, "invocation": {}}, folder, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=0" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["memory.html", "memory.json"]
    assert json.loads((folder / "memory.json").read_text()) == CASES["tight"]
    assert "<svg" in (folder / "memory.html").read_text()


def test_the_action_says_what_is_wrong(tmp_path):
    done = playbook(tmp_path, {"ledger": "none"}, tmp_path / "x")
    assert done.returncode != 0
    assert "give what memory_fit returned" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "x").exists()
