"""What `reap status` says of the watchdog, and the page that playbooks/status.yml draws."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from reap.cli import status
from reap.serve.state import boot_id

CALM: dict[str, Any] = {
    "phase": "serving", "guarding": True, "mem_available_kb": 1, "floor_kb": 1, "hard_floor_kb": 1, "kills": 0,
    "sheds": 0, "stops_in_window": 0, "budget": 5, "latched": False,
    "hold_until_available_kb": None, "last_event": None,
}  # fmt: skip


def line_of(folder: Path, **changes: object) -> str:
    state = {"boot_id": boot_id(), "pid": os.getpid(), **CALM, **changes}
    (folder / "watchdog.json").write_text(json.dumps(state))
    return status.one_line(status.collect(folder, folder))


def test_a_calm_watchdog_is_one_phrase(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    assert "watchdog on guard, 0 kills, 0 of 5 stops in the budget's window; never verified" in line


def test_a_container_that_is_not_held_is_said_and_none_is_no_alarm(tmp_path: Path) -> None:
    assert "CONTAINER IS NOT GUARDED: journalctl -u reap-watchdog" in line_of(tmp_path, guarding=False)
    assert "NOT GUARDED" not in line_of(tmp_path, guarding=None)


def test_a_hold_says_how_much_has_to_be_free(tmp_path: Path) -> None:
    assert "no start until 100.0 GiB are available" in line_of(tmp_path, hold_until_available_kb=100 << 20)


def test_a_latch_says_how_it_is_lifted(tmp_path: Path) -> None:
    line = line_of(tmp_path, latched=True, hold_until_available_kb=999 << 20)
    assert "LATCHED, no start until: reap watch --lift" in line
    assert "999" not in line


@pytest.mark.parametrize("gone", [{"pid": 0}, {"boot_id": "another"}])
def test_a_watchdog_that_does_not_run_is_not_believed(tmp_path: Path, gone: dict[str, object]) -> None:
    assert "NO WATCHDOG RUNS: systemctl start reap-watchdog" in line_of(tmp_path, **gone)


def test_the_newest_bundle_is_named_wherever_it_was_kept(tmp_path: Path) -> None:
    assert status.collect(tmp_path, tmp_path)["evidence"] is None
    old = tmp_path / "disk/watchdog/20260101T000000Z-kill/bundle.json"
    new = tmp_path / "run/evidence/20260102T000000Z-kill/bundle.json"
    for bundle in (old, new):
        bundle.parent.mkdir(parents=True)
        bundle.write_text("{}")
    found = status.collect(tmp_path / "run", tmp_path / "disk")
    assert found["evidence"] == str(new)
    assert found["verification"] is None
