"""The hub's request log: what was asked and how much was sent, so that a test can tell what was fetched twice.

In memory a request is shown when it ended. In a file it has its line from the begin, and that line is kept up to date
in place, so that a hub that is killed has written down what it had sent until then.
"""

from __future__ import annotations

import bisect
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_KEPT = 100_000  # entries in memory; a log file keeps all


@dataclass
class Entry:
    """One request. `bytes` counts the body bytes handed to the network; `complete` says that all of them were."""

    method: str
    path: str
    host: str | None
    client: str
    range: str | None
    authorized: bool  # an Authorization header came with it; its value is never kept
    unix: float = field(default_factory=lambda: round(time.time(), 3))
    status: int | None = None
    offset: int = 0  # of the first body byte in the file
    bytes: int = 0
    complete: bool = False
    rules: list[int] = field(default_factory=list)


class _Line:
    """One entry's line in the file; spaces at its end leave room for what the numbers will be."""

    _ROOM = 200

    def __init__(self, file: Path, entry: Entry) -> None:
        self._entry = entry
        # Not for appending: Linux would write an update at the end, too.
        self._handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._at = os.lseek(self._handle, 0, os.SEEK_END)
        self._width = len(json.dumps(asdict(entry)).encode()) + self._ROOM
        self.update()

    def update(self) -> None:
        text = json.dumps(asdict(self._entry)).encode()
        os.pwrite(self._handle, text.ljust(self._width) + b"\n", self._at)

    def close(self) -> None:
        self.update()
        os.close(self._handle)


class RequestLog:
    """Entries in the order in which their requests began; in a file too, if wanted."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._entries: deque[Entry] = deque(maxlen=_KEPT)
        self._running: dict[int, Entry] = {}
        self._lines: dict[int, _Line] = {}
        self._changed = threading.Condition()

    @contextmanager
    def request(self, entry: Entry) -> Iterator[Entry]:
        """Keep an entry, and show it when the block ends, however it ends."""
        with self._changed:
            self._running[id(entry)] = entry
            self._entries.append(entry)
            if self._file is not None:
                # The lock keeps two from taking the same place.
                self._lines[id(entry)] = _Line(self._file, entry)
        try:
            yield entry
        finally:
            with self._changed:
                del self._running[id(entry)]
                line = self._lines.pop(id(entry), None)
                if line is not None:
                    line.close()
                self._changed.notify_all()

    def sent(self, entry: Entry) -> None:
        """Bring the entry's line in the file up to date: more of the body was handed to the network."""
        if line := self._lines.get(id(entry)):
            line.update()

    def lines(self, wait_s: float) -> str:
        """Return what has ended as JSON lines, once no request is running or after `wait_s` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout=wait_s)
            ended = (entry for entry in self._entries if id(entry) not in self._running)
            return "".join(json.dumps(asdict(entry)) + "\n" for entry in ended)

    def clear(self, wait_s: float = 60.0) -> None:
        """Forget the entries of ended requests in memory, once no request is running or after `wait_s` seconds.

        A client has its answer a moment before its request ends here.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout=wait_s)
            self._entries = deque(self._running.values(), maxlen=_KEPT)


def sent_twice(lines: Iterable[Any], path: str, kills: Sequence[float]) -> list[int]:
    """Bytes of files below ``path`` that the hub sent again, for each kill.

    Args:
        lines: the hub's log, in the order in which the requests began, those that a killed hub left with it.
        kills: when, as the log has it (Unix time, s).
    """
    twice = [0] * len(kills)
    ends: dict[str, int] = {}
    for line in lines:
        if line["method"] == "GET" and "/resolve/" in line["path"] and line["path"].startswith(path):
            again = max(0, ends.get(line["path"], 0) - line["offset"])
            if again:
                # Of the last kill before the request.
                twice[max(0, bisect.bisect(kills, line["unix"]) - 1)] += again
            ends[line["path"]] = line["offset"] + line["bytes"]
    return twice
