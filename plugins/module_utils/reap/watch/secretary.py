"""The writing half of the watchdog: a child process that takes messages and touches disk, journal and /proc.

The guarding process only ever sends to a socket that does not block. So a full or hanging disk, a stopped journal
or a slow file system can delay what is written, and never what is decided.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from . import evidence
from .config import Settings
from .ring import Ring
from .state import write_atomic

_MESSAGE_BYTES = 131072
# The series of a bundle goes on for this long after the kill, so that it shows memory coming back.
_SERIES_AFTER_S = 3.0
_WRITER_AGAIN_S = 1.0
_SNAPSHOT_S = 60.0
_SNAPSHOT_NEAR_S = 5.0
_PRIORITIES = {"kill": 2, "kill_failed": 2, "shed": 3, "warn": 4, "blind": 3, "problem": 3}

# name -> (type, help); the values come from the guarding process with each message.
METRICS = {
    "guarding": ("gauge", "1 while a container is held that could be killed"),
    "unguarded": ("gauge", "1 while the service names a container that is not held: it is NOT guarded"),
    "mem_available_kb": ("gauge", "MemAvailable at the last report, kB of 1024 bytes"),
    "floor_kb": ("gauge", "Floor of the present phase, kB; 0 where the phase has none"),
    "hard_floor_kb": ("gauge", "Hard floor, kB"),
    "hold_kb": ("gauge", "MemAvailable that has to be seen before a start, kB; 0 when a start is allowed"),
    "latched": ("gauge", "1 when no start is allowed until a person lifts it"),
    "kills_total": ("counter", "Containers killed in this boot"),
    "sheds_total": ("counter", "Graceful stops asked for in this boot"),
    "readings_total": ("counter", "Readings of MemAvailable"),
    "unreadable_total": ("counter", "Readings that failed"),
    "pressure_total": ("counter", "Memory-pressure events of the kernel"),
    "messages_lost_total": ("counter", "Events that the writing half could not take in time"),
    "last_report_seconds": ("gauge", "Unix time of the last report"),
}
PREFIX = "reap_watchdog_"


def render_metrics(values: dict[str, Any], events: dict[str, int], phase: str) -> str:
    """The Prometheus text format (version 0.0.4) of the watchdog's numbers."""
    lines = []
    for name, (kind, text) in METRICS.items():
        lines += [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]
        lines.append(f"{PREFIX}{name} {values.get(name, 0)}")
    lines += [f"# HELP {PREFIX}phase 1 for the present phase", f"# TYPE {PREFIX}phase gauge"]
    lines += [f'{PREFIX}phase{{phase="{p}"}} {int(p == phase)}' for p in ("loading", "serving", "stopping", "absent")]
    lines += [f"# HELP {PREFIX}events_total Decisions by kind", f"# TYPE {PREFIX}events_total counter"]
    lines += [f'{PREFIX}events_total{{event="{name}"}} {count}' for name, count in sorted(events.items())]
    return "\n".join(lines) + "\n"


class Secretary:
    """The guarding process's handle: starts the writer once, sends without blocking.

    The writer has a keeper, a process that does nothing but start it anew when it was killed: the guarding process
    forks once, before it guards, and never in its loop. What lies on the line meanwhile waits for the next writer.
    """

    def __init__(self, settings: Settings, ring: Ring) -> None:
        self._settings = settings
        self._ring = ring
        self._socket: socket.socket | None = None
        self.pid = 0
        self.lost = 0

    def start(self) -> None:
        """Fork the keeper. Called once, before memory is locked and before anything is guarded."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _MESSAGE_BYTES)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ours.close()
                self._keep(theirs)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        ours.setblocking(False)
        self._socket, self.pid = ours, pid

    def _keep(self, line: socket.socket) -> None:
        """The keeper: a writer at any time, until one ends because the line was closed."""
        # The guarding process ends first; its closed end of the line is the order to finish.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        while True:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    _Writer(self._settings, self._ring, line).run()
                    code = 0
                finally:
                    os._exit(code)
            if os.waitpid(pid, 0)[1] == 0:
                return
            time.sleep(_WRITER_AGAIN_S)

    def send(self, message: dict[str, Any]) -> None:
        """Hand one message over; counts it as lost when the writer cannot take it now."""
        try:
            assert self._socket is not None
            self._socket.send(json.dumps(message).encode("utf-8"))
        except OSError:
            self.lost += 1

    def finish(self, timeout_s: float = 5.0) -> None:
        """Close the line and wait until the writer has written what it holds."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self.pid > 0:
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(self.pid)
                try:
                    select.select([pidfd], [], [], timeout_s)
                finally:
                    os.close(pidfd)
                os.waitpid(self.pid, os.WNOHANG)
            self.pid = 0


