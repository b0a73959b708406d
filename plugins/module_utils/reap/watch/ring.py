"""The memory series of the last minutes, in memory that the guarding and the writing process share."""

from __future__ import annotations

import mmap
import struct

_HEADER = struct.Struct("<qq")
_ENTRY = struct.Struct("<dq")


class Ring:
    """(monotonic s, kB) readings; one process appends, another reads. Unreadable memory is stored as -1 kB.

    A reader that meets the writer may see the entry being written; one reading of thousands, in a picture.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._memory = mmap.mmap(-1, _HEADER.size + capacity * _ENTRY.size)
        self._count = 0

    def append(self, now: float, kb: int) -> None:
        """Add one reading; the oldest is overwritten when the ring is full."""
        _ENTRY.pack_into(self._memory, _HEADER.size + (self._count % self.capacity) * _ENTRY.size, now, kb)
        self._count += 1
        _HEADER.pack_into(self._memory, 0, self._count, 0)

    def last(self, seconds: float) -> list[tuple[float, int]]:
        """The readings of the last ``seconds``, oldest first, also from another process than the writer's."""
        count = _HEADER.unpack_from(self._memory, 0)[0]
        entries = [
            _ENTRY.unpack_from(self._memory, _HEADER.size + (index % self.capacity) * _ENTRY.size)
            for index in range(max(0, count - self.capacity), count)
        ]
        since = entries[-1][0] - seconds if entries else 0.0
        return [(now, kb) for now, kb in entries if now >= since]
