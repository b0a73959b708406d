"""Shared memory segments that a killed model leaves in /dev/shm when it runs with the host's IPC namespace.

Python's multiprocessing names them ``psm_<hex>``. Only those that a process of the container was seen to map are
ever removed, and only when no process maps them any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_MAPPED = re.compile(r" /dev/shm/(psm_[0-9a-zA-Z_]+)")


def mapped(pids: Iterable[int], proc: Path = Path("/proc")) -> set[str]:
    """Names of the segments that these processes map."""
    names: set[str] = set()
    for pid in pids:
        try:
            names.update(_MAPPED.findall((proc / str(pid) / "maps").read_text(encoding="utf-8", errors="replace")))
        except OSError:
            continue
    return names


def remove(names: Iterable[str], folder: Path = Path("/dev/shm"), proc: Path = Path("/proc")) -> list[str]:  # noqa: S108
    """Remove those of the segments that exist and that no process maps; returns their names."""
    left = [name for name in sorted(set(names)) if (folder / name).exists()]
    if not left:
        return []
    used = mapped((int(entry.name) for entry in proc.iterdir() if entry.name.isdigit()), proc)
    gone = [name for name in left if name not in used]
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    return gone
