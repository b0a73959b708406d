"""Import from a disk: another models' folder, a plain copy, or a Hugging Face cache in either of its layouts.

What a source says about its own hashes is believed only for the plan, never for the content: every byte is hashed on
the way. Where the hub's listing is known it is the plan; without a network the plan comes from, in this order, a
manifest of this program, the hub's listing that huggingface_hub keeps (``trees/<commit>.json``), or the cache's blob
names, which are the hashes (huggingface.co/docs/huggingface_hub, "Understand caching").
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ReapError
from . import manifest as mf
from .plan import CONFIG, MANIFEST, Want, plan_from_listing
from .store import Partial, disk_error

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Source:
    """One folder that holds the revision, and the plan that can be read from it (None: it knows no hashes)."""

    folder: Path
    kind: str
    plan: dict[str, Want] | None


def find(path: Path, repo: str, revision: str) -> Source:
    """The revision below ``path``, whatever kind of folder that is.

    Raises:
        ReapError: there is nothing of this revision; says where it was looked for.
    """
    cache_name = f"models--{repo.replace('/', '--')}"
    candidates = [
        path / repo / revision,
        path / "hub" / cache_name / "snapshots" / revision,
        path / cache_name / "snapshots" / revision,
        path / "snapshots" / revision,
        path,
    ]
    for folder in candidates:
        if not (folder / CONFIG).exists():
            continue
        if record := mf.load(folder):
            if (record.repo, record.commit) == (repo, revision):
                return Source(folder, "copy", {name: entry.want() for name, entry in record.files.items()})
            if folder == path:
                raise ReapError(f"{folder} holds {record.repo}@{record.commit}, wanted {repo}@{revision}")
            continue
        if folder.parent.name == "snapshots":
            if folder.name != revision:
                raise ReapError(f"{folder} is the snapshot of {folder.name}, wanted {revision}")
            return Source(folder, "cache", _tree(folder.parent.parent / "trees", revision) or _from_blobs(folder))
        return Source(folder, "folder", _tree(folder / ".cache" / "huggingface" / "trees", revision))
    raise ReapError(f"{path} has nothing of {repo}@{revision}; looked in {', '.join(str(c) for c in candidates)}")


def _tree(folder: Path, revision: str) -> dict[str, Want] | None:
    """The listing that huggingface_hub 2 keeps beside a download; complete by construction."""
    try:
        raw = json.loads((folder / f"{revision}.json").read_text(encoding="utf-8"))
        return plan_from_listing(
            {"name": name, "size": item.get("lfs_size") or item["size"], **_hashes(item)}
            for name, item in raw["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ReapError):
        return None


def _hashes(item: Mapping[str, Any]) -> dict[str, str]:
    return {"sha256": item["lfs_sha256"]} if item.get("lfs_sha256") else {"git_sha1": item["blob_id"]}


def _from_blobs(folder: Path) -> dict[str, Want] | None:
    """A plan from the names of the blobs that the snapshot's links point at."""
    items = []
    for name, found in mf.walk(folder).items():
        if not stat.S_ISLNK(found.st_mode):
            return None
        # Only the first link: where blobs are shared between repositories the blob is itself a link.
        blob = (folder / name).readlink().name
        if not _HASH.fullmatch(blob):
            return None
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise ReapError(f"{folder / name} points at a blob that is not there: this cache is incomplete") from error
        items.append({"name": name, "size": size, "sha256" if len(blob) == 64 else "git_sha1": blob})
    try:
        return plan_from_listing(items)
    except ReapError:
        return None


def copy(source: Path, want: Want, partial: Partial, copied: Callable[[int], None]) -> str | None:
    """Copy one file through its links, hashing on the way; it gets its name only when it is the wanted one.

    Returns:
        None when the file was accepted, else what is wrong with the source's.

    Raises:
        ReapError: this host cannot write it.
    """
    try:
        reader = os.open(source / want.name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"{want.name} is missing"
    except OSError as error:
        return f"{want.name} cannot be read ({error.strerror})"
    part = partial.part(want)
    with os.fdopen(reader, "rb", buffering=0) as data:
        if os.fstat(reader).st_size != want.size:
            return f"{want.name} has {os.fstat(reader).st_size} bytes, wanted {want.size}"
        hasher = mf.Hasher(want)
        buffer = memoryview(bytearray(mf.CHUNK))
        try:
            with os.fdopen(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb", buffering=0
            ) as out:
                while True:
                    try:
                        count = data.readinto(buffer)
                    except OSError as error:
                        part.unlink(missing_ok=True)
                        return f"{want.name} cannot be read ({error.strerror})"
                    if not count:
                        break
                    hasher.update(buffer[:count])
                    out.write(buffer[:count])
                    copied(count)
                os.fsync(out.fileno())
                for handle in (out.fileno(), reader):
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                found = os.fstat(out.fileno())
            if problem := hasher.problem():
                part.unlink(missing_ok=True)
                return problem
            partial.accept(want, hasher.entry(found))
        except OSError as error:
            raise disk_error(error, part) from error
    return None


def adopt(
    partial: Partial, plan: Mapping[str, Want], repo: str, revision: str, read: Callable[[int], None]
) -> list[mf.Entry]:
    """Verify files that already lie in the unfinished folder under their own names (a copy made by hand, say)."""
    known = mf.trusted(partial.folder, partial.journal.read(), plan)
    good = []
    for name in mf.walk(partial.folder):
        want = plan.get(name)
        if want is None or name in known:
            continue
        path = partial.folder / name
        if path.is_symlink():
            path.unlink()
            continue
        entry, _ = mf.verify(path, want)
        if entry is None:
            path.unlink(missing_ok=True)
        else:
            partial.journal.add(entry)
            good.append(entry)
            read(want.size)
    return good


def leftover_download(partial: Partial) -> None:
    """Remove what huggingface_hub itself leaves in a folder that it downloaded to."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(partial.folder / ".cache" / "huggingface")
    with contextlib.suppress(OSError):
        (partial.folder / ".cache").rmdir()
    (partial.folder / MANIFEST).unlink(missing_ok=True)
