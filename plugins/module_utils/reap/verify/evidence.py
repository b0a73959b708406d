"""The folder of evidence of one run, and what identifies the subject it is about."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..images.labels import LABEL_BASE, LABEL_BASE_ID, LABEL_MATCHED, LABEL_PATCHES, LABEL_ROUTER, LABEL_VALIDATED
from .client import CouldNotRun
from .settings import Settings
from .verdict import PASSING

SCHEMA = "reap-verification/1"
REPORT = "report.json"
# Settings that say how to look, not at what.
_NOT_THE_SUBJECT = ("evidence_dir", "generations_file", "sample_memory", "memory_hertz")


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Write beside, then rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        # Evidence is kept whatever is in it; in JSON this is the escape of what is no character.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        beside.chmod(mode)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Make the evidence folder and prove that a file can be written there, before anything long is begun.

    Raises:
        CouldNotRun: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise CouldNotRun(
            f"evidence folder {folder} is not writable ({error.strerror}): run as root, or give another with --out"
        ) from error


def new_folder(parent: Path, stamp: str, name: str) -> Path:
    """The folder of this run, ``<UTC stamp>-<profile>``; never one that exists."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "endpoint"
    for number in range(1, 100):
        folder = parent / (f"{stamp}-{clean}" if number == 1 else f"{stamp}-{clean}.{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise CouldNotRun(f"{folder} cannot be made: {error.strerror}") from error
        return folder
    raise CouldNotRun(f"{parent} holds 99 runs of {stamp}")


def keep_report(parent: Path, name: str, report: Mapping[str, Any]) -> Path:
    """Write a report into a folder of its own; returns its path.

    Raises:
        CouldNotRun: it cannot be written, for example because the disk is full. Nothing is left behind.
    """
    folder = new_folder(parent, str(report["stamp"]), name)
    path = folder / REPORT
    try:
        write_atomic(path, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise CouldNotRun(
            f"{path} cannot be written ({error.strerror}); the verdict was {report['verdict']}, and without evidence "
            "it does not count: make room and verify again"
        ) from error
    return path


def service_state(settings: Settings) -> dict[str, Any]:
    """What the service says of itself; empty where there is none."""
    if not settings.service_file:
        return {}
    try:
        data = json.loads(Path(settings.service_file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def subject(settings: Settings, service: Mapping[str, Any]) -> str:
    """A fingerprint of what is verified: these settings, this start of this generation, this version of the suite.

    A restart, another generation, a reboot or a changed setting is another subject.
    """
    asked = {key: value for key, value in vars(settings).items() if key not in _NOT_THE_SUBJECT}
    started = {key: service.get(key) for key in ("boot_id", "container_id", "started_unix", "generation")}
    text = json.dumps([__version__, SCHEMA, asked, started], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def another_generation(settings: Settings, generation: str | None) -> str | None:
    """The newest other generation that served on this host: the one to go back to; None where there is none."""
    if not settings.generations_file or not generation:
        return None
    try:
        good = json.loads(Path(settings.generations_file).read_text(encoding="utf-8"))["good"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((str(name) for name in good if name != generation), None) if isinstance(good, list) else None


def generation_passed(parent: Path, generation: str | None) -> bool:
    """Whether any run about this generation of the service passed."""
    for path in parent.glob(f"*/{REPORT}"):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            same = report["identity"]["service"]["generation"] == generation
            if same and report["verdict"] in PASSING:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def verified_before(parent: Path, fingerprint: str) -> dict[str, Any] | None:
    """The newest report of this subject that passed, with its path; None when there is none."""
    for path in sorted(parent.glob(f"*/{REPORT}"), reverse=True):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict) and report.get("subject") == fingerprint and report.get("verdict") in PASSING:
            return {**report, "path": str(path)}
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _first_line(path: str) -> str | None:
    return next((line.strip() for line in _lines(path)), None)


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def running_image(service: Mapping[str, Any]) -> dict[str, Any] | None:
    """The image that the serving container really runs, and the patch set its labels name; None where nothing says.

    The configured name is what was asked for. A tag can be moved, the id of a running container's image cannot.
    """
    container = service.get("container_id")
    image = _output("docker", "container", "inspect", "--format", "{{.Image}}", str(container)) if container else None
    if not image:
        return None
    try:
        labels = json.loads(_output("docker", "image", "inspect", "--format", "{{json .Config.Labels}}", image) or "{}")
    except ValueError:
        labels = None
    labels = labels if isinstance(labels, dict) else {}
    keys = {
        "patch_set": LABEL_PATCHES,
        "router": LABEL_ROUTER,
        "base": LABEL_BASE,
        "base_id": LABEL_BASE_ID,
        "base_matched": LABEL_MATCHED,
    }
    validated = {"true": True, "false": False}.get(labels.get(LABEL_VALIDATED, ""))
    return {"image_id": image, **{name: labels.get(label) for name, label in keys.items()}, "base_validated": validated}


def host_identity() -> dict[str, Any]:
    """What this machine is; None for what it does not say."""
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    name, _, driver = (gpu or "").partition(", ")
    release = {}
    for line in _lines("/etc/os-release"):
        key, found, value = line.partition("=")
        if found:
            release[key] = value.strip('"')
    total = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")), None)
    return {
        "hostname": platform.node(),
        "architecture": platform.machine(),
        "product": _first_line("/sys/class/dmi/id/product_name"),
        "kernel": platform.release(),
        "os": release.get("PRETTY_NAME"),
        "gpu": name.splitlines()[0] if name else None,
        "driver": driver.splitlines()[0] if driver else None,
        "mem_total_kb": total,
        "cpus": os.cpu_count(),
    }


def utc_stamp(unix: float) -> str:
    """``20260527T190139Z``."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(unix))
