"""The watchdog's settings: one TOML file, checked as a whole before anything is read or guarded."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ReapError
from .policy import KB_PER_GIB, Limits

# A Spark was last heard of at 2.4 GiB available before it froze; half the floor on a machine with a small one.
HARD_FLOOR_KB = 3 * KB_PER_GIB

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the watchdog reads and writes; the defaults are those of a managed host."""

    service_state: Path = Path("/run/reap/service.json")
    state: Path = Path("/run/reap/watchdog.json")
    metrics: Path = Path("/run/reap/watchdog.prom")
    events: Path = Path("/var/lib/reap/watchdog/events.jsonl")
    evidence: Path = Path("/var/lib/reap/evidence/watchdog")
    evidence_fallback: Path = Path("/run/reap/evidence")
    meminfo: Path = Path("/proc/meminfo")
    pressure: Path = Path("/proc/pressure/memory")
    cgroup_root: Path = Path("/sys/fs/cgroup")
    docker_data: Path = Path("/var/lib/docker")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything ``reap watch`` is told."""

    limits: Limits
    paths: Paths
    unit: str = "reap.service"
    realtime: bool = True
    series_minutes: int = 5
    keep_bundles: int = 20
    events_max_bytes: int = 10 * 1024 * 1024
    enforce_fit: bool = True
    # What memory_fit is asked when the settings are checked (keys of reap.memory.FitRequest); None: it is not asked.
    fit: dict[str, Any] | None = None


def load(path: Path) -> Settings:
    """Read the settings file.

    Raises:
        ReapError: naming the file, the key, what was found and what was wanted.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReapError(f"cannot read the watchdog's settings {path}: {error}") from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ReapError(f"{path} is no TOML: {error}") from error
    return from_dict(data, str(path))


def from_dict(data: dict[str, Any], name: str) -> Settings:
    """Check the settings of one file; ``name`` is its name in messages. Raises ReapError."""
    data = dict(data)
    raw_paths = data.pop("paths", {})
    if not isinstance(raw_paths, dict):
        raise ReapError(f"{name}: [paths] is {raw_paths!r}, wanted a table of paths")
    fit = data.pop("fit", None)
    if fit is not None and not isinstance(fit, dict):
        raise ReapError(f"{name}: [fit] is {fit!r}, wanted a table")
    limit_values: dict[str, Any] = {}
    other_values: dict[str, Any] = {}
    limit_kinds = {f.name: _kind(str(f.type)) for f in fields(Limits)}
    other_kinds = {f.name: _kind(str(f.type)) for f in fields(Settings) if f.name not in ("limits", "paths", "fit")}
    for key, value in data.items():
        if key in limit_kinds:
            limit_values[key] = _checked(name, key, value, limit_kinds[key])
        elif key in other_kinds:
            other_values[key] = _checked(name, key, value, other_kinds[key])
        else:
            known = ", ".join(sorted([*limit_kinds, *other_kinds, "paths", "fit"]))
            raise ReapError(f"{name}: unknown setting {key!r} (there are: {known})")
    if "floor_kb" not in limit_values:
        raise ReapError(f"{name}: floor_kb is missing; it is MemAvailable in kB, for instance 8388608 for 8 GiB")
    floor_kb = limit_values["floor_kb"]
    hard_kb = limit_values.setdefault("hard_floor_kb", min(HARD_FLOOR_KB, floor_kb // 2))
    # A start dips and recovers, so its floor is lower; but never so low that a kill there would come too late.
    least_kb = Limits(**{**limit_values, "loading_floor_kb": hard_kb}).kill_line_kb
    limit_values.setdefault("loading_floor_kb", min(floor_kb, max(least_kb, floor_kb // 4 * 3)))
    paths = {}
    known_paths = {f.name for f in fields(Paths)}
    for key, value in raw_paths.items():
        if key not in known_paths:
            raise ReapError(f"{name}: unknown path {key!r} (there are: {', '.join(sorted(known_paths))})")
        if not isinstance(value, str) or not value.startswith("/"):
            raise ReapError(f"{name}: paths.{key} is {value!r}, wanted an absolute path")
        paths[key] = Path(value)
    settings = Settings(limits=Limits(**limit_values), paths=Paths(**paths), fit=fit, **other_values)
    _check_order(settings, name)
    return settings


def _kind(annotation: str) -> type:
    for kind in (bool, int, float, str):
        if annotation.startswith(kind.__name__):
            return kind
    raise AssertionError(f"no check for a setting of type {annotation}")


def _checked(name: str, key: str, value: object, kind: type) -> object:
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not good:
        unit = " of kB" if key.endswith("_kb") else " of seconds" if key.endswith("_s") else ""
        example = ' ("8G" is written 8388608)' if key.endswith("_kb") else ""
        raise ReapError(f"{name}: {key} is {value!r}, wanted {_KINDS[kind]}{unit}{example}")
    return value


def _check_order(settings: Settings, name: str) -> None:
    limits = settings.limits
    for f in fields(Limits):
        value = getattr(limits, f.name)
        if value is not None and value <= 0:
            raise ReapError(f"{name}: {f.name} is {value!r}, wanted more than 0")
    if not limits.hard_floor_kb <= limits.loading_floor_kb <= limits.floor_kb:
        raise ReapError(
            f"{name}: wanted hard_floor_kb <= loading_floor_kb <= floor_kb, found"
            f" {limits.hard_floor_kb}, {limits.loading_floor_kb}, {limits.floor_kb} (kB)"
        )
    if not limits.fast_interval_s <= limits.calm_interval_s <= limits.idle_interval_s <= 1.0:
        raise ReapError(
            f"{name}: wanted fast_interval_s <= calm_interval_s <= idle_interval_s <= 1, found"
            f" {limits.fast_interval_s}, {limits.calm_interval_s}, {limits.idle_interval_s} (s)"
        )
    if not 1 <= settings.series_minutes <= 60:
        raise ReapError(f"{name}: series_minutes is {settings.series_minutes}, wanted 1 to 60")
    if settings.keep_bundles < 1 or settings.events_max_bytes < 65536:
        raise ReapError(f"{name}: wanted keep_bundles of at least 1 and events_max_bytes of at least 65536")
