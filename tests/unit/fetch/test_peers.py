"""What another host's key may do: ask, and read one verified revision. The copy itself is tried on simulated hosts."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from reap.errors import ReapError
from reap.fetch import engine, manifest, peers, plan, store

from .conftest import REPO, Site

READ = "rsync --server --sender -Ltre.iLsfxCIvu --timeout=60 --inplace . {}/"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "id",
        "have",
        "have ../x {commit}",
        "have org/model main",
        "rsync --server -Ltre.iLsfxCIvu . {dest}/",
        "rsync --server --sender --remove-source-files -Ltr . {dest}/",
        "rsync --server --sender --rsync-path=sh -Ltr . {dest}/",
        "rsync --server --sender -Ltr . {dest}/../../../../../etc/",
        "rsync --server --sender -Ltr . {models}/",
        "rsync --server --sender -Ltr . /etc/",
        "rsync --server --sender -Ltr . {link}/",
        "sh -c true; rsync --server --sender -Ltr . {dest}/",
    ],
)
def test_a_peers_key_does_nothing_else(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    site.fetch()
    link = site.models / "org" / "linked" / ("f" * 40)
    link.parent.mkdir(parents=True)
    link.symlink_to("/etc")
    monkeypatch.setattr("subprocess.run", lambda *_a, **_k: pytest.fail("it ran something"))
    words = command.format(dest=site.dest, models=site.models, link=link, commit=site.revision)
    assert peers.answer(site.models, words) == 2
    assert "nothing else" in capsys.readouterr().err


def test_a_whole_revision_is_read_by_one_at_a_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.fetch()
    ran: list[list[str]] = []

    class Done:
        returncode = 0

    monkeypatch.setattr("subprocess.run", lambda words, **_k: ran.append(words) or Done())
    assert peers.answer(site.models, READ.format(site.dest)) == 0
    assert ran == [READ.format(site.dest).split()]
    with (site.dest / "reap-manifest.json").open() as slot:
        fcntl.flock(slot, fcntl.LOCK_EX)
        assert peers.answer(site.models, READ.format(site.dest)) == 3
    # Damaged by its manifest: nothing to give.
    readme = site.dest / "README.md"
    os.truncate(readme, 1)
    assert peers.answer(site.models, READ.format(site.dest)) == 2
    # Links, as in a cache: whoever copied this folder could get links and report success.
    elsewhere = site.models / "blob"
    shutil.copy2(site.source / "README.md", elsewhere)
    readme.unlink()
    readme.symlink_to(elsewhere)
    assert peers.answer(site.models, READ.format(site.dest)) == 2
    assert len(ran) == 1


def test_have_tells_ready_filling_and_absent(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    def ask() -> dict[str, object]:
        assert peers.answer(site.models, f"have {REPO} {site.revision}") == 0
        value: dict[str, object] = json.loads(capsys.readouterr().out)
        return value

    assert ask()["state"] == "absent"
    partial = store.Partial(site.dest)
    partial.open()
    with store.exclusive(site.dest, lambda _: None):
        # It waits itself: to wait for it would be to wait for ever.
        assert ask()["state"] == "absent"
        (partial.work / peers.FILLING).touch()
        assert ask()["state"] == "filling"
    assert ask()["state"] == "absent"
    site.fetch()
    reply = ask()
    assert reply["state"] == "ready"
    assert isinstance(reply["files"], list)
    assert len(reply["files"]) == len([path for path in site.source.rglob("*") if path.is_file()])


def test_without_a_peer_that_answers_the_hub_is_next(site: Site) -> None:
    access = peers.Access(fixed=(peers.Peer("nobody@127.0.0.1", 9),))
    site.fetch(peers=access)
    assert site.is_whole()


BEGUN = 100_000


class Giver:
    """A double of ``Peers``: gives files by a local copy, and is gone after some and the begin of one more."""

    def __init__(self, source: Path, gives: int) -> None:
        self.source, self.gives = source, gives

    def __call__(self, *_: object) -> Giver:
        return self

    def take(self, partial: store.Partial, _known: object, have: Any, begin: Any, moved: Any) -> str | None:
        files = {name: path.read_bytes() for name, path in named(self.source).items()}
        theirs = {n: plan.Want(n, len(data), hashlib.sha256(data).hexdigest()) for n, data in files.items()}
        missing = begin(theirs, "spark@giver")
        # The small ones first: the hub names those by another hash than a giver does.
        order = sorted(missing, key=lambda name: missing[name].size)
        for name in order[: self.gives]:
            partial.part(missing[name]).write_bytes(files[name])
            moved({name: len(files[name])})
            entry, _ = manifest.verify(partial.part(missing[name]), missing[name])
            if entry is None:
                partial.part(missing[name]).unlink()
                return None
            partial.accept(missing[name], entry)
            have(entry)
        if self.gives >= len(missing):
            return "spark@giver"
        partial.landing.mkdir()
        begun = order[self.gives]
        (partial.landing / begun).write_bytes(files[begun][:BEGUN])
        return None


def named(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


ANYBODY = peers.Access(fixed=(peers.Peer("spark@giver"),))


def test_what_a_lost_peer_gave_is_completed_from_the_hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Peers", Giver(site.source, gives=5))
    outcome = site.fetch(peers=ANYBODY)
    assert site.is_whole()
    assert outcome.source == "hub"
    # Four small files, one shard and the begin of another came from the peer.
    shards = [line for line in site.got() if line["path"].endswith(".safetensors")]
    assert sorted(line["offset"] for line in shards) == [0, BEGUN]
    assert not site.fetch().changed


def test_what_the_hub_began_is_completed_from_a_peer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.faults({"path": "*/README.md", "status": 404, "error_code": "EntryNotFound"})
    with pytest.raises(ReapError, match=r"README\.md"):
        site.fetch(settings={"workers": 1})
    monkeypatch.setattr(engine, "Peers", Giver(site.source, gives=100))
    site.hub.log.clear()
    assert site.fetch(peers=ANYBODY).source == "peer:spark@giver"
    assert site.is_whole()
    assert site.got() == []


def test_what_a_peers_fetch_leaves_has_nothing_that_the_revision_has_not(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of somebody's in the unfinished folder: a server would load it from the ready one."""
    partial = store.Partial(site.dest)
    partial.open()
    (partial.folder / "model-00009-of-00003.safetensors").write_bytes(b"mine")
    monkeypatch.setattr(engine, "Peers", Giver(site.source, gives=100))
    site.fetch(peers=ANYBODY)
    assert site.is_whole()
    assert not site.fetch().changed


