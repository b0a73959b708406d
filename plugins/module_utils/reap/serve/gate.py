"""The host's side of the door in the model's server (:mod:`reap.serve.inside.gate`): where it lies, opened and shut."""

from __future__ import annotations

import contextlib
import importlib.resources
from collections.abc import Iterable
from pathlib import Path

from .state import write_text

MODULE = "reap_gate"
MIDDLEWARE = f"{MODULE}.Gate"
FOLDER = "/opt/reap-gate"
"""Where the container sees it."""

# Read now: a new provision may have replaced the program's archive by the time of the next load.
_SOURCE = importlib.resources.files(f"{__package__}.inside").joinpath("gate.py").read_text(encoding="utf-8")


class Gate:
    """The folder that the container mounts read-only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> None:
        """Write the middleware and open the door, before a load."""
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_text(self.folder / f"{MODULE}.py", _SOURCE, 0o644)
        (self.folder / "shut").unlink(missing_ok=True)

    def shut(self) -> None:
        """Refuse every new request from now on; where that cannot be, the stop goes on without it."""
        with contextlib.suppress(OSError):
            (self.folder / "shut").touch()


def python_path(environment: Iterable[str], own: str | None) -> str:
    """PYTHONPATH with the folder before what the profile (``own``) or else the image's environment sets there."""
    set_there = next((line.split("=", 1)[1] for line in environment if line.startswith("PYTHONPATH=")), "")
    rest = set_there if own is None else own
    return f"{FOLDER}:{rest}" if rest else FOLDER
