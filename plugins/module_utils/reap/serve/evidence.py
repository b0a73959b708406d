"""What is kept of a wedged engine before it is ended: nobody can look at it afterwards."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .state import write_text

SCHEMA = "reap-service-evidence/1"
KEPT = 5
# Of each thread: what it waits for. ``stack`` is the kernel's, and readable only with CAP_SYS_ADMIN.
_THREAD_FILES = ("wchan", "syscall", "stack")


def threads(pid: int, proc: Path = Path("/proc")) -> list[dict[str, Any]]:
    """A process's threads: [{tid, name, state (R, S, D, T, Z), and wchan, syscall, stack where readable}]."""
    found = []
    for folder in sorted((proc / str(pid) / "task").glob("*"), key=lambda path: int(path.name)):
        stat = _text(folder / "stat")
        if stat is None:
            continue
        # The name stands in brackets and may hold blanks and brackets itself (proc(5)).
        name, _, rest = stat.partition("(")[2].rpartition(")")
        thread: dict[str, Any] = {"tid": int(folder.name), "name": name, "state": rest.split()[0]}
        read = {file: _text(folder / file) for file in _THREAD_FILES}
        found.append(thread | {file: text for file, text in read.items() if text and text != "0"})
    return found


def collect(
    *,
    reason: str,
    state: Mapping[str, Any],
    samples: Iterable[Mapping[str, Any]],
    metrics: str,
    container_state: Mapping[str, Any] | None,
    log: Iterable[str],
    pids: Iterable[int],
) -> dict[str, Any]:
    """The bundle: see docs/service.md for its fields."""
    return {
        "schema": SCHEMA,
        "reason": reason,
        "unix": round(time.time(), 3),
        "service": {key: state[key] for key in ("generation", "image", "endpoint", "container_id", "started_unix")},
        "samples": list(samples),
        "metrics": [line for line in metrics.splitlines() if not line.startswith("#")],
        "container_state": container_state,
        "processes": [{"pid": pid, "threads": found} for pid in pids if (found := threads(pid))],
        "meminfo": (_text(Path("/proc/meminfo")) or "").splitlines(),
        "log": list(log),
    }


def save(folder: Path, bundle: Mapping[str, Any]) -> Path:
    """Write ``<folder>/<UTC>-wedge/bundle.json`` and keep the last ``KEPT``. Raises OSError."""
    target = folder / (time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-wedge") / "bundle.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(bundle, indent=1) + "\n", 0o644)
    for old in sorted(folder.glob("*-wedge"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(folder: Path) -> dict[str, Any] | None:
    """Path, reason and time (unix s) of the last bundle; None where there is none that can be read."""
    for path in sorted(folder.glob("*-wedge/bundle.json"), reverse=True):
        try:
            bundle = json.loads(path.read_text(encoding="utf-8"))
            return {"path": str(path), "reason": str(bundle["reason"]), "unix": float(bundle["unix"])}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
