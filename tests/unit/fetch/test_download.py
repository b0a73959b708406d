"""The download against a real hub: what heals, what is refused, and that nothing half-done gets the final name."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap.errors import ReapError
from reap.fetch import manifest, worker
from reap.fetch import store as store_module
from reap.fetch.plan import Want
from reap.fetch.state import inspect
from sim.hub import sample
from sim.hub.server import Hub

from .conftest import REPO, TOKEN, Site, contents

SECOND = "*/model-00002-of-00003.safetensors"


def on(path: str = SECOND, **fault: Any) -> dict[str, Any]:
    return {"path": path, "method": "GET", **fault}


def test_a_fresh_download_is_whole_and_verified(site: Site) -> None:
    outcome = site.fetch(expect={"model_type": "deepseek_v4", "n_routed_experts": 144})
    assert outcome.changed
    assert site.is_whole()
    record = manifest.load(site.dest)
    assert record is not None
    assert (record.repo, record.commit, set(record.files)) == (REPO, site.revision, set(contents(site.source)))
    assert not any(path.is_symlink() for path in site.dest.rglob("*"))
    assert not store_module.partial_of(site.dest).exists()


def test_a_second_run_reads_and_fetches_nothing(site: Site) -> None:
    site.fetch()
    site.hub.log.clear()
    # All zeros now, under the old name, size and time: only a run that reads would notice.
    for path in site.dest.glob("*.safetensors"):
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    outcome = site.fetch()
    assert (outcome.changed, outcome.read, outcome.fetched) == (False, 0, 0)
    assert site.hub.log.lines(1) == ""


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"flip_byte": 1000, "times": 1}, id="flipped byte"),
        pytest.param({"cut_after": 100_000, "times": 2}, id="connection cut"),
        pytest.param({"stall_after": 50_000, "times": 1}, id="stalled connection"),
        pytest.param({"bytes_per_s": 1, "times": 1}, id="one byte a second"),
        pytest.param({"status": 503, "retry_after": 1, "times": 2}, id="503"),
        pytest.param({"status": 429, "retry_after": 1, "times": 1}, id="429"),
        pytest.param({"status": 500, "times": 1}, id="500"),
        pytest.param({"truncate": 1000, "times": 1}, id="truncated"),
    ],
)
def test_what_passes_heals(site: Site, fault: dict[str, Any]) -> None:
    site.faults(on(**fault))
    # Two of these are a connection that stands still.
    site.fetch(settings={"stall_s": 1.5})
    assert site.is_whole()


def test_a_cut_connection_is_continued_where_it_was(site: Site, tmp_path: Path) -> None:
    shutil.rmtree(site.source)
    sample.write(site.source, shards=1, shard_bytes=8 << 20)
    site.faults(on("*.safetensors", cut_after=5 << 20, times=1))
    site.fetch()
    offsets = [line["offset"] for line in site.got() if line["path"].endswith(".safetensors")]
    assert len(offsets) == 2
    # What was written is not fetched again; at most the piece in memory is.
    assert offsets[1] >= (5 << 20) - (1 << 20)
    assert site.is_whole()


def test_a_begun_file_that_a_power_cut_left_with_zeros_costs_that_file_alone(site: Site) -> None:
    """A filesystem may have the length on disk and not yet the data. The damage is made here; no power was cut."""
    name = SECOND.removeprefix("*/")
    whole = (site.source / name).read_bytes()
    partial = store_module.Partial(site.dest)
    partial.open()
    want = Want(name, len(whole), hashlib.sha256(whole).hexdigest())
    partial.part(want).write_bytes(whole[:100_000] + bytes(50_000))
    site.fetch()
    assert site.is_whole()
    got = [(Path(line["path"]).name, line["offset"]) for line in site.got()]
    assert [offset for name_, offset in got if name_ == name] == [150_000, 0]
    assert len(got) == 1 + len(contents(site.source))


def test_a_pause_that_the_hub_asks_for_is_no_stall(site: Site) -> None:
    site.faults(on(status=429, retry_after=4, times=1))
    site.fetch(settings={"stall_s": 1.0})
    assert site.is_whole()
    assert len([line for line in site.got() if line["status"] == 429]) == 1


def test_what_signs_an_address_is_told_nowhere() -> None:
    hidden = worker._hide("GET https://cdn.example/a/b?X-Amz-Signature=abc&Policy=x timed out")
    assert hidden == "GET https://cdn.example/a/b?*** timed out"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        pytest.param([{"path": SECOND, "method": "GET", "flip_byte": 9}], "wrong content", id="always flipped"),
        pytest.param([{"path": SECOND, "etag": "0" * 64}], "contradicts itself", id="wrong ETag"),
        pytest.param([{"path": SECOND, "sha256": "0" * 64}], "contradicts itself|wrong content", id="wrong sha256"),
        pytest.param([{"path": SECOND, "truncate": 77}], "contradicts itself", id="always truncated"),
        pytest.param([{"path": SECOND, "status": 404, "error_code": "EntryNotFound"}], "does not have it", id="404"),
        pytest.param([{"path": SECOND, "hide": True}], "names model-00002-of-00003.safetensors", id="missing shard"),
        pytest.param([{"path": SECOND, "status": 401}], r"\(HTTP 401\): set HF_TOKEN to a token that may", id="401"),
        pytest.param([{"path": SECOND, "status": 403}], r"\(HTTP 403\): set HF_TOKEN to a token that may", id="403"),
    ],
)
def test_what_does_not_pass_is_named(site: Site, rules: list[dict[str, Any]], words: str) -> None:
    site.faults(*rules)
    with pytest.raises(ReapError, match=words) as caught:
        site.fetch()
    assert "\n" not in str(caught.value)
    assert not site.dest.exists()


def test_a_downloader_that_is_slow_to_start_is_no_stalled_connection(site: Site, tmp_path: Path) -> None:
    """As on a host that is busy: each of its processes takes longer to start than a connection may be silent."""
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {site.python} "$@"\n')
    slow.chmod(0o755)
    site.fetch(settings={"python": str(slow), "stall_s": 1.5})
    assert site.is_whole()


def test_a_gated_repository_says_what_to_do(site: Site) -> None:
    site.faults(access={REPO: {"kind": "gated", "token_sha256": []}})
    with pytest.raises(ReapError, match="accept its terms"):
        site.fetch()


def test_a_wrong_revision_is_named(site: Site) -> None:
    other = "1" * 40
    with pytest.raises(ReapError, match="no such commit"):
        site.fetch(revision=other, dest=site.models / REPO / other)


def test_a_branch_is_refused(site: Site) -> None:
    with pytest.raises(ReapError, match="branch or a tag can move"):
        site.fetch(revision="main")


def test_a_hub_that_is_down_is_named_after_the_patience(site: Site) -> None:
    with pytest.raises(ReapError, match=r"127\.0\.0\.1:9 has not sent a byte"):
        site.fetch(settings={"endpoint": "http://127.0.0.1:9", "patience_s": 3.0})


def test_another_checkpoint_is_one_error_before_its_weights(site: Site) -> None:
    with pytest.raises(ReapError, match="n_routed_experts is 144, wanted 128") as caught:
        site.fetch(expect={"n_routed_experts": 128, "model_type": "deepseek_v4"})
    assert "\n" not in str(caught.value)
    assert not site.dest.exists()
    assert {Path(line["path"]).name for line in site.got()} == {"config.json"}


def test_a_shard_that_the_index_does_not_name_is_told(site: Site) -> None:
    (site.source / "model-00009-of-00003.safetensors").write_bytes(sample.shard("x", b"1234"))
    outcome = site.fetch()
    assert outcome.warnings == [
        "model-00009-of-00003.safetensors is named by no entry of model.safetensors.index.json; it is not loaded"
    ]


def test_a_shard_that_was_uploaded_broken_is_refused(site: Site) -> None:
    path = site.source / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ReapError, match="model-00003-of-00003"):
        site.fetch()
    assert not site.dest.exists()


def test_a_storage_host_gets_the_bytes_asked_for_and_no_token(site: Site, serve: Callable[[Path], Hub]) -> None:
    storage = serve(site.source.parents[1])
    site.faults({"path": "*.safetensors", "redirect": storage.url})
    site.fetch(settings={"token": TOKEN})
    assert site.is_whole()
    elsewhere = [json.loads(line) for line in storage.log.lines(60).splitlines()]
    assert len(elsewhere) == 3
    assert not any(line["authorized"] for line in elsewhere)
    assert all(line["authorized"] for line in site.got())


def test_an_address_at_a_storage_host_that_has_expired_is_asked_for_again(
    site: Site, serve: Callable[[Path], Hub]
) -> None:
    """The token has nothing to do with it."""
    storage = serve(site.source.parents[1])
    storage.faults.replace({"rules": [{"path": "*.safetensors", "method": "GET", "status": 403, "times": 1}]})
    site.faults({"path": "*.safetensors", "redirect": storage.url})
    site.fetch(settings={"token": TOKEN})
    assert site.is_whole()


def test_a_kill_while_a_damaged_folder_goes_back_forgets_no_damage(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.fetch()
    victim = site.dest / "model-00001-of-00003.safetensors"
    before = victim.stat()
    data = bytearray(victim.read_bytes())
    data[0] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(before.st_mtime_ns, before.st_mtime_ns))
    taken_back = store_module.Partial.take_back

    def killed(self: store_module.Partial) -> None:
        taken_back(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module.Partial, "take_back", killed)
    with pytest.raises(KeyboardInterrupt):
        site.fetch(verify="full")
    monkeypatch.undo()
    site.fetch()
    assert site.is_whole()


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "config.json"])
def test_one_damaged_file_is_fetched_again_alone(site: Site, name: str) -> None:
    site.fetch()
    site.hub.log.clear()
    victim = site.dest / name
    before = victim.stat()
    data = bytearray(victim.read_bytes())
    data[0] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(before.st_mtime_ns, before.st_mtime_ns))
    # Same size, time and inode: only a full look finds it.
    assert not site.fetch().changed
    outcome = site.fetch(verify="full", expect={"model_type": "deepseek_v4"})
    assert outcome.changed
    assert len(outcome.repaired) == 1
    assert site.is_whole()
    assert [Path(line["path"]).name for line in site.got()] == [victim.name]


def test_a_missing_and_a_truncated_file_are_found_without_reading(site: Site) -> None:
    site.fetch()
    (site.dest / "README.md").unlink()
    os.truncate(site.dest / "model-00002-of-00003.safetensors", 10)
    state = inspect(REPO, site.revision, site.dest, {})
    assert not state.ready
    assert len(state.reasons) == 2
    assert site.fetch().changed
    assert site.is_whole()


def test_a_touched_file_is_read_again_and_not_fetched(site: Site) -> None:
    site.fetch()
    site.hub.log.clear()
    (site.dest / "README.md").touch()
    outcome = site.fetch()
    assert (outcome.changed, outcome.read, outcome.fetched) == (True, 8, 0)
    assert site.hub.log.lines(1) == ""
    assert site.fetch().read == 0


def test_an_extra_file_that_a_server_could_load_is_named(site: Site) -> None:
    site.fetch()
    (site.dest / "extra.safetensors").write_bytes(b"x")
    (site.dest / "notes.md").write_text("mine")
    with pytest.raises(ReapError, match=r"extra\.safetensors, which the revision does not have"):
        site.fetch()
    assert (site.dest / "extra.safetensors").exists()


def test_a_folder_of_links_is_no_model(site: Site, tmp_path: Path) -> None:
    site.fetch()
    moved = tmp_path / "elsewhere.safetensors"
    target = site.dest / "model-00001-of-00003.safetensors"
    shutil.copy2(target, moved)
    target.unlink()
    target.symlink_to(moved)
    assert inspect(REPO, site.revision, site.dest, {}).reasons == [f"{target.name} is a link, wanted a plain file"]
    site.fetch()
    assert not target.is_symlink()
    assert site.is_whole()


def test_a_folder_without_a_manifest_is_verified_and_completed(site: Site) -> None:
    """Somebody copied it by hand, and one file was cut off."""
    shutil.copytree(site.source, site.dest)
    os.truncate(site.dest / "model-00003-of-00003.safetensors", 1000)
    site.hub.log.clear()
    outcome = site.fetch()
    assert outcome.changed
    assert site.is_whole()
    assert [Path(line["path"]).name for line in site.got()] == ["model-00003-of-00003.safetensors"]


def test_space_is_checked_before_the_first_byte(site: Site) -> None:
    old = site.models / "org" / "old" / ("a" * 40)
    old.mkdir(parents=True)
    (old / "big.bin").write_bytes(bytes(100_000))
    with pytest.raises(ReapError, match=r"free; wanted .*org/old/a{40} \(unverified"):
        site.fetch(reserve=1 << 60)
    assert site.got() == []


def test_a_full_disk_is_named_and_the_next_run_continues(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is made here; a filesystem that is really full is in the role's scenario on a simulated host."""
    error = store_module.disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), site.dest)
    assert "No space left" in str(error)
    assert "free space" in str(error)
    accept = store_module.Partial.accept

    def full(self: store_module.Partial, want: Any, entry: Any) -> None:
        if want.name.startswith("model-00002"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.part(want)))
        accept(self, want, entry)

    monkeypatch.setattr(store_module.Partial, "accept", full)
    with pytest.raises(ReapError, match="No space left"):
        site.fetch(settings={"workers": 1})
    monkeypatch.undo()
    site.hub.log.clear()
    site.fetch()
    assert site.is_whole()
    assert "model-00001-of-00003.safetensors" not in {Path(line["path"]).name for line in site.got()}