def test_a_file_that_comes_while_a_fetch_ends_is_no_part_of_the_revision(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = store.Partial.clean

    def late(self: store.Partial, wanted: Any) -> list[str]:
        removed = clean(self, wanted)
        (self.folder / "extra.safetensors").write_bytes(b"mine")
        return removed

    monkeypatch.setattr(store.Partial, "clean", late)
    monkeypatch.setattr(engine, "Peers", Giver(site.source, gives=100))
    for access in (ANYBODY, None):
        with pytest.raises(ReapError, match=r"holds extra\.safetensors, which the revision does not have"):
            site.fetch(peers=access)
        assert not site.dest.exists()


def test_what_has_begun_needs_no_room_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a peer and of the hub; a peer goes on with both."""
    asked: list[int] = []
    monkeypatch.setattr(store, "check_space", lambda _dest, missing, *_: asked.append(missing))
    files = named(site.source)
    name, other = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    partial = store.Partial(site.dest)
    partial.open()
    partial.landing.mkdir()
    (partial.landing / name).write_bytes(files[name].read_bytes()[:BEGUN])
    data = files[other].read_bytes()
    partial.part(plan.Want(other, len(data), hashlib.sha256(data).hexdigest())).write_bytes(data[:BEGUN])
    monkeypatch.setattr(engine, "Peers", Giver(site.source, gives=100))
    site.fetch(peers=ANYBODY)
    assert asked == [sum(path.stat().st_size for path in files.values()) - 2 * BEGUN]
    assert site.is_whole()


def test_a_host_of_an_offline_fleet_that_has_not_the_disk_takes_it_from_another(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The imports are set for the whole group."""
    wanted: dict[str, Any] = {
        "imports": (tmp_path / "no disk",),
        "offline": True,
        "settings": {"python": "/nonexistent"},
    }
    with pytest.raises(ReapError, match="no disk has nothing of"):
        site.fetch(**wanted)
    monkeypatch.setattr(engine, "Peers", Giver(site.source, gives=100))
    outcome = site.fetch(peers=ANYBODY, **wanted)
    assert outcome.source == "peer:spark@giver"
    assert site.is_whole()
    assert any("no disk has nothing of" in warning for warning in outcome.warnings)


def test_what_the_disk_of_an_offline_host_has_not_comes_from_another(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.fetch()
    shutil.copytree(site.dest, tmp_path / "disk")
    shutil.rmtree(site.models)
    (tmp_path / "disk" / "model-00002-of-00003.safetensors").unlink()
    monkeypatch.setattr(engine, "Peers", Giver(site.source, gives=100))
    site.hub.log.clear()
    site.fetch(imports=(tmp_path / "disk",), offline=True, peers=ANYBODY)
    assert site.is_whole()
    assert site.hub.log.lines(1) == ""


def test_an_offline_fleet_whose_disk_is_nowhere_says_what_was_looked_for(site: Site, tmp_path: Path) -> None:
    nobody = peers.Access(fixed=(peers.Peer("nobody@127.0.0.1", 9),))
    with pytest.raises(ReapError, match=r"no other host gives .*no disk has nothing of"):
        site.fetch(imports=(tmp_path / "no disk",), offline=True, peers=nobody)


# --- when to stop waiting for a peer ---


class Clock:
    """Time that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Fleet:
    """One receiver's view: what its peers answer is a function of the time since the start, by the test's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
        self.clock = Clock()
        self.looks: list[float] = []
        self.began = self.clock.now
        monkeypatch.setattr(peers, "time", self.clock)

        def ask(_self: peers.Peers, _peer: peers.Peer) -> dict[str, object]:
            self.looks.append(self.clock.now - self.began)
            state = answer(self.looks[-1])
            return {"state": state} if state else {}

        monkeypatch.setattr(peers.Peers, "_ask", ask)

    def gives_up_after(self, tmp_path: Path, wait_s: float) -> float:
        access = peers.Access(wait_s=wait_s, fixed=(peers.Peer("spark@one"),))
        receiver = peers.Peers(access, REPO, "1" * 40, tmp_path / "x", lambda _: None, lambda _: None)

        def nothing(*_: object) -> Any:
            pytest.fail("nobody gives anything")

        assert receiver.take(store.Partial(tmp_path / "x"), None, nothing, nothing, nothing) is None
        return self.clock.now - self.began


def test_one_failed_look_after_hours_sends_nobody_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The seed downloads for three hours; every ten minutes its network is away for one minute."""
    fleet = Fleet(monkeypatch, lambda t: "filling" if t < 10_800 and t % 600 > 60 else None)
    assert 10_800 + 120 <= fleet.gives_up_after(tmp_path, 120) < 10_800 + 200


def test_the_next_to_ask_the_hub_goes_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody has begun after the wait: the first goes, and the second one sees that before its own time is over."""
    gone = Fleet(monkeypatch, lambda _: "absent").gives_up_after(tmp_path, 120)
    assert 120 < gone < 160
    second = Fleet(monkeypatch, lambda t: "filling" if gone < t < gone + 5000 else "absent")
    assert second.gives_up_after(tmp_path, 240) > gone + 5000


def test_it_looks_once_more_before_it_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Away for the whole wait, and back at the last look.
    looks: list[float] = []

    def answer(now: float) -> str | None:
        looks.append(now)
        over = [look for look in looks if look >= 120]
        return "filling" if len(over) == 2 else None

    assert Fleet(monkeypatch, answer).gives_up_after(tmp_path, 120) > 240


def test_a_seed_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fleet = Fleet(monkeypatch, lambda _: "absent")
    assert fleet.gives_up_after(tmp_path, 0) == 0
    assert len(fleet.looks) == 1


# --- rsync as it is called; a program of the test stands for it ---

TRICKLES = """#!/bin/sh
for landing; do :; done
printf started >> "$0.log"
while :; do printf x >> "$landing/model-00001-of-00003.safetensors"; sleep 0.2; done
"""


def test_a_peer_that_trickles_is_passed_over(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps rsync's own timeout quiet."""
    program = tmp_path / "bin" / "rsync"
    program.parent.mkdir()
    program.write_text(TRICKLES)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    files = {name: path.read_bytes() for name, path in named(site.source).items()}
    listed = [{"name": n, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()]
    monkeypatch.setattr(peers.Peers, "_ask", lambda *_: {"state": "ready", "files": listed})
    access = peers.Access(stall_s=1.0, min_rate=1000, fixed=(peers.Peer("spark@slow"),))
    outcome = site.fetch(peers=access)
    assert site.is_whole()
    assert outcome.source == "hub"
    assert len([w for w in outcome.warnings if w.startswith("spark@slow: the copy stalled (")]) == 2


# --- what a play hands over ---


def test_the_peers_are_read_again_at_each_look(tmp_path: Path) -> None:
    """A play that was interrupted and runs again may come with other peers, each with its own port."""
    access = peers.Access(tmp_path)
    assert access.peers() == ()
    (tmp_path / peers.PEERS).write_text('[{"address": "spark@10.0.0.2", "port": 2222}]')
    assert access.peers() == (peers.Peer("spark@10.0.0.2", 2222),)
    for wrong in ("{", "[1]", '[{"address": "-oProxyCommand=x", "port": 22}]', '[{"address": "a", "port": 0}]'):
        (tmp_path / peers.PEERS).write_text(wrong)
        with pytest.raises(ReapError, match="wanted"):
            access.peers()


def test_a_peer_that_contradicts_the_hub_gives_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own hashes agree with its files, so only the hub's listing can tell."""
    site.faults({"path": "*/README.md", "status": 404, "error_code": "EntryNotFound"})
    with pytest.raises(ReapError, match=r"README\.md"):
        site.fetch(settings={"workers": 1})
    site.faults()
    theirs = site.models.parent / "theirs"
    shutil.copytree(site.source, theirs)
    (theirs / "README.md").write_text("a mopel\n")
    monkeypatch.setattr(engine, "Peers", Giver(theirs, gives=100))
    assert site.fetch(peers=ANYBODY).source == "hub"
    assert site.is_whole()
