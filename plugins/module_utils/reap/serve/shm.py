"""Shared memory that a killed model leaves in /dev/shm when it runs with the host's IPC namespace.

Python's multiprocessing names its segments ``psm_<hex>`` and its semaphores ``sem.mp-<letters>``, vLLM its cache of
inputs ``VLLM_...``, PyTorch ``torch_<pid>_...``, NCCL ``nccl-...``, CUDA ``cuda.shm.<uid>...``. Only what a process of
the container was seen to map is ever removed, and only when no process maps it any more.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_OURS = re.compile(r"psm_|sem\.mp-|VLLM_|torch_|nccl-|cuda\.shm\.")
# Device and inode of a row of proc(5) maps. The name there is not always the file's: the C library makes a semaphore
# under another name, gives it its own and removes the other, which the row goes on showing.
_MAPPED = re.compile(r"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) +/dev/shm/", re.MULTILINE)


def mapped(pids: Iterable[int], folder: Path = Path("/dev/shm"), proc: Path = Path("/proc")) -> set[str]:  # noqa: S108
    """Names of a model's segments and semaphores in the folder that these processes map."""
    inodes: set[tuple[int, int, int]] = set()
    for pid in pids:
        try:
            rows = (proc / str(pid) / "maps").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        inodes.update((int(major, 16), int(minor, 16), int(inode)) for major, minor, inode in _MAPPED.findall(rows))
    return {name for name, inode in _files(folder).items() if inode in inodes} if inodes else set()


def remove(names: Iterable[str], folder: Path = Path("/dev/shm"), proc: Path = Path("/proc")) -> list[str]:  # noqa: S108
    """Remove those of the names that exist and that no process maps; returns what was removed."""
    left = [name for name in sorted(set(names)) if (folder / name).exists()]
    if not left:
        return []
    used = mapped((int(entry.name) for entry in proc.iterdir() if entry.name.isdigit()), folder, proc)
    gone = [name for name in left if name not in used]
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    return gone


def _files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Device and inode of each file that may be a model's."""
    found = {}
    for entry in folder.iterdir():
        if _OURS.match(entry.name):
            # One that goes away while this looks is nobody's.
            with contextlib.suppress(FileNotFoundError):
                stat = entry.lstat()
                found[entry.name] = (os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino)
    return found
