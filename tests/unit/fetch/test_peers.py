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


def test_without_a_peer_that_answers_the_hub_is_next(site: Site, tmp_path: Path) -> None:
    access = peers.Access(("nobody@127.0.0.1",), port=9)
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


ANYBODY = peers.Access(("spark@giver",))


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
