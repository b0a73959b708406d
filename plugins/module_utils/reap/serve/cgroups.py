"""The control groups of a process, and the end of everything in them without the container engine's help."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Cgroup = dict[str, Any]
"""{"v2": folder or None, "v1": {controller: folder}}, folders as this process sees them."""

NOWHERE: Cgroup = {"v2": None, "v1": {}}


def of_process(pid: int, proc: Path = Path("/proc")) -> Cgroup:
    """Find the folders of a process's control groups (cgroups(7)); those that are not mounted here are left out."""
    found: Cgroup = {"v2": None, "v1": {}}
    try:
        lines = (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = _mounts((proc / "self" / "mountinfo").read_text(encoding="utf-8"))
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(",") if controllers else [""]:
            folder = _folder(mounts.get(controller), path)
            if folder and not controller:
                found["v2"] = folder
            elif folder:
                found["v1"][controller] = folder
    return found


def processes(cgroup: Mapping[str, Any]) -> list[int]:
    """Process ids in the groups and those below them."""
    found: set[int] = set()
    for folder in _folders(cgroup):
        for file in [folder / "cgroup.procs", *folder.glob("**/cgroup.procs")]:
            try:
                found.update(int(word) for word in file.read_text(encoding="ascii").split())
            except (OSError, ValueError):
                continue
    return sorted(found)


def kill(cgroup: Mapping[str, Any], timeout_s: float = 10.0) -> bool:
    """Kill every process in the groups: cgroup.kill where the kernel has it, else signals until none is left.

    Returns:
        Whether nothing is left.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = processes(cgroup)
        if not left or os.getpid() in left:
            return not left
        if cgroup.get("v2"):
            # Not there before Linux 5.14; the signals below do it then.
            with contextlib.suppress(OSError):
                (Path(cgroup["v2"]) / "cgroup.kill").write_text("1", encoding="ascii")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        # The kernel offers nothing to wait on for somebody else's children.
        time.sleep(0.05)


def _mounts(mountinfo: str) -> dict[str, tuple[str, str]]:
    """Controller ("" for the unified hierarchy) -> (root within the hierarchy, mount point)."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) < 5 or len(tail) < 3:
            continue
        if tail[0] == "cgroup2":
            mounts.setdefault("", (fields[3], fields[4]))
        elif tail[0] == "cgroup":
            for option in tail[2].split(","):
                mounts.setdefault(option, (fields[3], fields[4]))
    return mounts


def _folder(mount: tuple[str, str] | None, path: str) -> str | None:
    if mount is None or path == "/":
        return None
    root, point = mount
    inside = path[len(root) :] if root != "/" and path.startswith(root) else path
    folder = Path(point) / inside.lstrip("/")
    return str(folder) if folder.is_dir() else None


def _folders(cgroup: Mapping[str, Any]) -> list[Path]:
    # Every v1 hierarchy of a container holds the same processes; a hybrid host has the v2 one as well.
    v1 = list(cgroup.get("v1", {}).values())[:1]
    return [Path(folder) for folder in [cgroup.get("v2"), *v1] if folder]
