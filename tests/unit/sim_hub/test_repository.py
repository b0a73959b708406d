"""Names of files and commits, manifests, and that nothing is hashed twice."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from sim.hub import repository
from sim.hub.repository import MANIFEST, Repositories, RepositoryError, lfs_pointer

from .conftest import SHARD

SHA256 = hashlib.sha256(SHARD).hexdigest()


def read(root: Path, wanted: str = "main") -> repository.Revision:
    revision = Repositories(root).revision("org/model", wanted)
    assert revision is not None
    return revision


def test_the_commit_is_the_one_that_git_gives(root: Path) -> None:
    # git add of the three files (the shard as its LFS pointer) and git commit with the fixed author and date
    assert read(root).commit == "651181b36bbfc461941248dbaacb12ff7662d9a3"


def test_folders_sort_as_git_sorts_them(tmp_path: Path) -> None:
    folder = tmp_path / "org" / "model"
    (folder / "sub").mkdir(parents=True)
    for name, content in (("sub/a.txt", b"a\n"), ("sub.txt", b"b\n"), ("sub0", b"c\n")):
        (folder / name).write_bytes(content)
    assert read(tmp_path).commit == "e87c63b8885205c4a4e432de320b57c74bc1c117"  # from git itself


def test_small_files_are_blobs_and_shards_are_lfs(root: Path) -> None:
    files = read(root).files
    assert files["config.json"].etag == "0967ef424bce6791893e9a57bb952f80fd536e93"  # git hash-object
    assert files["config.json"].sha256 is None
    assert files["model-1.safetensors"].etag == SHA256
    assert files["model-1.safetensors"].pointer_size == len(lfs_pointer(SHA256, len(SHARD))) == 130
    assert set(files) == {"config.json", "sub/a.txt", "model-1.safetensors"}


def test_large_files_are_lfs_whatever_their_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "LFS_THRESHOLD", 1)
    assert read(root).files["config.json"].sha256 == hashlib.sha256(b"{}\n").hexdigest()


def test_a_changed_byte_changes_the_commit(root: Path) -> None:
    repositories = Repositories(root)
    before = repositories.revision("org/model", "main")
    (root / "org/model/model-1.safetensors").write_bytes(SHARD[:-1] + b"x")
    after = repositories.revision("org/model", "main")
    assert before is not None
    assert after is not None
    assert before.commit != after.commit
    assert repositories.revision("org/model", before.commit) is None


def test_branch_tag_and_commit_name_revisions(root: Path) -> None:
    other = root / "org" / "model@v1"
    other.mkdir()
    (other / "config.json").write_bytes(b"{}")
    repositories = Repositories(root)
    assert repositories.names() == ["org/model"]
    main, tagged = repositories.revision("org/model", "main"), repositories.revision("org/model", "v1")
    assert main is not None
    assert tagged is not None
    assert repositories.revision("org/model", tagged.commit) == tagged
    assert repositories.revision("org/model", main.commit) == main
    assert repositories.revision("org/model", "v2") is None


@pytest.mark.parametrize("name", ["../org/model", "org/..", "org/model@v1", "org", "/model", "org/mod*"])
def test_odd_names_are_no_repositories(root: Path, name: str) -> None:
    (root / "org" / "model@v1").mkdir()
    assert Repositories(root).references(name) == {}


def test_unchanged_files_are_hashed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = repository._hash
    monkeypatch.setattr(repository, "_hash", lambda where, size: hashed.append(where.name) or real(where, size))
    repositories = Repositories(root)
    for _ in range(2):
        repositories.revision("org/model", "main")
    assert sorted(hashed) == ["a.txt", "config.json", "model-1.safetensors"]
    (root / "org/model/config.json").write_bytes(b"{1}")
    repositories.revision("org/model", "main")
    assert hashed[3:] == ["config.json"]


def test_a_file_being_written_is_not_listed(root: Path) -> None:
    (root / "org/model/.config.json.part").write_bytes(b"half")
    assert ".config.json.part" not in read(root).files


def test_a_manifest_replaces_hashing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "org/model"
    giant = folder / "giant.safetensors"
    giant.touch()
    os.truncate(giant, 94 * 10**9)  # sparse: takes no room on the disk
    entry = {"size": 94 * 10**9, "sha256": "ab" * 32}
    (folder / MANIFEST).write_text(json.dumps({"commit": "c" * 40, "files": {"giant.safetensors": entry}}))
    real = repository._hash

    def small_only(where: Path, size: int) -> tuple[str, str]:
        assert where != giant
        return real(where, size)

    monkeypatch.setattr(repository, "_hash", small_only)
    revision = read(root, "c" * 40)
    assert revision.files["giant.safetensors"].etag == "ab" * 32
    assert revision.files["giant.safetensors"].size == 94 * 10**9
    assert MANIFEST not in revision.files
    assert "config.json" in revision.files


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"files": {"a": {"size": 1}}}',
        '{"files": {}, "commit": "main"}',
        '{"files": {"a": {"size": -1, "sha256": "' + "0" * 64 + '"}}}',
    ],
)
def test_a_wrong_manifest_is_one_clear_error(root: Path, text: str) -> None:
    (root / "org/model" / MANIFEST).write_text(text)
    with pytest.raises(RepositoryError, match=r"\.hub-manifest\.json"):
        read(root)