def test_a_folder_that_cannot_be_written_is_named(site: Site) -> None:
    site.models.parent.joinpath("file").write_text("no folder")
    with pytest.raises(ReapError, match="file"):
        site.fetch(dest=site.models.parent / "file" / "x")


def test_two_runs_at_once_fetch_once(site: Site) -> None:
    site.faults(connection_bytes_per_s=400_000)
    both = [
        subprocess.Popen(site.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    changed = sorted(json.loads(out.splitlines()[-1])["changed"] for out, _ in results)
    assert changed == [False, True]
    names = [line["path"] for line in site.got()]
    assert len(names) == len(set(names))


def environment(**more: str) -> dict[str, str]:
    root = Path(__file__).parents[3]
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(root / "plugins/module_utils"), **more}


def test_the_token_is_in_no_command_line_log_or_file(site: Site) -> None:
    site.faults(
        connection_bytes_per_s=300_000,
        access={REPO: {"kind": "gated", "token_sha256": [hashlib.sha256(TOKEN.encode()).hexdigest()]}},
    )
    progress = site.models.parent / "progress.json"
    process = subprocess.Popen(
        site.command(f"--progress={progress}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(HF_TOKEN=TOKEN),
    )
    lines: set[str] = set()
    while process.poll() is None:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    lines.add((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue
        time.sleep(0.05)
    out, err = process.communicate()
    assert process.returncode == 0, err
    # It did look at the right processes.
    assert any("reap.fetch.worker" in line for line in lines)
    assert not any(TOKEN in line for line in lines)
    assert TOKEN not in out + err
    for path in site.models.parent.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_a_message_of_the_hub_that_quotes_the_token_is_masked(site: Site) -> None:
    site.faults({"path": "/api/*", "status": 418, "message": f"you sent {TOKEN}"})
    done = subprocess.run(
        [*site.command("--patience=0")], capture_output=True, text=True, env=environment(HF_TOKEN=TOKEN), check=False
    )
    assert done.returncode == 2
    assert "***" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_note_of_a_hub_that_quotes_the_token_is_in_no_progress_file(site: Site) -> None:
    """While it tries again, and at the end. One quote is where the message is cut: half a token is no less a token."""
    quotes = f"you sent {TOKEN} " + "x" * 230 + TOKEN
    # The library itself repeats a request that was answered with 503, and says then nothing of the hub's message.
    site.faults({"path": "/api/*", "status": 409, "message": quotes})
    progress = site.models.parent / "progress.json"
    process = subprocess.Popen(
        site.command("--patience=300", f"--progress={progress}"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(HF_TOKEN=TOKEN),
    )  # fmt: skip
    seen: set[str] = set()
    limit = time.monotonic() + 120
    while not any("you sent ***" in text and "trying again" in text for text in seen):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, seen
        if progress.exists():
            seen.add(progress.read_text())
        time.sleep(0.02)
    # No trying again helps against this answer.
    site.faults({"path": "/api/*", "status": 401, "message": quotes})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    for text in (*seen, progress.read_text(), out, err):
        assert TOKEN[:12] not in text


def test_the_hub_is_the_one_that_the_environment_names(site: Site) -> None:
    command = [word for word in site.command() if not word.startswith("--endpoint")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(HF_ENDPOINT=site.hub.url), check=False
    )
    assert done.returncode == 0, done.stderr
    assert site.is_whole()


def test_a_clock_that_jumps_bends_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 86400))
    monkeypatch.setattr("time.time", lambda: float(1_000_000_000 - next(clock)))
    site.fetch()
    assert site.is_whole()
    assert not site.fetch().changed


def test_the_downloader_that_is_missing_is_named(site: Site) -> None:
    with pytest.raises(ReapError, match="install its virtual environment"):
        site.fetch(settings={"python": "/nonexistent/python"})
    with pytest.raises(ReapError, match="install the downloader"):
        # The tests' own interpreter has no huggingface_hub.
        site.fetch(settings={"python": sys.executable})


def test_the_plan_is_kept_so_a_second_start_needs_no_listing(site: Site) -> None:
    site.faults(on(status=404, error_code="EntryNotFound"))
    with pytest.raises(ReapError):
        site.fetch()
    site.faults({"path": "/api/*", "status": 404})
    site.fetch()
    assert site.is_whole()


def test_check_says_ready_and_not(site: Site) -> None:
    command = site.command("--check")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, json.loads(done.stdout)["reasons"]) == (1, ["not there"])
    site.fetch()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, json.loads(done.stdout)["ready"]) == (0, True)


def test_outcome_names_are_stable(site: Site) -> None:
    """Playbooks read these names."""
    outcome = site.fetch()
    assert {"changed", "path", "size", "files", "fetched", "read", "source", "repaired", "warnings"} <= {
        field.name for field in dataclasses.fields(outcome)
    }
