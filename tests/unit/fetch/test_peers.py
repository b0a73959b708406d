"""What another host's key may do: ask, and read one verified revision. The copy itself is tried on simulated hosts."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from reap.fetch import peers, store

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
    os.truncate(site.dest / "README.md", 1)
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
