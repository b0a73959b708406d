"""What is done after the end of the service's main process, by another process: systemd's ExecStopPost=.

A main process that was killed, crashed, or stopped because it took too long has recorded nothing. Without that its
failures would not count, and systemd would start it for ever.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .cleanup import clean_up
from .config import Timings
from .docker import Docker
from .failure import Restarts
from .state import boot_id, read_json, write_json

_SAID_ITSELF = ("success", "exit-code")
"""Results of which the main process has recorded what there is to record."""


@dataclass(frozen=True)
class Ending:
    """How systemd saw the main process end: $SERVICE_RESULT, $EXIT_CODE and $EXIT_STATUS of systemd.exec(5)."""

    result: str = ""
    """success, exit-code, signal, core-dump, timeout, watchdog, oom-kill ...; empty where systemd does not say."""
    code: str = ""
    status: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ending:
        """Read what systemd gives to ExecStopPost=."""
        names = ("SERVICE_RESULT", "EXIT_CODE", "EXIT_STATUS")
        return cls(*(environment.get(name, "") for name in names))

    def text(self) -> str:
        """One phrase."""
        how = {
            "timeout": "was ended by systemd, which saw no sign of life in time",
            "watchdog": "was ended by systemd, which saw no sign of life in time",
            "oom-kill": "was killed by the kernel, which was out of memory",
        }.get(self.result)
        if how is None:
            how = f"was ended by signal {self.status}" if self.code in ("killed", "dumped") else "was killed"
        return f"the service's main process {how}"


ENGINE_UNIT = "docker.service"


def note_of_return(run_dir: Path) -> Path:
    """The file that makes reap-return.service start the service when the container engine starts."""
    return run_dir / "back-with-engine"


def engine_stops() -> bool:
    """Whether systemd is about to stop or restart the container engine; the service, ordered after it, ends first."""
    command = ["systemctl", "show", "--property=Job", "--value", ENGINE_UNIT]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return False
    return shown not in ("", "0")


def settle(docker: Docker, run_dir: Path, timings: Timings, ending: Ending) -> None:
    """Remove what a model container left; say and count an end that the main process could not record itself."""
    before = read_json(run_dir / "service.json")
    clean_up(docker, run_dir)
    if engine_stops():
        note_of_return(run_dir).touch()
    if not before or before.get("boot_id") != boot_id():
        return
    phase = before.get("phase")
    told = ending.result in _SAID_ITSELF if ending.result else phase == "absent"
    if told and phase == "absent":
        return
    doing = before.get("detail") if phase == "absent" else phase
    text = ending.text() + (f" while {doing}" if doing and doing != "stopped" else "")
    count = Restarts(run_dir / "restarts.json").add(text, timings.restart_window_s)
    print(f"reap serve: failed ({count} of {timings.restart_limit}): {text}", flush=True)
    after = {"phase": "absent", "detail": text, "progress": None, "container_id": None, "container_pid": None}
    write_json(run_dir / "service.json", before | after)
