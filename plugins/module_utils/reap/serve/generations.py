"""What was asked for before: which configurations served, which failed, and which one to go back to.

<state_dir>/generations/<name>.json holds a configuration that served, <name>.toml the watchdog's settings that it
served under; <state_dir>/generations.json says
{"good": [names, newest first], "failed": {name: {"reason", "at_unix"}}, "attempts": {name: n}}.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ReapError
from .config import ServiceConfig
from .state import read_json, write_json, write_text
from .watchdog import kept_settings

KEPT = 5
# A first load during which the host went down says nothing; a second one does.
UNFINISHED_LIMIT = 2


class Generations:
    """The record of one host.

    Args:
        warn: hears of a record that cannot be written, which then holds for this process alone; a full disk is no
            reason to end a model that serves. Without it such an error is raised, as :meth:`begin` does always.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] | None = None) -> None:
        self._folder = folder / "generations"
        self._file = folder / "generations.json"
        self._warn = warn
        # What could not be written, where a warning is enough, and what the file held then: it holds until another
        # process of the service could write.
        self._unwritten: dict[str, Any] | None = None
        self._instead_of: Any = None

    @property
    def good(self) -> list[str]:
        """Generations that served, newest first."""
        return list(self._record()["good"])

    def failure(self, name: str) -> str | None:
        """Why a generation failed, or nothing."""
        entry = self._record()["failed"].get(name)
        return entry["reason"] if entry else None

    def previous(self, name: str) -> ServiceConfig | None:
        """The newest generation that served and is not this one."""
        return next((config for other in self.good if other != name and (config := self.config(other))), None)

    def begin(self, name: str) -> None:
        """Note that a generation is about to be loaded; :meth:`serves`, :meth:`failed` or :meth:`undone` ends that."""
        record = self._record()
        if name in record["good"]:
            return
        record["attempts"][name] = record["attempts"].get(name, 0) + 1
        if record["attempts"][name] > UNFINISHED_LIMIT:
            reason = f"{UNFINISHED_LIMIT} loads never ended: the host or this process went down each time"
            record["failed"][name] = {"reason": reason, "at_unix": time.time()}
        # Raised in any case: nothing serves yet, and a load that is not counted could take the host down at every boot.
        self._write(record, must=True)

    def undone(self, name: str) -> None:
        """The load was called off by a stop: it says nothing of the generation."""
        record = self._record()
        if record["attempts"].pop(name, None):
            self._write(record)

    def serves(self, config: ServiceConfig) -> None:
        """The generation is ready and answered: it is current from now on."""
        name = config.generation
        try:
            self._keep(self._folder / f"{name}.json", json.dumps(config.to_mapping(), sort_keys=True) + "\n")
            settings = kept_settings(config)
            if settings is not None:
                self._keep(self._folder / f"{name}.toml", settings)
        except OSError as error:
            self._warn_or_raise(error)
        record = self._record()
        record["good"] = [name, *(other for other in record["good"] if other != name)][:KEPT]
        record["failed"].pop(name, None)
        record["attempts"].pop(name, None)
        self._write(record)
        for file in [*self._folder.glob("*.json"), *self._folder.glob("*.toml")]:
            if file.stem not in record["good"]:
                file.unlink()

    def doubt(self, name: str) -> None:
        """What a generation is made of was made anew under the same name: it has to prove itself again."""
        record = self._record()
        if name in record["good"]:
            record["good"].remove(name)
            self._write(record)

    def failed(self, name: str, reason: str) -> None:
        """The generation never served: it is not tried again until :meth:`forgive`."""
        record = self._record()
        record["failed"][name] = {"reason": reason, "at_unix": time.time()}
        record["attempts"].pop(name, None)
        self._write(record)

    def forgive(self, name: str) -> None:
        """Try a failed generation again at the next start."""
        record = self._record()
        failed, attempts = record["failed"].pop(name, None), record["attempts"].pop(name, None)
        if failed or attempts:
            self._write(record)

    def watchdog_settings(self, name: str) -> str | None:
        """The watchdog's settings that a generation served under; None where they are not known."""
        try:
            return (self._folder / f"{name}.toml").read_text(encoding="utf-8")
        except OSError:
            return None

    def _keep(self, path: Path, text: str) -> None:
        """Write what is not there yet."""
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text, 0o644)

    def _write(self, record: dict[str, Any], *, must: bool = False) -> None:
        if read_json(self._file) == record:
            self._unwritten = None
            return
        try:
            write_json(self._file, record)
            self._unwritten = None
        except OSError as error:
            if must:
                raise
            self._unwritten, self._instead_of = record, read_json(self._file)
            self._warn_or_raise(error)

    def _warn_or_raise(self, error: OSError) -> None:
        if self._warn is None:
            raise error
        self._warn(f"the record of generations cannot be written ({error}): it is kept in memory until the next start")

    def _record(self) -> dict[str, Any]:
        written = read_json(self._file)
        if self._unwritten is not None and written == self._instead_of:
            return self._unwritten
        return {"good": [], "failed": {}, "attempts": {}} | (written or {})

    def config(self, name: str) -> ServiceConfig | None:
        """What a generation that served on this host was told; None where it is not known."""
        try:
            return ServiceConfig.read(self._folder / f"{name}.json")
        except ReapError:
            return None
