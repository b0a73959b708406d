"""What a start asks of the host: its memory, the port, the key."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path

from ..errors import ReapError
from .config import ServiceConfig
from .docker import Docker
from .failure import Failure

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def require_parts(config: ServiceConfig, docker: Docker) -> str | None:
    """Make sure that image, checkpoint and API key are there; returns the key, or nothing where there is none.

    Raises:
        Failure: what is missing, and what to do.
        DockerDown: the engine does not answer.
    """
    if docker.image_id(config.image) is None:
        raise Failure(f"image {config.image} is not on this host; provision it", permanent=True)
    if not Path(config.model_dir, "config.json").is_file():
        raise Failure(f"no checkpoint in {config.model_dir} (config.json is missing); provision it", permanent=True)
    return read_key(Path(config.api_key_file), required=config.api_key_required)


def key_mtime_ns(config: ServiceConfig) -> int | None:
    """When the API key was written last (ns), or nothing where there is none: another key needs a restart."""
    try:
        return Path(config.api_key_file).stat().st_mtime_ns
    except OSError:
        return None


def read_key(path: Path, *, required: bool) -> str | None:
    """Read an API key; nothing when there is no file and none is required.

    Raises:
        Failure: no file though one is required, nothing in it, or others may read it.
    """
    try:
        mode = path.stat().st_mode
        key = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        if not required:
            return None
        text = f"API key file {path} is missing and a key is required; provision with REAP_API_KEY set"
        raise Failure(text, permanent=True, blames=False) from error
    except OSError as error:
        raise Failure(f"API key file {path}: {error.strerror}", permanent=True, blames=False) from error
    if mode & 0o077:
        text = f"API key file {path} has mode {mode & 0o777:04o}, wanted 0600: chmod 600 {path}"
        raise Failure(text, permanent=True, blames=False)
    if not key or any(not 33 <= ord(letter) <= 126 for letter in key):
        text = f"API key file {path}: wanted one line of printable ASCII without blanks"
        raise Failure(text, permanent=True, blames=False)
    return key


def port_taken(host: str, port: int) -> str | None:
    """Say who listens where the model is to listen, or nothing when the place is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # Two sockets may be bound to one address; only one may listen there.
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} on {host} is in use by {_listener(port)}; stop that, or choose another reap_port"
            return f"cannot listen on {host}:{port}: {error.strerror}; choose another reap_bind_address"
    return None


def _listener(port: int) -> str:
    """The process that listens on a TCP port, from /proc (proc(5): state 0A is LISTEN)."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for fields in (row.split() for row in rows):
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(os.readlink(handle) in inodes for handle in (process / "fd").iterdir()):  # noqa: PTH115
                return f"process {process.name} ({(process / 'comm').read_text().strip()})"
        except OSError:
            continue
    return "a process that could not be found"


def mem_available_kb() -> int:
    """MemAvailable of /proc/meminfo, in kB."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    raise ReapError("/proc/meminfo has no MemAvailable: this kernel is older than 3.14")


def drop_page_cache() -> None:
    """On a GB10 page cache counts against CUDA's allocations: give it back before the load."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n", encoding="ascii")
    except OSError as error:
        print(f"reap serve: page cache not dropped: {error.strerror}", file=sys.stderr, flush=True)
