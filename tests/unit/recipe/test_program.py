"""The program that reaches the host."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SPEC = importlib.util.spec_from_file_location("reap_program", ROOT / "plugins" / "action" / "reap_program.py")
assert SPEC is not None
assert SPEC.loader is not None
PLUGIN = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PLUGIN)


def test_the_archive_runs_without_the_repository(tmp_path: Path) -> None:
    program = tmp_path / "reap"
    program.write_bytes(PLUGIN.build_zipapp(PLUGIN.PACKAGE))
    done = subprocess.run([sys.executable, "-I", str(program), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("reap ")


def test_every_subcommand_answers_help(tmp_path: Path) -> None:
    program = tmp_path / "reap"
    program.write_bytes(PLUGIN.build_zipapp(PLUGIN.PACKAGE))
    for command in ("fit", "patch", "fetch", "serve", "watch", "verify", "status"):
        done = subprocess.run(
            [sys.executable, "-I", str(program), command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    copy = tmp_path / "reap"
    shutil.copytree(PLUGIN.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert PLUGIN.build_zipapp(copy) == PLUGIN.build_zipapp(PLUGIN.PACKAGE)
    (copy / "errors.py").write_text("# changed\n")
    assert PLUGIN.build_zipapp(copy) != PLUGIN.build_zipapp(PLUGIN.PACKAGE)
