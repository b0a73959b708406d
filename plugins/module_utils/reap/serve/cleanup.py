"""What a model container leaves behind, removed without trusting anything that should have done it before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import cgroups, shm
from .config import CONTAINER_NAME
from .docker import Docker, DockerDown
from .state import alive, read_json


def clean_up(docker: Docker, run_dir: Path, cgroup: cgroups.Cgroup | None = None) -> None:
    """Remove what a model container left, however it ended: processes, the container, shared memory, the key's file.

    Safe to run again, and with nothing there. Only a container that this service made is touched.
    """
    state = read_json(run_dir / "service.json") or {}
    if cgroup is None:
        cgroup = cgroups.NOWHERE if state and not _ours_to_clean(state) else state.get("cgroup") or cgroups.NOWHERE
    try:
        found = docker.find(CONTAINER_NAME)
        if found and found.generation is not None:
            if found.pid:
                cgroup = cgroups.of_process(found.pid)
            cgroups.kill(cgroup)
            docker.remove(CONTAINER_NAME)
    except DockerDown:
        cgroups.kill(cgroup)
    segments = read_json(run_dir / "segments.json")
    if segments:
        gone = shm.remove(segments.get("names", []))
        if gone:
            print(
                f"reap serve: removed {len(gone)} shared memory segments the model left: {', '.join(gone)}", flush=True
            )
        (run_dir / "segments.json").unlink(missing_ok=True)
    (run_dir / "model.env").unlink(missing_ok=True)


def _ours_to_clean(state: dict[str, Any]) -> bool:
    """Control groups of an earlier boot, or of a supervisor that lives, are none of ours."""
    return state.get("pid") == os.getpid() or not alive(state)
