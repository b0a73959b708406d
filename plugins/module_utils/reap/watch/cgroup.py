"""Find a container's cgroup and kill everything in it, without asking the container engine.

cgroup v2 has ``cgroup.kill``: one write, and the kernel kills the whole subtree at once (Linux 5.14). On cgroup v1,
and on older kernels, each process in ``cgroup.procs`` of the subtree gets SIGKILL, again and again until none is
left, because a process may fork between the reading and the signal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

# Any v1 hierarchy names the same processes; these are the ones a container engine always uses.
_V1_PREFERRED = ("pids", "memory", "freezer", "devices", "cpuset", "cpu", "cpu,cpuacct", "blkio")
_READ = 65536
# What the kernel answers for a group that was removed: on opening, and on a descriptor that was open.
_GONE = (errno.ENOENT, errno.ENODEV)


@dataclass(frozen=True, slots=True)
class CgroupPaths:
    """Paths below the mount points as in /proc/PID/cgroup, or whole folders: ``v2`` or None, v1 by controller."""

    v2: str | None
    v1: dict[str, str]


def parse_proc_cgroup(text: str) -> CgroupPaths:
    """Read the text of /proc/PID/cgroup (``id:controllers:path`` a line; see cgroups(7))."""
    v2: str | None = None
    v1: dict[str, str] = {}
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        number, controllers, path = parts
        path = path.removesuffix(" (deleted)")
        if number == "0" and not controllers:
            v2 = path
        else:
            v1[controllers.removeprefix("name=")] = path
    return CgroupPaths(v2, v1)


def find_folder(root: Path, paths: CgroupPaths, own: CgroupPaths) -> Path | None:
    """The folder of the container's cgroup below ``root`` (/sys/fs/cgroup); None where none is safe to kill.

    ``own`` are the cgroups of this process: a folder that holds them, or the root of a hierarchy, is never given.
    """
    for base in (root, root / "unified"):
        path = _below_mount(paths.v2, base)
        folder = base / path.lstrip("/")
        if _is_inner(path, own.v2) and (folder / "cgroup.procs").exists() and (base / "cgroup.controllers").exists():
            return folder
    names = [name for name in _V1_PREFERRED if name in paths.v1]
    for name in [*names, *(name for name in paths.v1 if name not in names)]:
        path = _below_mount(paths.v1[name], root / name)
        folder = root / name / path.lstrip("/")
        if _is_inner(path, own.v1.get(name)) and (folder / "cgroup.procs").exists():
            return folder
    return None


def _below_mount(path: str | None, mount: Path) -> str:
    """The path below a mount point, whether it was given so or as a whole folder."""
    path = path or ""
    return path[len(str(mount)) :] if path.startswith(f"{mount}/") else path


def _is_inner(path: str, own: str | None) -> bool:
    parts = [part for part in path.split("/") if part]
    if not parts or ".." in parts:
        return False
    own_parts = [part for part in (own or "").split("/") if part]
    return own_parts[: len(parts)] != parts


class Target:
    """One container that can be killed; ``cgroup.kill`` and ``cgroup.events`` are held open from when it is known.

    ``cgroup.procs`` is not: on cgroup v1 a descriptor that is read more often than once a second keeps answering with
    the list it made first (kernel/cgroup/cgroup-v1.c, cgroup_pidlist_start), so processes that ended stay in it.

    Only ENOENT and ENODEV, the kernel's answers for a group that was removed, mean that nothing is there. Any other
    error (no memory, no descriptor) says nothing, and a container of which nothing is known counts as alive.
    """

    def __init__(self, identity: str, folder: Path) -> None:
        self.identity = identity
        self.folder = folder
        self._procs = str(folder / "cgroup.procs")
        self._buffer = bytearray(_READ)
        self._views = [self._buffer]
        os.close(os.open(self._procs, os.O_RDONLY | os.O_CLOEXEC))
        self._kill = self._events = -1
        with contextlib.suppress(OSError):
            self._kill = os.open(folder / "cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            self._events = os.open(folder / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        self._own_pid = os.getpid()

    def close(self) -> None:
        """Give the descriptors back."""
        for fd in (self._kill, self._events):
            if fd >= 0:
                os.close(fd)
        self._kill = self._events = -1

    def processes(self) -> list[int]:
        """Process ids in the container's own cgroup; empty when it is gone. Raises OSError when that is not known."""
        return self._pids_of(self._procs)

    def alive(self) -> bool:
        """Whether a process is left in the cgroup or below it, or that cannot be known now."""
        try:
            if self._events >= 0:
                # cgroup v2 says it for the whole subtree in one read of a kept descriptor.
                length = os.preadv(self._events, self._views, 0)
                return self._buffer.find(b"populated 0", 0, length) < 0
            return self._read(self._procs) > 0 or any(self._read(procs) > 0 for procs in _below(self.folder))
        except OSError as error:
            return error.errno not in _GONE

    def kill(self) -> int:
        """Send one round of kills. Returns the number of processes that were seen in the group, counted afterwards."""
        if self._kill >= 0:
            with contextlib.suppress(OSError):
                # Before anything else: what follows needs memory for a path and for a list.
                os.write(self._kill, b"1")
                try:
                    return len(self.processes())
                except OSError:
                    return 0
        killed = self._signal(self._procs)
        try:
            for procs in _below(self.folder):
                killed += self._signal(procs)
        except OSError:
            pass  # the next round, a reading later, tries again
        return killed

    def _signal(self, procs: str) -> int:
        killed = 0
        try:
            pids = self._pids_of(procs)
        except OSError:
            return 0
        for pid in pids:
            # Pid 0 stands for a process of a namespace this one cannot see; kill(0) would mean this very group.
            if pid > 1 and pid != self._own_pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        return killed

    def _read(self, procs: str) -> int:
        """Read a list of processes into the kept buffer; its length in bytes, 0 for a group that is gone."""
        try:
            fd = os.open(procs, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _GONE:
                return 0
            raise
        try:
            return os.readv(fd, self._views)
        except OSError as error:
            if error.errno in _GONE:
                return 0
            raise
        finally:
            os.close(fd)

    def _pids_of(self, procs: str) -> list[int]:
        length = self._read(procs)
        words = bytes(self._buffer[:length]).split()
        if length == _READ:
            # The last number of a list longer than the buffer may be cut; its process is met in the next round.
            words.pop()
        return [int(word) for word in words]


def _below(folder: Path) -> list[str]:
    """The cgroup.procs files of the groups below a group. Raises OSError when they cannot be known."""
    found: list[str] = []
    stack = [str(folder)]
    while stack:
        try:
            inner = [entry.path for entry in os.scandir(stack.pop()) if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            if error.errno in _GONE:
                continue
            raise
        found += [f"{path}/cgroup.procs" for path in inner]
        stack += inner
    return found
