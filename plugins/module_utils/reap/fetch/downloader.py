"""The downloader's virtual environment: built beside, tried, then renamed into place."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import ReapError

STAMP = ".requirements.sha256"
_ATTEMPTS = 3


def state(folder: Path, wanted_sha256: str) -> str:
    """``missing``, ``ready``, or ``stale``: made from other requirements or for a Python that is gone."""
    if not (folder / "pyvenv.cfg").exists():
        return "missing"
    try:
        stamp = (folder / STAMP).read_text(encoding="ascii").strip()
    except OSError:
        return "stale"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    whole = (folder / "lib" / version).is_dir() and os.access(folder / "bin" / "python", os.X_OK)
    return "ready" if whole and stamp == wanted_sha256 else "stale"


def install(folder: Path, requirements: Path, pip_args: Sequence[str]) -> bool:
    """Make the virtual environment from pinned and hashed requirements, with this Python.

    Returns:
        Whether anything was done.

    Raises:
        ReapError: Python has no venv, or pip failed; the environment that was there stays.
    """
    try:
        wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    except OSError as error:
        raise ReapError(f"{requirements} cannot be read ({error.strerror})") from error
    if state(folder, wanted) == "ready":
        return False
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    _run(
        [sys.executable, "-m", "venv", str(fresh)],
        "no virtual environment could be made; install the distribution's python3-venv",
    )
    # Every package is pinned and hashed, so pip resolves nothing and takes them from anywhere.
    pip = [str(fresh / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(
        [*pip, "--no-cache-dir", "--no-deps", "--require-hashes", *pip_args, "--requirement", str(requirements)],
        "the downloader's packages could not be installed; look at the network, or name a mirror "
        "(model_fetch_pip_environment, model_fetch_pip_args)",
        _ATTEMPTS,
    )
    _run([str(fresh / "bin" / "python"), "-c", "import huggingface_hub"], "the installed downloader does not start")
    (fresh / STAMP).write_text(wanted + "\n", encoding="ascii")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return True


def _run(command: list[str], remedy: str, attempts: int = 1) -> None:
    for attempt in range(attempts):
        try:
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        except OSError as error:
            raise ReapError(f"{command[0]} cannot be started ({error.strerror}): {remedy}") from error
        if done.returncode == 0:
            return
        if attempt + 1 < attempts:
            time.sleep(5 * (attempt + 1))
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
    raise ReapError(f"{remedy}. It said: {said[:300]}")
