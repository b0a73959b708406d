"""The folders of the models: where a revision lies, who may write it, and what room there is.

<models>/<owner>/<name>/<commit>            a revision that is whole and verified; it got this name by one rename
<models>/<owner>/<name>/<commit>.partial    one that is not; its ``.reap`` holds the plan, the journal and begun files
<models>/<owner>/<name>/.<commit>.lock      held by the one writer; the kernel frees it when the holder dies
<models>/<owner>/<name>/.<commit>.removed   one that is being removed, or what is left where that was cut off
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ReapError
from . import manifest as mf
from .plan import MANIFEST, WORK, Want, listing, plan_from_listing
from .progress import write_json

_REMOVED = ".removed"


def partial_of(dest: Path) -> Path:
    """The folder that a revision is built in: beside the final one, on the same filesystem."""
    return dest.with_name(dest.name + ".partial")


def lock_of(dest: Path) -> Path:
    """The lock file of one revision."""
    return dest.with_name(f".{dest.name}.lock")


def disk_error(error: OSError, path: Path) -> ReapError:
    """An ``OSError`` of the store as one sentence with a remedy."""
    where = error.filename or path
    remedy = {
        errno.ENOSPC: "free space there (`reap fetch --list` names old revisions), then run it again; it continues",
        errno.EDQUOT: "raise the quota or free space, then run it again; it goes on where it was",
        errno.EROFS: "mount it for writing; after an I/O error look at the kernel's log first",
        errno.EACCES: "run it as the owner of the folder, or give that folder to the user who runs it",
        errno.EPERM: "run it as the owner of the folder, or give that folder to the user who runs it",
        errno.EIO: "the disk could not read or write: look at the kernel's log",
    }.get(error.errno or 0, "correct that, then run it again; it goes on where it was")
    return ReapError(f"{where}: {error.strerror or error}; {remedy}")


@contextlib.contextmanager
def exclusive(dest: Path, waiting: Callable[[str], None], limit_s: float | None = None) -> Iterator[int]:
    """Hold the revision's lock; waits for another holder, and tells ``waiting`` who that is.

    Yields:
        The lock's file descriptor. Children that inherit it keep the lock until they too are gone.

    Raises:
        ReapError: ``limit_s`` seconds have passed, or the lock file cannot be made.
    """
    path = lock_of(dest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
                if limit_s is not None and time.monotonic() - began >= limit_s:
                    raise ReapError(
                        f"process {holder} is already fetching {dest.name}; wait for its end, or stop it"
                    ) from None
                waiting(f"waiting for process {holder}, which fetches the same revision")
                time.sleep(0.2)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        os.close(handle)


class Partial:
    """The unfinished folder of one revision."""

    def __init__(self, dest: Path) -> None:
        self.dest = dest
        self.folder = partial_of(dest)
        self.work = self.folder / WORK
        self.incoming = self.work / "incoming"
        self.landing = self.work / "peer"
        self.journal = mf.Journal(self.folder)

    def open(self) -> None:
        """Create the folders that are missing."""
        self.incoming.mkdir(parents=True, exist_ok=True)

    def part(self, want: Want) -> Path:
        """Where a file is written until it is verified. Its name holds its hash, so another file never continues it."""
        return self.incoming / f"{want.name.replace('/', '%')}.{want.etag[:16]}"

    def save_plan(self, repo: str, commit: str, plan: Mapping[str, Want]) -> None:
        """Keep the listing: a commit never changes, so a second start needs no listing."""
        write_json(self.work / "plan.json", {"repo": repo, "commit": commit, "files": listing(plan)})

    def load_plan(self, repo: str, commit: str) -> dict[str, Want] | None:
        """The kept listing, if it is this revision's."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, ReapError):
            raw = json.loads((self.work / "plan.json").read_text(encoding="utf-8"))
            if (raw["repo"], raw["commit"]) == (repo, commit):
                return plan_from_listing(raw["files"])
        return None

    def accept(self, want: Want, entry: mf.Entry) -> None:
        """Give a verified file its name; only then does it count."""
        target = self.folder / want.name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = self.part(want)
        part.chmod(0o644)
        part.replace(target)
        self.journal.add(entry)

    def begun(self, plan: Mapping[str, Want]) -> int:
        """Bytes of files that were begun and can be continued."""
        total = 0
        for want in plan.values():
            with contextlib.suppress(OSError):
                total += self.part(want).stat().st_size
        return total

    def salvage(self, plan: Mapping[str, Want]) -> None:
        """Let the hub continue the files that a lost peer began to give; what they hold is hashed in the end."""
        for want in plan.values():
            begun = self.landing / want.name
            if begun.is_file() and not begun.is_symlink():
                begun.replace(self.part(want))

    def lend(self, plan: Mapping[str, Want]) -> None:
        """The other way round: let a peer continue the files that the hub began."""
        for want in plan.values():
            part, landing = self.part(want), self.landing / want.name
            if part.is_file() and not part.is_symlink() and not landing.exists():
                landing.parent.mkdir(parents=True, exist_ok=True)
                part.replace(landing)

    def landed(self, plan: Mapping[str, Want]) -> int:
        """Bytes of files that peers began to give."""
        total = 0
        for want in plan.values():
            with contextlib.suppress(OSError):
                total += min(want.size, (self.landing / want.name).lstat().st_size)
        return total

    def clean(self, plan: Mapping[str, Want]) -> list[str]:
        """Take away what the revision does not have; returns the names of files that were removed."""
        removed = []
        for name in mf.walk(self.folder):
            if name not in plan:
                (self.folder / name).unlink()
                removed.append(name)
        keep = {self.part(want).name for want in plan.values()}
        for path in self.incoming.iterdir():
            if path.name not in keep:
                path.unlink()
        return removed

    def finish(self, record: mf.Manifest) -> None:
        """Write the manifest and give the folder its final name: from here it can be served."""
        record.save(self.folder)
        for folder in [self.folder, *(p for p in self.folder.rglob("*") if p.is_dir() and WORK not in p.parts)]:
            _sync(folder)
        shutil.rmtree(self.work, ignore_errors=True)
        self.folder.chmod(0o755)
        self.folder.rename(self.dest)
        _sync(self.dest.parent)

    def take_back(self) -> None:
        """Make a folder that is not what it should be an unfinished one again: nothing starts from it now."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.dest.rename(self.folder)
        _sync(self.dest.parent)
        self.open()
        if record := mf.load(self.folder):
            self.journal.add_all(record.files.values())
        (self.folder / MANIFEST).unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision below the models' folder, size in bytes.

    ``state``: ready, unverified (no manifest), partial (not whole yet) or removing (the rest of a removal that was cut
    off).
    """

    repo: str
    commit: str
    path: str
    size: int
    state: str
    changed_unix: float