class _Writer:
    """The child: one message after the other, until the guarding process is gone."""

    def __init__(self, settings: Settings, ring: Ring, line: socket.socket) -> None:
        self._settings = settings
        self._ring = ring
        self._line = line
        self._counts: dict[str, int] = {}
        self._values: dict[str, Any] = {}
        self._phase = "absent"
        self._near = False
        self._pending: list[tuple[float, str, dict[str, Any]]] = []
        self._processes: list[dict[str, Any]] = []
        self._container_id: str | None = None
        self._container: dict[str, Any] | None = None
        self._next_snapshot = 0.0
        self._in_journal = "JOURNAL_STREAM" in os.environ

    def run(self) -> None:
        with contextlib.suppress(OSError):
            os.set_blocking(sys.stdout.fileno(), False)
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        while True:
            if poll.poll(int(1000 * self._wait_s())):
                raw = self._line.recv(_MESSAGE_BYTES)
                if not raw:
                    break
                self._take(json.loads(raw))
            now = time.monotonic()
            self._write_pending(now)
            if now >= self._next_snapshot:
                self._next_snapshot = now + (_SNAPSHOT_NEAR_S if self._near else _SNAPSHOT_S)
                with contextlib.suppress(OSError):
                    self._processes = evidence.biggest_processes()
                state = evidence.container_state(self._settings.paths.docker_data, self._container_id)
                self._container = state if state is not None else self._container
        self._write_pending(float("inf"))

    def _wait_s(self) -> float:
        due = min([self._next_snapshot, *(at for at, _, _ in self._pending)])
        return max(0.0, min(_SNAPSHOT_S, due - time.monotonic()))

    def _take(self, message: dict[str, Any]) -> None:
        self._values = message["values"]
        self._phase = message["phase"]
        near = bool(message["near"])
        if message["container_id"] != self._container_id:
            self._container_id, self._container = message["container_id"], None
            self._next_snapshot = 0.0
        if near and not self._near:
            self._next_snapshot = 0.0
        self._near = near
        event = message.get("event")
        if event is not None:
            self._counts[event["event"]] = self._counts.get(event["event"], 0) + 1
            self._tell(event)
            name = event.get("evidence")
            if name:
                bundle = evidence.collect(self._settings, event, message["meminfo"], self._processes, self._container)
                self._pending.append((time.monotonic() + _SERIES_AFTER_S, name, bundle))
        self._write_metrics()

    def _tell(self, event: dict[str, Any]) -> None:
        line = json.dumps(event)
        prefix = f"<{_PRIORITIES.get(event['event'], 6)}>" if self._in_journal else ""
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), f"{prefix}{line}\n".encode())
        path = self._settings.paths.events
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _rotate(path, self._settings.events_max_bytes)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                os.write(fd, f"{line}\n".encode())
            finally:
                os.close(fd)

    def _write_metrics(self) -> None:
        with contextlib.suppress(OSError):
            path = self._settings.paths.metrics
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, render_metrics(self._values, self._counts, self._phase))

    def _write_pending(self, now: float) -> None:
        for due, name, bundle in [entry for entry in self._pending if entry[0] <= now]:
            bundle["series"] = [[round(at, 4), kb] for at, kb in self._ring.last(60.0 * self._settings.series_minutes)]
            with contextlib.suppress(OSError):
                evidence.save(self._settings, name, bundle)
            self._pending.remove((due, name, bundle))


def _rotate(path: Path, most_bytes: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size >= most_bytes:
            path.replace(path.with_name(path.name + ".1"))
