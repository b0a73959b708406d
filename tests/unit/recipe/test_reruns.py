"""What the demo and the benchmark of a second run take for an answer."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from sim.demo import newest_report

ROOT = Path(__file__).resolve().parents[3]
RECAP = """\
TASK [A task that says changed=0 of something else] ***
PLAY RECAP *********************************************************************
spark-a                    : ok=20   changed={}    unreachable=0    failed=0    skipped=9    rescued=0    ignored=0
spark-b                    : ok=20   changed={}    unreachable=0    failed=0    skipped=9    rescued=0    ignored=0

HOSTS **************************************************************************
spark-a  ok      changed=0
"""


@pytest.fixture(scope="module")
def rerun() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rerun", ROOT / "tests" / "benchmarks" / "rerun.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("output", "good"),
    [
        (RECAP.format(0, 0), True),
        (RECAP.format(0, 1), False),
        (RECAP.format(1, 0), False),
        (RECAP.format(10, 0), False),
        ("TASK [changed=0 ] ***\n", False),
        ("PLAY RECAP ***\n\n", False),
    ],
)
def test_a_run_is_converged_where_every_host_of_its_recap_changed_nothing(
    rerun: ModuleType, output: str, good: bool
) -> None:
    assert rerun.converged(output) is good


def test_the_newest_report_is_one_of_this_run(tmp_path: Path) -> None:
    assert newest_report(tmp_path) is None
    for name, seconds in (("old", 100), ("new", 200)):
        page = tmp_path / name / "report.html"
        page.parent.mkdir()
        page.touch()
        os.utime(page, (seconds, seconds))
    assert newest_report(tmp_path) == tmp_path / "new" / "report.html"
    assert newest_report(tmp_path, since=150) == tmp_path / "new" / "report.html"
    assert newest_report(tmp_path, since=201) is None
