"""Single files out of published wheels, without downloading the wheels.

The vLLM wheels hold hundreds of megabytes of CUDA code; the patches touch a few Python files. ``pip`` is asked where
the wheel lies (so the machine's own index settings count), then the archive's directory and the wanted members are
read with HTTP range requests, about a megabyte per release. Where a server cannot do ranges, pip downloads the wheel.

Everything is kept under ``.cache/packages/<project>-<version>/``. Each member is checked against the sha256 that the
wheel's own RECORD gives for it.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "packages"

# x86_64 only: the Python files are the same on aarch64. The tags are those that the wheels used here carry.
_TAGS = ("2_35", "2_31", "2_28", "2_27", "2_24", "2_17")
PLATFORMS = (*(f"manylinux_{tag}_x86_64" for tag in _TAGS), "manylinux2014_x86_64", "any")


class PublishedError(Exception):
    """The package index cannot be reached or does not have the release."""


def _pip(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False, timeout=900
    )
    if done.returncode != 0:
        raise PublishedError(f"pip {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout + done.stderr


def _selection() -> list[str]:
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    return ["--only-binary", ":all:", *platforms, "--implementation", "cp", "--python-version", "3.12"]


def wheel_urls(project: str) -> dict[str, str]:
    """Where pip finds the wheels of a project.

    Returns:
        ``{"0.22.0": "https://.../vllm-0.22.0-cp38-abi3-manylinux_2_28_x86_64.whl", ...}``; of several builds of a
        version the one pip lists first.

    Raises:
        PublishedError: pip reached no index or knows no such project.
    """
    urls: dict[str, str] = {}
    # Only the debug output of pip names the files; the command itself downloads nothing.
    listing = _pip("-vv", "index", "versions", *_selection(), project)
    for match in re.finditer(r"Found link (\S+\.whl)\S* \(.*\), version: (\S+)", listing):
        urls.setdefault(match[2], match[1])
    if not urls:
        raise PublishedError(f"pip lists no wheel of {project}")
    return urls


class _RangeFile(io.RawIOBase):
    """A remote file as a seekable one; every read is a range request, so it is meant to sit under a buffer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.position = 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
            self.size = int(answer.headers["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        last = min(self.position + len(buffer), self.size) - 1
        if last < self.position:
            return 0
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.position}-{last}"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            if answer.status != 206:
                raise PublishedError("the server ignores range requests")
            data = answer.read()
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _open_wheel(project: str, version: str, url: str, scratch: Path) -> zipfile.ZipFile:
    if url.startswith("file:"):
        return zipfile.ZipFile(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    try:
        return zipfile.ZipFile(io.BufferedReader(_RangeFile(url), buffer_size=256 * 1024))
    except (PublishedError, OSError, zipfile.BadZipFile, TypeError):
        _pip("download", "--quiet", "--no-deps", *_selection(), "--dest", str(scratch), f"{project}=={version}")
        return zipfile.ZipFile(next(scratch.glob("*.whl")))


def _record(archive: zipfile.ZipFile) -> tuple[str, dict[str, str]]:
    info = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name))
    rows = csv.reader(io.StringIO(archive.read(info).decode()))
    return info.rpartition("/")[0], {row[0]: row[1] for row in rows if len(row) > 1}


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.replace(path)


def fetch(project: str, version: str, members: Iterable[str], urls: dict[str, str] | None = None) -> Path:
    """A folder that looks like site-packages and holds the wanted files of one release.

    Args:
        project: distribution name, such as ``vllm``.
        version: exact version.
        members: paths inside the wheel. One that the release does not have is left out.
        urls: what `wheel_urls` returned, where it was asked already.

    Raises:
        PublishedError: the release is not in the index, or a member differs from what its wheel records.
    """
    folder = CACHE / f"{project}-{version}"
    asked = sorted(set(members))
    absent = folder / ".absent"
    known_absent = set(absent.read_text().split("\n")) if absent.exists() else set()
    missing = [name for name in asked if not (folder / name).exists() and name not in known_absent]
    if not missing and any(folder.glob("*.dist-info/METADATA")):
        return folder
    urls = wheel_urls(project) if urls is None else urls
    if version not in urls:
        raise PublishedError(f"pip lists no wheel of {project} {version}; it has {', '.join(sorted(urls))}")
    with contextlib.ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="published-"))
        stack.callback(shutil.rmtree, scratch, True)
        archive = stack.enter_context(_open_wheel(project, version, urls[version], scratch))
        info, sums = _record(archive)
        present = set(archive.namelist())
        for name in [*missing, f"{info}/METADATA"]:
            if name not in present:
                known_absent.add(name)
                continue
            data = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            if sums.get(name) != f"sha256={digest}":
                raise PublishedError(f"{project} {version}: {name} is not what its wheel records")
            _write(folder / name, data)
    _write(absent, "\n".join(sorted(known_absent)).encode())
    return folder
