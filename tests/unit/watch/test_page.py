"""The picture of a kill."""

from __future__ import annotations

from typing import Any

import pytest

from pages.memory_series import render_series_page, render_series_svg

BUNDLE: dict[str, Any] = {
    "event": {"event": "kill", "monotonic": 100.0, "phase": "serving", "reason": "kill: below <the floor>"},
    "lines_kb": {"floor": 8 << 20, "loading_floor": 6 << 20, "last_line": 5 << 20, "hard_floor": 3 << 20},
    "series": [[90.0 + n / 10, (10 << 20) - n * 30000 if n != 50 else -1] for n in range(130)],
    "processes_before": [],
    "processes_after": [{"pid": 7, "command": "vllm<", "rss_kb": 1 << 20}],
    "container_log": ["last words & more"],
    "journal": [],
    "kernel": ["NVRM: nothing left"],
}


def test_the_picture_shows_series_and_lines_in_the_pages_colours() -> None:
    svg = render_series_svg(BUNDLE)
    assert svg.count("<svg") == 2
    assert "var(--blue)" in svg
    assert "hard floor" in svg
    assert "loading floor" not in svg
    assert render_series_svg(BUNDLE) == svg


def test_the_last_line_is_shown_where_it_is_another_than_the_floor() -> None:
    assert "last line" in render_series_svg(BUNDLE)
    lines = {**BUNDLE["lines_kb"], "last_line": BUNDLE["lines_kb"]["floor"]}
    assert "last line" not in render_series_svg({**BUNDLE, "lines_kb": lines})


def test_a_load_shows_the_floor_of_loading() -> None:
    assert "loading floor" in render_series_svg({**BUNDLE, "event": {**BUNDLE["event"], "phase": "loading"}})


def test_the_page_escapes_what_it_was_given() -> None:
    page = render_series_page(BUNDLE)
    assert "vllm&lt;" in page
    assert "last words &amp; more" in page
    assert "NVRM: nothing left" in page
    assert "<the floor>" not in page


def test_something_else_is_refused() -> None:
    with pytest.raises(KeyError):
        render_series_svg({})
