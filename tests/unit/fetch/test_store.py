"""Folders, locks, listing and removal; no hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reap.errors import ReapError
from reap.fetch import store

from .test_download import environment

OLD, SERVED, BEFORE, WANTED = ("a" * 40, "b" * 40, "c" * 40, "d" * 40)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    for commit, size in ((OLD, 30_000), (SERVED, 20_000), (BEFORE, 10_000), (WANTED, 5_000)):
        (folder / "org" / "m" / commit).mkdir(parents=True)
        (folder / "org" / "m" / commit / "model.bin").write_bytes(bytes(size))
        (folder / "org" / "m" / commit / "reap-manifest.json").write_text("{}")
    (folder / "org" / "m" / f"{OLD}.partial").mkdir()
    return folder


def service(path: Path, model: Path) -> Path:
    path.write_text(json.dumps({"profile": "x", "fit": {"model_dir": str(model)}}))
    return path


def prune(models: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reap", "fetch", f"--models={models}", *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


def test_revisions_are_listed_the_largest_first(models: Path) -> None:
    found = store.revisions(models)
    assert [(r.commit[0], r.state) for r in found[:3]] == [("a", "ready"), ("b", "ready"), ("c", "ready")]
    assert {r.state for r in found} == {"ready", "partial"}
    listed = json.loads(prune(models, "--list").stdout)["revisions"]
    assert len(listed) == 5


def test_unused_spares_the_served_the_previous_and_the_wanted(models: Path, tmp_path: Path) -> None:
    now = service(tmp_path / "now.json", models / "org" / "m" / SERVED)
    before = service(tmp_path / "before.json", models / "org" / "m" / BEFORE)
    arguments = [f"--service-file={now}", f"--service-file={before}", f"--keep={models / 'org' / 'm' / WANTED}"]
    told = prune(models, "--prune=unused", "--dry-run", *arguments)
    assert len(json.loads(told.stdout)["removed"]) == 2
    assert (models / "org" / "m" / OLD).exists()
    done = prune(models, "--prune=unused", *arguments)
    assert json.loads(done.stdout)["changed"]
    assert sorted(p.name[0] for p in (models / "org" / "m").iterdir() if not p.name.startswith(".")) == ["b", "c", "d"]


def test_the_served_model_is_never_removed(models: Path, tmp_path: Path) -> None:
    now = service(tmp_path / "now.json", models / "org" / "m" / SERVED)
    done = prune(models, f"--prune=org/m@{OLD}", f"--prune=org/m@{SERVED}", f"--service-file={now}")
    assert done.returncode == 2
    assert "is served or the one to go back to" in done.stderr
    # One refused, none removed.
    assert (models / "org" / "m" / OLD).exists()


def test_nothing_is_removed_when_it_is_unknown_what_is_served(models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "now.json"
    broken.write_text("{")
    done = prune(models, "--prune=unused", f"--service-file={broken}")
    assert done.returncode == 2
    assert "nothing was removed" in done.stderr
    assert len(store.revisions(models)) == 5


def test_an_unknown_name_names_what_there_is(models: Path) -> None:
    with pytest.raises(ReapError, match=f"there are: .*org/m@{SERVED}"):
        store.prune(models, ["org/other@" + "e" * 40], [], dry_run=True)


def test_a_revision_that_is_being_fetched_is_not_removed(models: Path) -> None:
    with (
        store.exclusive(models / "org" / "m" / OLD, lambda _: None),
        pytest.raises(ReapError, match=f"process {os.getpid()} is already fetching"),
    ):
        store.prune(models, [f"org/m@{OLD}"], [], dry_run=False)
    assert (models / "org" / "m" / OLD / "model.bin").exists()


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    dest = tmp_path / "org" / "m" / OLD
    program = (
        "import sys, pathlib; from reap.fetch import store\n"
        "with store.exclusive(pathlib.Path(sys.argv[1]), print):\n print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(dest)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ReapError, match=str(holder.pid)), store.exclusive(dest, lambda _: None, limit_s=0):
        pass
    holder.kill()
    holder.communicate()
    with store.exclusive(dest, lambda _: None, limit_s=0):
        pass


def test_a_plan_of_another_revision_is_not_used(tmp_path: Path) -> None:
    partial = store.Partial(tmp_path / OLD)
    partial.open()
    (partial.work / "plan.json").write_text(json.dumps({"repo": "org/m", "commit": OLD, "files": []}))
    assert partial.load_plan("org/m", SERVED) is None
    assert partial.load_plan("org/m", OLD) is None
