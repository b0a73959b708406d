"""The page of all hosts: whose runs it shows, what it says differs, and what writes it at the end of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pages.fleet import RUNS, differences, latest_reports, write_index
from reap.verify import Settings, verify
from tests.support import lying_servers as doubles

ROOT = Path(__file__).resolve().parents[3]


def report(double: type[doubles.Honest] = doubles.Honest, **changes: Any) -> dict[str, Any]:
    with doubles.serving(double) as server:
        settings = Settings(endpoint=server.url, model=doubles.MODEL, needle_tokens=500, tasks=["smoke"], profile="p")
        return {**verify(settings), **changes}


def keep(artifacts: Path, host: str, stamp: str, data: dict[str, Any]) -> None:
    folder = artifacts / host / f"{stamp}-p"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({**data, "stamp": stamp}), encoding="utf-8")


def test_each_host_has_its_newest_run_and_a_failure_says_why(tmp_path: Path) -> None:
    good, bad = report(), report(doubles.AlwaysTheSameCode)
    keep(tmp_path, "spark-1", "20260101T000000Z", bad)
    keep(tmp_path, "spark-1", "20260102T000000Z", good)
    keep(tmp_path, "spark-2", "20260103T000000Z", bad)
    (tmp_path / "spark-3" / "20260103T000000Z-p").mkdir(parents=True)
    (tmp_path / "spark-3" / "20260103T000000Z-p" / "report.json").write_text("half a rep", encoding="utf-8")
    text = write_index(tmp_path).read_text(encoding="utf-8")
    assert "2 hosts: 1 passed, 0 passed but slower, 1 failed" in text
    assert 'href="spark-1/20260102T000000Z-p/report.html"' in text
    assert 'href="spark-1/20260101T000000Z-p/report.html"' in text
    assert bad["failures"][0].split(":")[0] in text
    assert "spark-3" not in text


def test_a_run_that_could_not_be_verified_is_no_tick_of_before(tmp_path: Path) -> None:
    keep(tmp_path, "spark-1", "20260101T000000Z", report())
    why = {"verdict": "could-not-run", "failures": ["it streams no usage"], "tasks": {}}
    keep(tmp_path, "spark-1", "20260102T000000Z", report(**why))
    text = write_index(tmp_path).read_text(encoding="utf-8")
    assert "1 hosts: 0 passed, 0 passed but slower, 0 failed, 1 could not be verified" in text
    assert "it streams no usage" in text
    assert '<td class="failed" data-name="verdict"><span>could-not-run' in text


def test_a_report_of_another_version_is_a_row_without_figures(tmp_path: Path) -> None:
    keep(tmp_path, "spark-1", "20260101T000000Z", report())
    keep(tmp_path, "spark-1", "20260102T000000Z", {"schema": "reap-verification/9", "verdict": ["new", "form"]})
    keep(tmp_path, "spark-2", "20260102T000000Z", {"schema": "reap-verification/1", "verdict": "passed"})
    text = write_index(tmp_path).read_text(encoding="utf-8")
    assert "2 hosts: 1 passed, 0 passed but slower, 0 failed, 1 could not be verified" in text
    assert "of another version" in text


def test_runs_of_the_bare_command_are_found_too(tmp_path: Path) -> None:
    folder = tmp_path / "20260101T000000Z-p"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report(host="spark-9")), encoding="utf-8")
    assert list(latest_reports(tmp_path)) == ["spark-9"]
    assert 'href="20260101T000000Z-p/report.html"' in write_index(tmp_path).read_text(encoding="utf-8")


def test_a_slower_host_says_by_how_much(tmp_path: Path) -> None:
    row = {
        "name": "decode_tok_s",
        "unit": "tokens/s",
        "found": 11.9,
        "reference": 13.9,
        "speed": 0.86,
        "state": "slower",
    }
    keep(tmp_path, "spark-1", "20260101T000000Z", report(verdict="passed-slower", comparison=[row]))
    assert "decode at 86%" in write_index(tmp_path).read_text(encoding="utf-8")


def test_of_many_runs_the_newest_are_read(tmp_path: Path) -> None:
    data = report()
    for day in range(1, RUNS + 5):
        keep(tmp_path, "spark-1", f"202601{day:02d}T000000Z", data)
    runs = latest_reports(tmp_path)["spark-1"]
    assert [run["stamp"] for _path, run in runs] == [f"202601{day:02d}T000000Z" for day in range(RUNS + 4, 4, -1)]


def test_what_differs_is_named_down_to_the_setting() -> None:
    one = {"profile": "p", "identity": {"settings": {"kv_cache_memory": "14G", "max_num_seqs": 1}, "image": "i"}}
    other = {"profile": "p", "identity": {"settings": {"kv_cache_memory": "5G", "max_num_seqs": 1}, "image": "i"}}
    assert differences({"a": one, "b": one}) == []
    assert differences({"a": one, "b": other}) == [("settings: kv_cache_memory", {"a": "14G", "b": "5G"})]
    assert ("image", {"a": "i", "b": "–"}) in differences({"a": one, "b": {"profile": "p"}})


def test_hosts_that_end_together_are_all_on_the_page(tmp_path: Path) -> None:
    """Each worker of a run writes the page after its own host's evidence; the last of them saw all."""
    program = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from pages.fleet import write_index
artifacts, host = Path({str(tmp_path)!r}), sys.argv[1]
folder = artifacts / host / "20260101T000000Z-p"
folder.mkdir(parents=True)
(folder / "report.json").write_bytes((artifacts / "report").read_bytes())
write_index(artifacts)
"""
    (tmp_path / "report").write_text(json.dumps(report()), encoding="utf-8")
    workers = [subprocess.Popen([sys.executable, "-c", program, f"spark-{number}"]) for number in range(4)]
    assert [worker.wait(timeout=600) for worker in workers] == [0] * 4
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "4 hosts: 4 passed" in text
