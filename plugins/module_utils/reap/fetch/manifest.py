"""What this host has verified of a revision, and how to see without reading a byte that it is still so."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ReapError
from .plan import MANIFEST, WORK, Want, check_name
from .progress import write_json

CHUNK = 1 << 20
# What a server could load or run; a file of these kinds that the revision does not have is a fault, another is not.
LOADABLE = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".py", ".model", ".txt")


@dataclass(frozen=True, slots=True)
class Entry:
    """One verified file: its hashes, and what ``stat`` said when it was verified (nanoseconds, inode number)."""

    name: str
    size: int
    sha256: str
    git_sha1: str | None
    mtime_ns: int
    inode: int
    verified_unix: float

    def want(self) -> Want:
        """The file as a plan has it."""
        return Want(self.name, self.size, self.sha256)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a file is not what the manifest says: ``missing``, ``changed``, ``extra`` or ``link``."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All verified files of one revision."""

    repo: str
    commit: str
    source: str
    verified_unix: float
    files: dict[str, Entry]

    @property
    def size(self) -> int:
        """Sum of the files' sizes in bytes."""
        return sum(entry.size for entry in self.files.values())

    def save(self, folder: Path) -> None:
        """Write the manifest into the model's folder, atomically."""
        write_json(
            folder / MANIFEST,
            {
                "format": 1,
                "repo": self.repo,
                "commit": self.commit,
                "source": self.source,
                "verified_unix": self.verified_unix,
                "files": [asdict(self.files[name]) for name in sorted(self.files)],
            },
        )


def load(folder: Path) -> Manifest | None:
    """The folder's manifest; None if there is none or it cannot be read (then the files have to be verified again)."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {check_name(item["name"]): Entry(**item) for item in raw["files"]}
        return Manifest(str(raw["repo"]), str(raw["commit"]), str(raw["source"]), float(raw["verified_unix"]), files)
    except (OSError, ValueError, KeyError, TypeError, ReapError):
        return None


def same_file(path: Path, entry: Entry) -> bool:
    """Whether ``path`` is the very file that was verified: a plain file of the same size, mtime and inode."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_size == entry.size
        and found.st_mtime_ns == entry.mtime_ns
        and found.st_ino == entry.inode
    )


def walk(folder: Path) -> dict[str, os.stat_result]:
    """Every file and link below ``folder`` by relative name (``lstat``), without this program's own."""
    found: dict[str, os.stat_result] = {}

    def visit(path: str, prefix: str) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                name = prefix + entry.name
                if name in (WORK, MANIFEST):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    visit(entry.path, name + "/")
                else:
                    found[name] = entry.stat(follow_symlinks=False)

    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        visit(str(folder), "")
    return found


def faults(folder: Path, manifest: Manifest) -> list[Fault]:
    """What differs from the manifest, from the directory alone: no file is opened."""
    found = walk(folder)
    out = []
    for name, entry in manifest.files.items():
        there = found.pop(name, None)
        if there is None:
            out.append(Fault(name, "missing"))
        elif stat.S_ISLNK(there.st_mode):
            out.append(Fault(name, "link"))
        elif (there.st_size, there.st_mtime_ns, there.st_ino) != (entry.size, entry.mtime_ns, entry.inode):
            out.append(Fault(name, "changed"))
    out += [
        Fault(name, "extra") for name in sorted(found) if name.endswith(LOADABLE) and not name.startswith(".cache/")
    ]
    return sorted(out, key=lambda fault: fault.name)


class Hasher:
    """sha256, and git's blob id where the plan has no sha256, of one file in one pass."""

    def __init__(self, want: Want) -> None:
        self.want = want
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._git = None if want.sha256 else hashlib.sha1(b"blob %d\0" % want.size, usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        self._sha256.update(data)
        if self._git is not None:
            self._git.update(data)
        self.size += len(data)

    def problem(self) -> str | None:
        """Why the bytes are not the wanted file, or None."""
        want = self.want
        if self.size != want.size:
            return f"{want.name} has {self.size} bytes, wanted {want.size}"
        if want.sha256 and self._sha256.hexdigest() != want.sha256:
            return f"{want.name} has sha256 {self._sha256.hexdigest()}, wanted {want.sha256}"
        if self._git is not None and self._git.hexdigest() != want.git_sha1:
            return f"{want.name} has blob id {self._git.hexdigest()}, wanted {want.git_sha1}"
        return None

    def entry(self, found: os.stat_result) -> Entry:
        """The verified file's record."""
        return Entry(
            name=self.want.name,
            size=self.size,
            sha256=self._sha256.hexdigest(),
            git_sha1=self._git.hexdigest() if self._git is not None else None,
            mtime_ns=found.st_mtime_ns,
            inode=found.st_ino,
            verified_unix=round(time.time(), 3),
        )


def verify(path: Path, want: Want) -> tuple[Entry | None, str | None]:
    """Read the file once, flush it to disk and let go of its pages: on a Spark they are the model's memory.

    Returns:
        The record and None, or None and what is wrong with the file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, f"{want.name} is missing"
    except OSError as error:
        return None, f"{want.name} cannot be read ({error.strerror})"
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            return None, f"{want.name} is no plain file"
        if found.st_size != want.size:
            return None, f"{want.name} has {found.st_size} bytes, wanted {want.size}"
        hasher = Hasher(want)
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        while count := os.readv(handle, [buffer]):
            hasher.update(view[:count])
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        if problem := hasher.problem():
            return None, problem
        return hasher.entry(found), None
    except OSError as error:
        return None, f"{want.name} cannot be read ({error.strerror})"
    finally:
        os.close(handle)


class Journal:
    """The verified files of an unfinished revision, one JSON line each, appended and flushed as each is verified."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / WORK / "verified.jsonl"

    def read(self) -> dict[str, Entry]:
        """Records by name, the last of each; a line cut off by a power failure is passed over."""
        records: dict[str, Entry] = {}
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return records
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = Entry(**json.loads(line))
                records[entry.name] = entry
        return records

    def add(self, entry: Entry) -> None:
        """Append one record."""
        line = (json.dumps(asdict(entry)) + "\n").encode()
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            end = os.lseek(handle, 0, os.SEEK_END)
            # After a line that a crash cut off, the new one starts on its own.
            if end and os.pread(handle, 1, end - 1) != b"\n":
                line = b"\n" + line
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)

    def add_all(self, entries: Iterable[Entry]) -> None:
        """Append several records."""
        for entry in entries:
            self.add(entry)


def trusted(folder: Path, records: Mapping[str, Entry], plan: Mapping[str, Want]) -> dict[str, Entry]:
    """Those records whose file is still the verified one and still what the plan wants."""
    good = {}
    for name, want in plan.items():
        entry = records.get(name)
        if entry is None or entry.size != want.size or not same_file(folder / name, entry):
            continue
        if (want.sha256 or entry.sha256) == entry.sha256 and (want.git_sha1 or entry.git_sha1) == entry.git_sha1:
            good[name] = entry
    return good