def revisions(models: Path) -> list[Revision]:
    """Every revision below ``<models>/<owner>/<name>/``, the largest first."""
    found = []
    for folder in sorted(models.glob("*/*/*")):
        name, state = folder.name, "unverified"
        if name.startswith(".") and name.endswith(_REMOVED):
            # A removal was cut off; what is left takes room and is no model any more.
            name, state = name[1:].removesuffix(_REMOVED), "removing"
        commit, _, suffix = name.partition(".")
        if not folder.is_dir() or folder.is_symlink() or len(commit) != 40 or suffix not in ("", "partial"):
            continue
        size = 0
        for root, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    size += (Path(root) / name).lstat().st_blocks * 512
        if state != "removing":
            state = "partial" if suffix else "ready" if (folder / MANIFEST).is_file() else state
        repo = f"{folder.parent.parent.name}/{folder.parent.name}"
        found.append(Revision(repo, commit, str(folder), size, state, folder.stat().st_mtime))
    return sorted(found, key=lambda r: (-r.size, r.path))


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the filesystem of ``path`` or of its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_space(dest: Path, missing: int, reserve: int, models: Path | None, kept: Collection[str] | None = ()) -> None:
    """Refuse before the first byte when the rest of the revision and the reserve do not fit.

    Args:
        kept: folders of models that are in use and not to be named for removal; None: unknown, so that none is named.

    Raises:
        ReapError: names what is there, what is wanted, and the revisions that could be removed.
    """
    free = free_bytes(dest)
    if free >= missing + reserve:
        return
    others: list[Revision] = []
    if models is not None and kept is not None:
        stays = {os.path.realpath(path) for path in (str(dest), *kept)}
        others = [r for r in revisions(models) if _final(r) not in stays]
    could = "; ".join(f"{r.path} ({r.state}, {gigabytes(r.size)})" for r in others[:5])
    raise ReapError(
        f"the disk of {dest.parent} has {gigabytes(free)} free; wanted {gigabytes(missing)} for the model and "
        f"{gigabytes(reserve)} kept free. "
        + (
            f"Could be removed with `reap fetch --prune`: {could}."
            if could
            else "It could not be found out which models are in use, so none is named for removal."
            if kept is None
            else "No model revision is there that nothing needs."
        )
    )


def gigabytes(count: float) -> str:
    """Bytes as a person reads them, powers of ten: ``94.0 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def prune(models: Path, names: list[str], keep: list[str], *, dry_run: bool) -> list[Revision]:
    """Remove the named revisions (``owner/name@commit``, or ``unused`` for all that nothing keeps).

    Args:
        keep: paths that must stay, as ``inuse.models`` and the caller name them.

    Raises:
        ReapError: a name is unknown or names a revision that is kept: then nothing is removed. Or one of them is being
            fetched, or the disk refuses: then those before it, in the order of ``revisions``, are gone already.
    """
    known = revisions(models)
    kept = {os.path.realpath(path) for path in keep}
    chosen: list[Revision] = []
    for name in names:
        if name == "unused":
            chosen += [r for r in known if _final(r) not in kept]
            continue
        matches = [r for r in known if name in (f"{r.repo}@{r.commit}", r.path)]
        if not matches:
            raise ReapError(
                f"{name} is no revision below {models}; there are: {', '.join(_label(r) for r in known) or 'none'}"
            )
        for revision in matches:
            if revision.state != "removing" and os.path.realpath(revision.path) in kept:
                raise ReapError(f"{_label(revision)} is served, or the service could go back to it; it is not removed")
        chosen += matches
    chosen = [r for r in known if r in chosen]
    if dry_run:
        return chosen
    for revision in chosen:
        folder = Path(revision.path)
        try:
            # The lock file stays: who waits for it would hold a lock that nobody else can see.
            with exclusive(folder.with_name(revision.commit), lambda _: None, limit_s=0):
                doomed = folder
                if revision.state != "removing":
                    # Renamed first: a removal that is cut off leaves no folder that looks like a model.
                    doomed = folder.with_name(f".{folder.name}{_REMOVED}")
                    if doomed.exists():
                        shutil.rmtree(doomed)
                    folder.rename(doomed)
                if doomed.exists():
                    shutil.rmtree(doomed)
        except OSError as error:
            raise disk_error(error, folder) from error
    return chosen


def _final(revision: Revision) -> str:
    """The folder that a revision is served from, links resolved; of the rest of a removal its own."""
    path = Path(revision.path)
    return os.path.realpath(path if revision.state == "removing" else path.with_name(revision.commit))


def _label(revision: Revision) -> str:
    return f"{revision.repo}@{revision.commit}"
