"""What the watchdog needs from the kernel: MemAvailable, pressure triggers, a locked process, systemd's socket.

Everything that can be opened beforehand is opened beforehand: when memory runs out there is none for a path lookup.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from pathlib import Path

_KEY = b"MemAvailable:"
_BUFFER = 16384
# linux/mman.h
_MCL_CURRENT, _MCL_FUTURE = 1, 2
# Without CAP_SYS_RESOURCE the window has to be a multiple of 2 s (kernel: Documentation/accounting/psi.rst).
_TRIGGERS = (b"some 50000 1000000\0", b"some 100000 2000000\0")
_REALTIME_PRIORITY = 20


class Meminfo:
    """MemAvailable through one descriptor and one buffer, both kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = bytearray(_BUFFER)
        self._views = [self._buffer]
        self._fd = -1
        self._length = 0
        self.total_kb = 0
        self.reopen()

    def reopen(self) -> None:
        """Open the file again, for instance after reads failed; stays unreadable when that fails too."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        if self.read() is not None:
            self.total_kb = parse_meminfo(self._buffer, self._length, b"MemTotal:") or 0

    def read(self) -> int | None:
        """MemAvailable in kB; None when it cannot be read."""
        if self._fd < 0:
            return None
        try:
            self._length = os.preadv(self._fd, self._views, 0)
        except OSError:
            self._length = 0
            return None
        return parse_meminfo(self._buffer, self._length, _KEY)

    def text(self) -> str:
        """The whole of what the last read saw."""
        return bytes(self._buffer[: self._length]).decode("ascii", "replace")


def parse_meminfo(buffer: bytearray | bytes, length: int, key: bytes) -> int | None:
    """The number of kB after ``key``; None where there is none."""
    at = buffer.find(key, 0, length)
    if at < 0:
        return None
    end = buffer.find(b" kB", at + len(key), length)
    try:
        return int(buffer[at + len(key) : end]) if end > 0 else None
    except ValueError:
        return None


class Pressure:
    """A memory-pressure trigger to be polled with POLLPRI; ``fd`` is -1 where the kernel has none to give."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        for trigger in _TRIGGERS:
            try:
                fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                return
            try:
                os.write(fd, trigger)
            except OSError:
                os.close(fd)
                continue
            self.fd = fd
            return


def lock_memory() -> str | None:
    """Keep every page of this process in RAM. Returns None, or why it could not be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) == 0:
        return None
    return os.strerror(ctypes.get_errno())


def protect_from_oom_killer() -> int | None:
    """Ask for the lowest OOM score that is allowed; returns the score that holds, None where there is none."""
    path = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):
        path.write_text("-1000\n", encoding="ascii")
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def run_before_others() -> str:
    """Take real-time scheduling (not inherited by children), else the best nice value; says which it got."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(_REALTIME_PRIORITY))
    except (OSError, AttributeError):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        return f"nice {os.getpriority(os.PRIO_PROCESS, 0)}"
    return f"round-robin {_REALTIME_PRIORITY}"


class Systemd:
    """The notification socket of systemd; silent where the process was not started by it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._socket: socket.socket | None = None
        address = environment.get("NOTIFY_SOCKET", "")
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            self._socket.connect("\0" + address[1:] if address.startswith("@") else address)
        usec = environment.get("WATCHDOG_USEC", "")
        # A third of the allowed time: two pings may be lost.
        self.ping_s = int(usec) / 3e6 if usec.isdigit() else 0.0

    def send(self, message: bytes) -> None:
        """Send one message; a full or absent socket is no reason to stop guarding."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(message)
