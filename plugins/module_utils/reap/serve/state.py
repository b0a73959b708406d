"""Files that others read: written beside and renamed, so that nobody sees half of one."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any


def write_json(path: Path, data: object, mode: int = 0o644) -> None:
    """Replace a file by the JSON of ``data`` in one step; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, sort_keys=True) + "\n", mode)


def write_text(path: Path, text: str, mode: int) -> None:
    """Replace a file in one step; nobody without the right of ``mode`` can read it at any moment."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(text)
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a file; nothing when there is no file, or no mapping in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def boot_id() -> str:
    """The kernel's name for this boot: a state with another one is from before a reboot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def alive(state: dict[str, Any]) -> bool:
    """Whether the supervisor that wrote a state still runs."""
    return state.get("boot_id") == boot_id() and Path(f"/proc/{state.get('pid')}").is_dir()


class ServiceState:
    """/run/reap/service.json as the supervisor writes it.

    Keys: phase (loading, serving, stopping, absent), since_unix (s, when the phase began), boot_id, pid (the
    supervisor's), container_name, container_id, container_pid (its init), started_unix (s, the container's start),
    cgroup {v2: folder or null, v1: {controller: folder}}, generation, profile, served_model_name, image, image_id (what
    that name meant at the start), endpoint, detail (one line), progress {step: weights, graphs or warmup; done; total;
    unit} or null, replaced {generation, reason} when a newer generation failed, key_mtime_ns (of the API key's file at
    the start) or null.
    """

    def __init__(self, path: Path, container_name: str) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "phase": "absent",
            "since_unix": time.time(),
            "boot_id": boot_id(),
            "pid": os.getpid(),
            "container_name": container_name,
            "container_id": None,
            "container_pid": None,
            "started_unix": None,
            "cgroup": {"v2": None, "v1": {}},
            "generation": "",
            "profile": "",
            "served_model_name": "",
            "image": "",
            "image_id": None,
            "endpoint": "",
            "detail": "",
            "progress": None,
            "replaced": None,
            "key_mtime_ns": None,
        }

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    @property
    def content(self) -> dict[str, Any]:
        """All keys, as the file has them."""
        return dict(self._content)

    def publish(self, **changes: Any) -> None:
        """Set keys and write the file where that changes something."""
        unknown = changes.keys() - self._content.keys()
        assert not unknown, unknown
        new = {**self._content, **changes}
        if new["phase"] != self._content["phase"]:
            new["since_unix"] = time.time()
        if new != self._content or not self._path.exists():
            self._content = new
            write_json(self._path, new)
