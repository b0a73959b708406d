"""Memory series as data: each file in series/ says what happened to memory and what has to be decided."""

from __future__ import annotations

from pathlib import Path

import pytest

from reap.errors import ReapError
from reap.watch.series import check, parse, parse_kb, parse_seconds, replay

FILES = sorted((Path(__file__).parent / "series").glob("*.series"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_decisions_on_a_series_are_those_it_expects(path: Path) -> None:
    series = parse(path.read_text(encoding="utf-8"), path.name)
    assert series.expectations, f"{path.name} expects nothing"
    assert check(series, replay(series)) == []


def test_sizes_and_times_are_1024_based_kb_and_seconds() -> None:
    assert parse_kb("8G") == 8388608
    assert parse_kb("512M") == 524288
    assert parse_kb("42") == 42
    assert parse_seconds("150ms") == pytest.approx(0.15)
    assert parse_seconds("-2h") == -7200


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("phase asleep", "asleep"),
        ("3s towards 2G", "wanted: TIME to SIZE"),
        ("expect panic", "panic"),
        ("3s to 2T", "2T"),
        ("0s hold", "longer than 0 s"),
    ],
)
def test_a_bad_line_is_named_with_its_number(line: str, found: str) -> None:
    with pytest.raises(ReapError) as error:
        parse(f"limits floor 8G hard 3G\nstart 10G\n{line}\n", "bad.series")
    assert "bad.series:3" in str(error.value)
    assert found in str(error.value)


def test_an_expectation_that_is_not_met_is_reported() -> None:
    """The check itself can fail: the same series with the opposite expectation."""
    series = parse("limits floor 8G hard 3G\nstart 10G\n2s to 4G\n1s hold\nexpect no kill\nexpect shed\n")
    failures = check(series, replay(series))
    assert len(failures) == 2
    assert "kill: MemAvailable" in failures[0]


def test_the_series_answers_between_its_points_and_after_its_end() -> None:
    series = parse("limits floor 8G hard 3G\nstart 10G\n2s to 8G\n1s unreadable\n1s hold\n")
    assert series.at(1.0) == parse_kb("9G")
    assert series.at(2.5) is None
    assert series.at(99.0) == parse_kb("8G")
    assert series.length == pytest.approx(4.0)


def test_an_absent_phase_has_no_target() -> None:
    text = "limits floor 8G hard 3G\nphase absent\nstart 10G\n1s to 1G\n1s hold\n"
    assert replay(parse(text)) == []
