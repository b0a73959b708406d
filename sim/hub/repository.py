"""Model repositories in plain folders: what is in them, and the hashes by which git and LFS name it.

A commit's name is a real git commit id: of the tree of the folder's files (large ones as LFS pointers, as the hub
stores them), without parents and with a fixed author and date. Equal content therefore always has the same commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

MANIFEST = ".hub-manifest.json"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".onnx", ".msgpack")
LFS_THRESHOLD = 10 * 1024 * 1024  # bytes; the hub refuses larger files outside LFS
COMMIT_DATE = 1700000000  # seconds since 1970, of every commit
_SIGNATURE = f"sim <sim@localhost> {COMMIT_DATE} +0000"
_COMMIT_TEXT = f"author {_SIGNATURE}\ncommitter {_SIGNATURE}\n\nsim\n"
_READ = 4 * 1024 * 1024


class RepositoryError(Exception):
    """A repository folder that cannot be served; the message names the file, what was found and what to do."""


@dataclass(frozen=True)
class RepoFile:
    """One file of a revision. `sha256` is None for a file outside LFS; `blob` is the git blob id (of the pointer)."""

    path: str
    location: Path
    size: int  # bytes
    blob: str
    sha256: str | None

    @property
    def etag(self) -> str:
        """Return what the hub gives as ETag: the sha256 of an LFS file, else the git blob id."""
        return self.sha256 or self.blob

    @property
    def pointer_size(self) -> int:
        """Return the size of the LFS pointer file in bytes (0 outside LFS)."""
        return len(lfs_pointer(self.sha256, self.size)) if self.sha256 else 0


@dataclass(frozen=True)
class Revision:
    """One state of a repository: its commit id (40 hex) and its files by path."""

    commit: str
    files: Mapping[str, RepoFile]


def lfs_pointer(sha256: str, size: int) -> bytes:
    """Return the pointer that git stores for an LFS file (git-lfs specification, version 1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_object(kind: str, content: bytes) -> bytes:
    """Return the 20-byte id of a git object: SHA-1 of "<kind> <size>\\0<content>"."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).digest()


def commit_id(blobs: Mapping[str, str]) -> str:
    """Return the id of the commit whose tree holds these blobs (path to 40 hex), all as mode 100644."""
    tree = _tree_id([(path.split("/"), blob) for path, blob in blobs.items()])
    return git_object("commit", f"tree {tree.hex()}\n{_COMMIT_TEXT}".encode()).hex()


def _tree_id(entries: Iterable[tuple[list[str], str]]) -> bytes:
    rows: list[tuple[bytes, bytes]] = []
    folders: dict[str, list[tuple[list[str], str]]] = {}
    for parts, blob in entries:
        if len(parts) == 1:
            rows.append((parts[0].encode(), b"100644 " + parts[0].encode() + b"\0" + bytes.fromhex(blob)))
        else:
            folders.setdefault(parts[0], []).append((parts[1:], blob))
    for name, inner in folders.items():
        # git sorts a folder as if its name ended with a slash
        rows.append((name.encode() + b"/", b"40000 " + name.encode() + b"\0" + _tree_id(inner)))
    return git_object("tree", b"".join(row for _, row in sorted(rows)))


@dataclass(frozen=True)
class _Identity:
    """By what a file is known to be unchanged: size in bytes, modification time in ns, inode."""

    size: int
    mtime: int
    inode: int


@dataclass(frozen=True)
class _Manifest:
    commit: str | None
    files: Mapping[str, tuple[int, str]]  # path to (size, sha256)


class Repositories:
    """The repositories below a root folder, looked at anew at each request; only changed files are read again.

    <root>/<org>/<name>/ is the branch main of <org>/<name>; <root>/<org>/<name>@<tag>/ is another revision of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._hashes: dict[Path, tuple[_Identity, str, str]] = {}
        self._revisions: dict[Path, tuple[frozenset[tuple[str, _Identity]], Revision]] = {}

    def names(self) -> list[str]:
        """Return the repositories as <org>/<name>, sorted."""
        found = {
            f"{folder.parent.name}/{folder.name.partition('@')[0]}"
            for folder in self.root.glob("*/*")
            if folder.is_dir() and not folder.name.startswith(".")
        }
        return sorted(found)

    def references(self, repo: str) -> dict[str, Path]:
        """Return the folders of a repository by branch or tag; empty when there is none of that name."""
        org, _, name = repo.partition("/")
        if not _plain(org) or not _plain(name) or "@" in name:
            return {}
        folders = {"main": self.root / org / name}
        folders |= {folder.name.partition("@")[2]: folder for folder in sorted((self.root / org).glob(f"{name}@*"))}
        return {reference: folder for reference, folder in folders.items() if folder.is_dir()}

    def revision(self, repo: str, wanted: str) -> Revision | None:
        """Return the revision that a branch, tag or commit id (40 hex) names, or None.

        Raises RepositoryError when a folder cannot be read or its manifest is wrong.
        """
        folders = self.references(repo)
        if wanted in folders:
            return self._read(folders[wanted])
        if len(wanted) == 40:
            for folder in folders.values():
                revision = self._read(folder)
                if revision.commit == wanted:
                    return revision
        return None

    def _read(self, folder: Path) -> Revision:
        with self._lock:
            try:
                present = {path: _identity(folder / path) for path in _walk(folder)}
                key = frozenset(present.items())
                cached = self._revisions.get(folder)
                if cached and cached[0] == key:
                    return cached[1]
                manifest = _manifest(folder)
                paths = (set(present) | set(manifest.files)) - {MANIFEST}
                files = {path: self._file(folder, path, manifest, present.get(path)) for path in sorted(paths)}
            except OSError as error:
                raise RepositoryError(f"{folder}: {error}") from error
            commit = manifest.commit or commit_id({path: file.blob for path, file in files.items()})
            revision = Revision(commit, files)
            self._revisions[folder] = (key, revision)
            return revision

    def _file(self, folder: Path, path: str, manifest: _Manifest, identity: _Identity | None) -> RepoFile:
        location = folder / path
        if path in manifest.files:
            size, sha256 = manifest.files[path]
            return RepoFile(path, location, size, git_object("blob", lfs_pointer(sha256, size)).hex(), sha256)
        assert identity is not None
        known = self._hashes.get(location)
        if known is None or known[0] != identity:
            known = (identity, *_hash(location, identity.size))
            self._hashes[location] = known
        blob, sha256 = known[1], known[2]
        if identity.size > LFS_THRESHOLD or path.endswith(LFS_SUFFIXES):
            pointer = git_object("blob", lfs_pointer(sha256, identity.size)).hex()
            return RepoFile(path, location, identity.size, pointer, sha256)
        return RepoFile(path, location, identity.size, blob, None)


def _plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name and "*" not in name


def _walk(folder: Path) -> list[str]:
    paths = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in (".git", ".cache")]
        for name in files:
            # A leading dot and .part is a file that is still being written beside its final name.
            if not (name.startswith(".") and name.endswith(".part")):
                paths.append((Path(parent) / name).relative_to(folder).as_posix())
    return paths


