"""The role on this machine, against doubles: what a run says when it passed, could not be made or could not begin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import lying_servers as doubles

ROOT = Path(__file__).resolve().parents[3]
PROFILE = (
    "{{ reap_profiles['sim-needle-32k'] | combine({'served_model_name': served, 'max_model_len': 4096, "
    "'needle_tokens': 500, 'model_revision': 'x', 'verify_tasks': none}) }}"
)


def play(folder: Path, url: str, **more: Any) -> tuple[int, str]:
    """Run the role with everything of it below a folder; returns the exit status and the host's line."""
    variables = {
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "verify_force": True,
        "reap_profile": "sim-needle-32k", "reap_artifacts_dir": str(folder / "artifacts"), "served": doubles.MODEL,
        "verify_profile": PROFILE, "verify_endpoint": url, "verify_model_dir": doubles.ROOT, "verify_tasks": ["smoke"],
        "verify_program": str(folder / "reap"), "verify_etc_dir": str(folder / "etc"),
        "verify_evidence_dir": str(folder / "evidence"), "verify_run_dir": str(folder / "run"),
        "verify_generations_file": str(folder / "generations.json"), "verify_api_key_file": str(folder / "key"),
        "verify_identity": {"image": "x"}, "reap_service_program": str(folder / "none"), **more,
    }  # fmt: skip
    for name in ("etc", "run"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "group_vars").symlink_to(ROOT / "group_vars")
    (folder / "hosts.yml").write_text(yaml.safe_dump({"sparks": {"hosts": {"me": variables}}}), encoding="utf-8")
    plays = [{"hosts": "sparks", "gather_facts": False, "roles": [{"role": "verify"}]}]
    (folder / "play.yml").write_text(yaml.safe_dump(plays), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(folder / "hosts.yml")]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "REAP_PROGRESS": "off"}
    done = subprocess.run(
        [*command, str(folder / "play.yml")], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("me  ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode, lines[-1]


@pytest.mark.skipif(os.geteuid() != 0, reason="the role writes files that belong to root")
class TestTheRole:
    def test_a_run_that_passed_is_in_the_host_s_line(self, tmp_path: Path) -> None:
        with doubles.serving(doubles.Honest) as server:
            status, line = play(tmp_path, server.url)
        assert status == 0, line
        assert "verification passed; " in line

    def test_a_run_that_could_not_be_made_is_a_failed_run_with_evidence(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "service.json").write_text('{"generation": "new"}', encoding="utf-8")
        (tmp_path / "generations.json").write_text('{"good": ["new", "old"]}', encoding="utf-8")
        with doubles.serving(doubles.Honest) as server:
            status, line = play(tmp_path, server.url, served="Other")
        assert status != 0
        assert "verification could not run" in line
        # There is no service here that could go back; that it was tried is what is seen.
        assert "the generation before, old, could not be brought back" in line
        assert "serves Double, not Other" in line
        report = json.loads(next(tmp_path.glob("artifacts/me/*/report.json")).read_text(encoding="utf-8"))
        assert report["verdict"] == "could-not-run"
        assert "could-not-run" in (tmp_path / "artifacts" / "index.html").read_text(encoding="utf-8")

    def test_a_fault_of_who_asks_is_said_and_nothing_gives_way(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("secret\nmaterial", encoding="utf-8")
        with doubles.serving(doubles.Honest) as server:
            status, line = play(tmp_path, server.url)
        assert status != 0
        assert "the API key holds a line break" in line
        assert "secret" not in line
        assert not (tmp_path / "artifacts").exists()
