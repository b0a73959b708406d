"""Folders, locks, listing and removal; no hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reap.errors import ReapError
from reap.fetch import inuse, store
from reap.serve.config import ServiceConfig, service_settings
from reap.serve.generations import Generations
from reap.serve.state import boot_id

from .conftest import ROOT
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


def config(models: Path, commit: str) -> ServiceConfig:
    """What the service would be told to serve this revision."""
    profiles = yaml.safe_load((ROOT / "group_vars/all/profiles.yml").read_text())["reap_profiles"]
    told = {
        "profile": "sim-needle-32k", "profile_data": profiles["sim-needle-32k"], "image": "x", "entrypoint": "vllm",
        "model_dir": str(models / "org" / "m" / commit), "cache_dir": "/c", "host": "127.0.0.1", "port": 8000,
        "gpus": None, "ipc": "host", "ulimits": {}, "shm_size": None, "api_key_file": "/k", "api_key_required": False,
        "drop_page_cache": False, "state_dir": "/s", "run_dir": "/r", "evidence_dir": "/e", "timings": {},
    }  # fmt: skip
    return ServiceConfig.from_mapping(service_settings(told), "test")


def wanted(models: Path, commit: str) -> None:
    """Write the file that says what is to be served."""
    models.with_name("service.json").write_text(json.dumps(config(models, commit).to_mapping()))


def where(models: Path) -> list[str]:
    """Where this test's service has its files."""
    service, state, run = (models.with_name(name) for name in ("service.json", "state", "run.json"))
    return [f"--service-file={service}", f"--generations={state / 'generations'}", f"--service-state={run}"]


def prune(models: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reap", "fetch", f"--models={models}", *where(models), *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


def left(models: Path) -> list[str]:
    return sorted(p.name[0] for p in (models / "org" / "m").iterdir() if not p.name.startswith("."))


def test_revisions_are_listed_the_largest_first(models: Path) -> None:
    found = store.revisions(models)
    assert [(r.commit[0], r.state) for r in found[:3]] == [("a", "ready"), ("b", "ready"), ("c", "ready")]
    assert {r.state for r in found} == {"ready", "partial"}
    listed = json.loads(prune(models, "--list").stdout)["revisions"]
    assert len(listed) == 5


def test_unused_spares_the_served_the_previous_and_the_wanted(models: Path) -> None:
    """The previous one by the record that the service itself keeps, and that a rollback goes by."""
    record = Generations(models.with_name("state"))
    for commit in (BEFORE, SERVED):
        record.serves(config(models, commit))
    wanted(models, SERVED)
    previous = record.previous(config(models, SERVED).generation)
    assert previous is not None
    keep = f"--keep={models / 'org' / 'm' / WANTED}"
    told = prune(models, "--prune=unused", "--dry-run", keep)
    assert len(json.loads(told.stdout)["removed"]) == 2
    assert (models / "org" / "m" / OLD).exists()
    done = prune(models, "--prune=unused", keep)
    assert json.loads(done.stdout)["changed"]
    assert left(models) == ["b", "c", "d"]
    assert Path(previous.model_dir).exists()


def test_the_served_and_the_previous_model_are_never_removed(models: Path) -> None:
    Generations(models.with_name("state")).serves(config(models, BEFORE))
    wanted(models, SERVED)
    for commit in (SERVED, BEFORE):
        done = prune(models, f"--prune=org/m@{OLD}", f"--prune=org/m@{commit}")
        assert done.returncode == 2
        assert "is served, or the service could go back to it" in done.stderr
        # One refused, none removed.
        assert (models / "org" / "m" / OLD).exists()


def running(models: Path, generation: str) -> None:
    state = {"phase": "loading", "generation": generation, "boot_id": boot_id(), "pid": os.getpid()}
    models.with_name("run.json").write_text(json.dumps(state))


@pytest.mark.parametrize("what", ["service file", "generation", "running"])
def test_nothing_is_removed_when_it_is_unknown_what_is_served(models: Path, what: str) -> None:
    Generations(models.with_name("state")).serves(config(models, BEFORE))
    wanted(models, WANTED)
    if what == "service file":
        models.with_name("service.json").write_text("{")
    elif what == "generation":
        next(models.with_name("state").glob("generations/*.json")).write_text("{")
    else:
        # It is being loaded for the first time, and another one was asked for since.
        running(models, config(models, SERVED).generation)
    done = prune(models, "--prune=unused")
    assert done.returncode == 2
    assert "nothing was removed" in done.stderr
    assert len(store.revisions(models)) == 5


def test_what_runs_by_a_file_that_is_known_is_no_riddle(models: Path) -> None:
    wanted(models, SERVED)
    state, run = models.with_name("state") / "generations", models.with_name("run.json")
    running(models, config(models, SERVED).generation)
    found = inuse.models([models.with_name("service.json")], state, run)
    assert set(found) == {str(models / "org" / "m" / SERVED)}
    # A supervisor that is gone runs nothing, whatever it said last.
    running(models, "other")
    run.write_text(json.dumps(json.loads(run.read_text()) | {"boot_id": "before"}))
    assert inuse.models([models.with_name("service.json")], state, run) == found


def test_what_could_be_removed_are_not_the_models_in_use(models: Path) -> None:
    kept = [str(models / "org" / "m" / commit) for commit in (SERVED, BEFORE)]
    wanted_folder = models / "org" / "m" / WANTED
    with pytest.raises(ReapError, match="Could be removed") as caught:
        store.check_space(wanted_folder, 1, 1 << 60, models, kept)
    assert OLD in str(caught.value)
    assert not any(commit in str(caught.value) for commit in (SERVED, BEFORE))
    with pytest.raises(ReapError, match="none is named"):
        store.check_space(wanted_folder, 1, 1 << 60, models, None)


def test_what_a_removal_left_that_was_cut_off_is_listed_and_goes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reap.fetch.store.shutil.rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        store.prune(models, [f"org/m@{SERVED}"], [], dry_run=False)
    monkeypatch.undo()
    assert left(models) == ["a", "a", "c", "d"]
    (rest,) = [r for r in store.revisions(models) if r.state == "removing"]
    assert (rest.repo, rest.commit, rest.size >= 20_000) == ("org/m", SERVED, True)
    # The revision that came again meanwhile is another folder, and stays.
    again = models / "org" / "m" / SERVED
    again.mkdir()
    assert [r.state for r in store.prune(models, ["unused"], [str(r) for r in kept_all(models)], dry_run=False)] == [
        "removing"
    ]
    assert again.exists()
    assert not Path(rest.path).exists()


def kept_all(models: Path) -> list[Path]:
    return [models / "org" / "m" / commit for commit in (OLD, SERVED, BEFORE, WANTED)]


def test_the_lock_file_outlives_a_removal(models: Path) -> None:
    """Who waits for a lock holds the file: were it taken away, the next one would make another and hold that."""
    lock = store.lock_of(models / "org" / "m" / OLD)
    lock.touch()
    before = lock.stat().st_ino
    store.prune(models, [f"org/m@{OLD}"], [], dry_run=False)
    assert lock.stat().st_ino == before


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
