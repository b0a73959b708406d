"""What the host has and what it uses besides the model.

MemAvailable is the kernel's own estimate of what can be had without swapping (Documentation/filesystems/proc.rst): free
memory and the page cache and slab that can be dropped, less the reserve that the kernel keeps (watermarks). So MemTotal
- MemAvailable, read while no model is loaded, is what the host uses, kernel reserve included. Swap counts for nothing:
  a Spark that swaps under a model is a Spark that freezes.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ReapError

MEMINFO = Path("/proc/meminfo")
SERVICE_STATE = Path("/run/reap/service.json")
HOST_MEMORY_FILE = Path("/var/lib/reap/host-memory.json")

_NEEDED = ("MemTotal", "MemAvailable")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of a host, in bytes.

    Attributes:
        total: MemTotal.
        available: MemAvailable; None where only MemTotal is known (planning for a host that is elsewhere).
        free: MemFree, None where not read.
        page_cache: Page cache and slab that can be dropped, None where not read.
        swap_total: SwapTotal, for the record only.
        model_loaded: Whether a model of this recipe is loaded, so that MemAvailable says nothing about the host itself.
        remembered: What the host used without a model when the gate last let a start through, None where nothing is
            remembered.
    """

    total: int
    available: int | None = None
    free: int | None = None
    page_cache: int | None = None
    swap_total: int | None = None
    model_loaded: bool = False
    remembered: int | None = None

    def __post_init__(self) -> None:
        if self.total <= 0:
            raise ReapError(f"MemTotal is {self.total} bytes; a host has more than that")
        if self.available is not None and not 0 <= self.available <= self.total:
            raise ReapError(f"MemAvailable is {self.available} bytes of {self.total} in all: one of the two is wrong")

    @classmethod
    def read(
        cls,
        meminfo: Path = MEMINFO,
        service_state: Path = SERVICE_STATE,
        remembered_file: Path | None = HOST_MEMORY_FILE,
        *,
        total: int | None = None,
        available: int | None = None,
    ) -> HostMemory:
        """This host, from /proc/meminfo, the service's state file and what the gate remembered.

        Args:
            meminfo: File in the form of /proc/meminfo.
            service_state: Written by the service; missing means that nothing is served.
            remembered_file: Written by `remember`; None or missing means that nothing is remembered.
            total: Bytes to take instead of MemTotal. With `available` given as well, nothing of this host is read.
            available: Bytes to take instead of MemAvailable.

        Raises:
            ReapError: /proc/meminfo is unreadable or lacks MemTotal or MemAvailable.
        """
        if total is not None:
            # Figures of another host, or of a test: what this machine holds is then nobody's business.
            return cls(total, available)
        try:
            text = meminfo.read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise ReapError(f"{meminfo} cannot be read: {error.strerror}") from error
        found = parse_meminfo(text, str(meminfo))
        droppable = sum(found.get(key, 0) for key in ("Buffers", "Cached", "SReclaimable")) - found.get("Shmem", 0)
        return cls(
            total=found["MemTotal"],
            available=found["MemAvailable"] if available is None else available,
            free=found.get("MemFree"),
            page_cache=max(droppable, 0),
            swap_total=found.get("SwapTotal"),
            model_loaded=model_loaded(service_state),
            remembered=recall(remembered_file, found["MemTotal"]) if remembered_file is not None else None,
        )


def parse_meminfo(text: str, where: str = "/proc/meminfo") -> dict[str, int]:
    """Bytes of each line of /proc/meminfo that is given in kB (1,024 bytes).

    Raises:
        ReapError: MemTotal or MemAvailable is missing or no number.
    """
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isascii() and words[0].isdigit() and len(words[0]) <= 15:
            found[name.strip()] = int(words[0]) * 1024
    for name in _NEEDED:
        if name not in found:
            raise ReapError(f"{where} has no {name} in kB: a Linux kernel of 3.14 or later is wanted")
    return found


def model_loaded(state: Path = SERVICE_STATE) -> bool:
    """Whether the service says that it holds a model (or is taking one in or giving one up), and its process is alive.

    A state file that cannot be read or makes no sense counts as nothing loaded: then the measured figure is taken,
    which can only refuse.
    """
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or found.get("phase") not in ("loading", "serving", "stopping"):
        return False
    pid = found.get("pid")
    return isinstance(pid, int) and not isinstance(pid, bool) and pid > 0 and Path(f"/proc/{pid}").exists()


def remember(path: Path, host: HostMemory) -> None:
    """Keep what the host uses without a model, for judging profiles while a model is loaded. Written beside, then
    renamed.

    Raises:
        ReapError: The file cannot be written.
    """
    if host.available is None:
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(
            json.dumps({"mem_total_bytes": host.total, "host_bytes": host.total - host.available}) + "\n",
            encoding="utf-8",
        )
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise ReapError(f"{path} cannot be written: {error.strerror}") from error


def recall(path: Path, total: int) -> int | None:
    """What `remember` kept, or None: no file, another MemTotal (the host was changed), or a figure that cannot be."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("mem_total_bytes") != total:
        return None
    value = found.get("host_bytes")
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= total else None
