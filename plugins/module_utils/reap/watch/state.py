"""The two small files through which the service and the watchdog know of each other (see docs/watchdog.md)."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .cgroup import CgroupPaths
from .policy import Carried, Phase


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What ``reap serve`` wrote, as far as the watchdog needs it."""

    phase: Phase
    supervisor_pid: int | None
    container_id: str | None
    container_name: str | None
    container_pid: int | None
    cgroups: CgroupPaths
    profile: str
    generation: str


ABSENT = ServiceState(Phase.ABSENT, None, None, None, None, CgroupPaths(None, {}), "", "")


def parse_service_state(text: str, boot_id: str) -> ServiceState:
    """Read service.json. A file of an earlier boot speaks of a container that is gone.

    Raises:
        ValueError: where the text is no service state; the caller keeps what it knew.
    """
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("wanted an object")
    if data.get("boot_id") not in (None, "", boot_id):
        return ABSENT
    cgroup = data.get("cgroup") or {}
    v1 = cgroup.get("v1") or {}
    return ServiceState(
        phase=Phase(data["phase"]),
        supervisor_pid=_positive(data.get("pid")),
        container_id=data.get("container_id") or None,
        container_name=data.get("container_name") or None,
        container_pid=_positive(data.get("container_pid")),
        cgroups=CgroupPaths(cgroup.get("v2") or None, {str(name): str(path) for name, path in v1.items()}),
        profile=str(data.get("profile") or ""),
        generation=str(data.get("generation") or ""),
    )


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 1 else None


# No file has it: the next look reads the file.
_UNREAD = (-1, -1, -1)


class ServiceFile:
    """service.json, read again only when it was replaced."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._path = path
        self._boot_id = boot_id
        self._stamp: tuple[int, int, int] | None = _UNREAD
        self.state = ABSENT
        self.problem: str | None = None

    def refresh(self) -> bool:
        """Read it if it changed; returns whether ``state`` or ``problem`` changed.

        Only a file that is not there means that nothing is served. An error keeps the last state, and is tried again.
        """
        stamp: tuple[int, int, int] | None
        before = (self.state, self.problem)
        try:
            try:
                stat = self._path.stat()
                stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            except FileNotFoundError:
                stamp = None
            if stamp == self._stamp:
                return False
            if stamp is None:
                self.state = ABSENT
            else:
                self.state = parse_service_state(self._path.read_text(encoding="utf-8"), self._boot_id)
            self._stamp, self.problem = stamp, None
        except OSError as error:
            self._stamp, self.problem = _UNREAD, f"{self._path}: {error.strerror or error}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._stamp, self.problem = stamp, f"{self._path}: {error}"
        return before != (self.state, self.problem)


def carried_from_json(data: object) -> Carried:
    """What the instance before left, of the same boot; an empty one where that is missing or damaged."""
    try:
        values = {f.name: data[f.name] for f in fields(Carried)}  # type: ignore[index]
        carried = Carried(**values)
        carried.stops = [float(stop) for stop in carried.stops]
    except (KeyError, TypeError, ValueError):
        return Carried()
    return carried


def read_json(path: Path) -> Any:
    """The file's content; None where it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Write beside, then rename; a reader sees the old or the new text. Raises OSError, leaving nothing behind."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            # A disk that is nearly full takes a part, and says so at the next write only.
            left = memoryview(text.encode("utf-8"))
            while left:
                left = left[os.write(fd, left) :]
        finally:
            os.close(fd)
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def read_boot_id() -> str:
    """The kernel's id of this boot; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