def _identity(location: Path) -> _Identity:
    status = location.stat()
    return _Identity(status.st_size, status.st_mtime_ns, status.st_ino)


def _hash(location: Path, size: int) -> tuple[str, str]:
    """Return the git blob id and the sha256 of a file, read once."""
    blob = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    sha256 = hashlib.sha256()
    with location.open("rb") as stream:
        while chunk := stream.read(_READ):
            blob.update(chunk)
            sha256.update(chunk)
    return blob.hexdigest(), sha256.hexdigest()


def _manifest(folder: Path) -> _Manifest:
    """Read a folder's manifest: {"commit": 40 hex (optional), "files": {path: {"size": bytes, "sha256": 64 hex}}}."""
    location = folder / MANIFEST
    if not location.exists():
        return _Manifest(None, {})
    try:
        content = json.loads(location.read_text())
        commit = content.get("commit")
        files = {str(path): (int(entry["size"]), str(entry["sha256"])) for path, entry in content["files"].items()}
        valid = commit is None or _is_hex(commit, 40)
        valid = valid and all(size >= 0 and _is_hex(sha256, 64) for size, sha256 in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RepositoryError(
            f"{location}: {type(error).__name__}: {error}; see the manifest in sim/hub/README.md"
        ) from error
    if not valid:
        raise RepositoryError(f"{location}: wanted a commit of 40 and sha256 of 64 hexadecimal digits, sizes in bytes")
    return _Manifest(commit, files)


def _is_hex(text: object, length: int) -> bool:
    return isinstance(text, str) and len(text) == length and all(character in "0123456789abcdef" for character in text)
