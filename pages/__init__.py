"""Pages drawn on the controller from data a host gathered. Third-party libraries are allowed here, and nowhere else."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# One of Ansible's workers has no home it may write to for sure; matplotlib wants a folder for its font list.
os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / f"reap-matplotlib-{os.getuid()}"))


def write(path: Path, data: bytes) -> None:
    """Write a file that a reader finds as it was or whole; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    beside.write_bytes(data)
    beside.replace(path)
