"""What is kept of a kill: collected after it, by the writing process, never by the one that guards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .config import Settings
from .state import write_atomic

SCHEMA = "reap-watchdog-evidence/1"
_LOG_LINES = 200
_KERNEL_LINES = 100
_PROCESSES = 15
# How `reap serve` begins each line of its own.
_SERVICE_SAYS = "reap serve: "
_KERNEL_WORDS = ("NVRM", "Out of memory", "oom-kill", "oom_reaper", "page allocation failure")


def biggest_processes(proc: Path = Path("/proc"), most: int = _PROCESSES) -> list[dict[str, Any]]:
    """The processes with the most resident memory: [{pid, command, rss_kb}], largest first."""
    page_kb = os.sysconf("SC_PAGE_SIZE") // 1024
    found: list[tuple[int, int, str]] = []
    for entry in os.scandir(proc):
        if not entry.name.isdigit():
            continue
        try:
            rss_kb = int((proc / entry.name / "statm").read_bytes().split()[1]) * page_kb
            if rss_kb:
                command = (proc / entry.name / "comm").read_text(encoding="utf-8", errors="replace").strip()
                found.append((rss_kb, int(entry.name), command))
        except (OSError, ValueError, IndexError):
            continue
    found.sort(reverse=True)
    return [{"pid": pid, "command": command, "rss_kb": rss_kb} for rss_kb, pid, command in found[:most]]


def container_state(docker_data: Path, container_id: str | None) -> dict[str, Any] | None:
    """The engine's own record of the container's state, read from its disk without asking it; None where it has none.

    The service runs its containers with --rm: after a kill the record is soon gone, so it is read before one too.
    """
    if not container_id:
        return None
    try:
        text = (docker_data / "containers" / container_id / "config.v2.json").read_text(encoding="utf-8")
        state = json.loads(text)["State"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if isinstance(state, dict) else None


def container_lines(unit: str) -> list[str]:
    """The container's last words. They are in the journal of its unit, among what the service says of itself.

    The engine's own copy of them goes with the container, and its format is the engine's alone.
    """
    lines = journal_lines(f"_SYSTEMD_UNIT={unit}", 3 * _LOG_LINES, form="cat")
    return [line for line in lines if not line.startswith(_SERVICE_SAYS)][-_LOG_LINES:]


def journal_lines(
    selection: str, most: int = _LOG_LINES, timeout_s: float = 5.0, form: str = "short-precise"
) -> list[str]:
    """The last journal lines of a selection (--unit=NAME, --dmesg, FIELD=VALUE); where there is no answer, why."""
    program = shutil.which("journalctl")
    if program is None:
        return ["journalctl is not installed"]
    command = [program, selection, f"--lines={most}", f"--output={form}", "--no-pager", "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"the journal did not answer: {error}"]
    return done.stdout.decode("utf-8", "replace").splitlines()[-most:]


def kernel_lines(path: Path = Path("/dev/kmsg")) -> list[str]:
    """The kernel's last lines about the GPU driver and about memory ("NVRM", "Out of memory", ...)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return _about_memory(journal_lines("--dmesg", 10 * _LOG_LINES))
    lines: list[str] = []
    try:
        while True:
            try:
                record = os.read(fd, 8192)
            except BrokenPipeError:
                continue  # the kernel overwrote a record while it was read; the next one follows
            except OSError:
                break
            if not record:
                break
            lines += record.decode("utf-8", "replace").splitlines()
    finally:
        os.close(fd)
    return _about_memory(lines)


def _about_memory(lines: list[str]) -> list[str]:
    return [line for line in lines if any(word in line for word in _KERNEL_WORDS)][-_KERNEL_LINES:]


def collect(
    settings: Settings,
    event: dict[str, Any],
    meminfo: str,
    before: list[dict[str, Any]],
    state_before: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything about a kill but the series, which is added a little later so that it shows memory coming back.

    ``before`` and ``state_before``: the biggest processes and the container's state as last seen before the kill.
    """
    state = container_state(settings.paths.docker_data, event.get("container_id"))
    limits = settings.limits
    return {
        "schema": SCHEMA,
        "event": event,
        "lines_kb": {
            "floor": limits.floor_kb,
            "loading_floor": limits.loading_floor_kb,
            "last_line": limits.last_line_kb,
            "hard_floor": limits.hard_floor_kb,
        },
        "meminfo": meminfo.splitlines(),
        "processes_before": before,
        "processes_after": biggest_processes(),
        "container_state_before": state_before,
        "container_state": state,
        "container_log": container_lines(settings.unit),
        "journal": journal_lines(f"--unit={settings.unit}"),
        "kernel": kernel_lines(),
    }


def save(settings: Settings, name: str, bundle: dict[str, Any]) -> Path:
    """Write ``<evidence>/<name>/bundle.json``; on a full disk below the fallback folder. Raises OSError."""
    text = json.dumps(bundle, indent=1) + "\n"
    try:
        return _save_below(settings.paths.evidence, name, text, settings.keep_bundles)
    except OSError:
        # The fallback is memory: only the newest stays.
        return _save_below(settings.paths.evidence_fallback, name, text, 1)


def _save_below(folder: Path, name: str, text: str, keep: int) -> Path:
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    try:
        write_atomic(target / "bundle.json", text)
    except OSError:
        with contextlib.suppress(OSError):
            target.rmdir()
        raise
    others = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    for old in others[:-keep]:
        shutil.rmtree(folder / old, ignore_errors=True)
    return target / "bundle.json"
