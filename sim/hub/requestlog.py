"""The hub's request log: what was asked and how much was sent, so that a test can tell what was fetched twice."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

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


class RequestLog:
    """Entries in the order in which their requests ended, in memory and, if wanted, appended to a file."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._entries: deque[Entry] = deque(maxlen=_KEPT)
        self._running = 0
        self._changed = threading.Condition()

    @contextmanager
    def request(self, entry: Entry) -> Iterator[Entry]:
        """Keep an entry when the block ends, however it ends."""
        with self._changed:
            self._running += 1
        try:
            yield entry
        finally:
            with self._changed:
                self._running -= 1
                self._entries.append(entry)
                if self._file is not None:
                    with self._file.open("a") as stream:
                        stream.write(json.dumps(asdict(entry)) + "\n")
                self._changed.notify_all()

    def lines(self, wait_s: float) -> str:
        """Return all entries as JSON lines, once no request is running or after `wait_s` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0, timeout=wait_s)
            return "".join(json.dumps(asdict(entry)) + "\n" for entry in self._entries)

    def clear(self) -> None:
        """Forget the entries in memory."""
        with self._changed:
            self._entries.clear()
