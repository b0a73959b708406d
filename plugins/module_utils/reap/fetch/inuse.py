"""Which models a host needs: the wanted one, the running one, and those that the service could go back to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..serve.config import ServiceConfig
from ..serve.state import alive, read_json


def models(service_files: Iterable[Path], generations: Path, running: Path) -> list[str]:
    """Folders of the models in use, links resolved.

    Args:
        service_files: what the service is told to serve (/etc/reap/service.json); one that is missing names nothing.
        generations: folder of the configurations that served, one JSON file each (``reap.serve.generations``).
        running: what the supervisor says of itself (/run/reap/service.json).

    Raises:
        ReapError: one of them cannot be read, or what runs is none of them, so that it is unknown what is in use.
    """
    wanted = [path for path in service_files if path.exists()]
    served = sorted(generations.glob("*.json"))
    found: list[str] = []
    for path in [*wanted, *served]:
        try:
            found += _named(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ReapError(
                f"{path} cannot be read ({error}), so it is unknown which models are in use; nothing was removed. "
                "Provision this host, which writes it anew, or take the file away."
            ) from error
    state = read_json(running) or {}
    name = state.get("generation")
    runs = bool(name) and state.get("phase") != "absent" and alive(state)
    # One that is being loaded for the first time is in no record, and the file may ask for another one by now.
    if runs and name not in {path.stem for path in served} | {ServiceConfig.read(path).generation for path in wanted}:
        raise ReapError(
            f"{running} says that {name} is running, which is neither what {_list(wanted)} asks for nor one of "
            f"{generations}, so it is unknown which model that is; nothing was removed. Wait until it serves."
        )
    return found


def _named(value: Any) -> list[str]:
    """Every ``model_dir`` in it, at any depth."""
    if isinstance(value, list):
        return [name for inner in value for name in _named(inner)]
    if not isinstance(value, dict):
        return []
    own = value.get("model_dir")
    return ([os.path.realpath(own)] if isinstance(own, str) else []) + _named(list(value.values()))


def _list(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths) or "a service file"
