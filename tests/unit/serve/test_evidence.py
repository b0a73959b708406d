"""What is kept of a wedged engine, and how much of it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from reap.serve.evidence import KEPT, newest, save, threads


def test_only_the_last_bundles_are_kept_and_the_newest_is_named(tmp_path: Path) -> None:
    for number in range(KEPT + 2):
        (tmp_path / f"20260101T00000{number}Z-wedge").mkdir()
    path = save(tmp_path, {"reason": "wedged: a request waits", "unix": 1.5})
    assert len(list(tmp_path.glob("*-wedge"))) == KEPT
    assert newest(tmp_path) == {"path": str(path), "reason": "wedged: a request waits", "unix": 1.5}


def test_a_damaged_bundle_is_passed_over(tmp_path: Path) -> None:
    for name, text in (("1", json.dumps({"reason": "r", "unix": 1})), ("2", "{")):
        (tmp_path / f"{name}-wedge").mkdir()
        (tmp_path / f"{name}-wedge/bundle.json").write_text(text)
    found = newest(tmp_path)
    assert found is not None
    assert found["path"].endswith("1-wedge/bundle.json")
    assert newest(tmp_path / "none") is None


def test_every_thread_of_a_process_is_seen_with_its_state() -> None:
    wait = threading.Event()
    thread = threading.Thread(target=wait.wait)
    thread.start()
    try:
        found = threads(os.getpid())
    finally:
        wait.set()
        thread.join()
    assert {os.getpid(), thread.native_id} <= {entry["tid"] for entry in found}
    assert all(entry["state"] in "RSDTZtI" for entry in found)


def test_a_process_that_is_gone_has_no_threads() -> None:
    assert threads(2**22 + 1) == []
