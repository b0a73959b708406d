"""``keep_status`` through ansible-playbook on this machine: the picture of a kill, and a bundle that was cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .test_page import BUNDLE

ROOT = Path(__file__).parents[3]


def keep(folder: Path, bundle: str) -> str:
    """Keep the status of a host whose last kill left this bundle; returns what the play said."""
    remote = folder / "evidence" / "20261101T000000Z-kill" / "bundle.json"
    remote.parent.mkdir(parents=True, exist_ok=True)
    remote.write_text(bundle)
    status = {"line": "absent: killed", "evidence": str(remote)}
    tasks = [
        {"keep_status": {"status": status, "folder": str(folder / "kept")}, "register": "kept"},
        {"ansible.builtin.debug": {"msg": "page: {{ kept.page | default('none') }}"}},
    ]
    book = folder / "play.yml"
    book.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "one,", "-c", "local", str(book),
         "-e", f"ansible_python_interpreter={sys.executable}"],
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "COLUMNS": "300"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "kept" / "status.json").read_text()) == status
    return " ".join((done.stdout + done.stderr).split())


def test_the_picture_of_the_last_kill_is_drawn_beside_its_evidence(tmp_path: Path) -> None:
    said = keep(tmp_path, json.dumps(BUNDLE))
    page = tmp_path / "kept" / "watchdog" / "20261101T000000Z-kill" / "series.html"
    assert f"page: {page}" in said
    assert "MemAvailable before and after the kill" in page.read_text()


def test_a_damaged_bundle_costs_the_picture_and_not_the_status(tmp_path: Path) -> None:
    whole = json.dumps(BUNDLE)
    said = keep(tmp_path, whole[: len(whole) // 2])
    assert "is damaged and cannot be drawn" in said
    assert "page: none" in said
    # Kept as it is, for a person; and drawn as soon as the host has the whole of it.
    kept = tmp_path / "kept" / "watchdog" / "20261101T000000Z-kill" / "bundle.json"
    assert kept.read_text() == whole[: len(whole) // 2]
    assert "page: none" not in keep(tmp_path, whole)
