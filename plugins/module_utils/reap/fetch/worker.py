"""The child process that talks to the hub, with the hub's own library. One JSON request per line in, one answer out.

It runs in the downloader's virtual environment; the parent needs the standard library only. A child can be killed when
its connection hangs, a thread cannot. It downloads with ``huggingface_hub.file_download.http_get`` into a file that
this program owns, because ``snapshot_download`` throws a begun file away when its process dies: each process writes a
temporary file of its own (github.com/huggingface/huggingface_hub, pull request 4228).
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Bytes in memory until they are written: what a kill can lose of each file.
CHUNK = 1 << 18


def _die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process with its parent: two must never write one file."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)


def _from_the_hub(response: Any) -> bool:
    """Whether the hub itself answered, and not a host that it sent the request to."""
    try:
        asked = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        answered = urlsplit(str(response.request.url))
    except (AttributeError, RuntimeError, ValueError):
        return True
    return (answered.hostname, answered.port) == (asked.hostname, asked.port)


# The query of an address.
_SIGNED = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]*")


class _Tell(logging.Handler):
    """Hands the library's warnings to the parent: a wait that the hub asked for is no stall."""

    def emit(self, record: logging.LogRecord) -> None:
        _answer({"event": "note", "message": _hide(record.getMessage().splitlines()[0])[:300]})


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _hide(text: str) -> str:
    """Without the token, which a hub's message can quote, and without what signs a storage host's address.

    Before it is cut: half a token would not be known again.
    """
    token = os.environ.get("HF_TOKEN")
    return _SIGNED.sub(r"\1?***", text.replace(token, "***") if token else text)


def _first_line(error: BaseException) -> str:
    text = _hide(" ".join(line.strip() for line in str(error).splitlines() if line.strip()))
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as ``{"ok": false, "kind", "status", "retry_after", "message"}``.

    Kinds: gated, auth, repo, revision, file, busy, server, network, disk, other. The first five never heal by waiting.
    """
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    headers = getattr(response, "headers", {}) or {}
    name = type(error).__name__
    names = {cls.__name__ for cls in type(error).__mro__}
    retry_after: float | None = None
    try:
        retry_after = float(headers.get("Retry-After", ""))
    except (TypeError, ValueError):
        retry_after = None
    if isinstance(error, OSError) and error.errno and response is None:
        kind = (
            "disk"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
            else "network"
        )
        return {"ok": False, "kind": kind, "errno": error.errno, "file": error.filename, "message": _first_line(error)}
    if "GatedRepoError" in names:
        kind = "gated"
    elif "RevisionNotFoundError" in names:
        kind = "revision"
    elif "EntryNotFoundError" in names:
        kind = "file"
    elif status in (401, 403) and not _from_the_hub(response):
        # A storage host: the address that the hub signed has expired, and the next try gets a new one.
        kind = "network"
    elif status in (401, 403):
        kind = "auth"
    elif "RepositoryNotFoundError" in names:
        kind = "repo"
    elif status == 429:
        kind = "busy"
    elif isinstance(status, int) and status >= 500:
        kind = "server"
    elif isinstance(status, int):
        kind = "file" if status in (404, 410) else "other"
    elif (
        name.endswith(("Error", "Timeout", "Exception"))
        and type(error).__module__.split(".")[0]
        in (
            "httpx2",
            "httpcore2",
            "httpx",
        )
    ) or isinstance(error, (OSError, TimeoutError)):
        kind = "network"
    else:
        kind = "other"
    return {"ok": False, "kind": kind, "status": status, "retry_after": retry_after, "message": _first_line(error)}


class Hub:
    """The hub as this program needs it: a listing, and one file's bytes from where they ended."""

    def __init__(self) -> None:
        import huggingface_hub
        from huggingface_hub import constants, file_download, hf_api

        constants.DOWNLOAD_CHUNK_SIZE = CHUNK
        self._hub = huggingface_hub
        self._file_download = file_download
        self._hf_api = hf_api
        # False: never a token that happens to lie in somebody's home folder.
        self._token: str | bool = os.environ.get("HF_TOKEN") or False

    def list(self, repo: str, revision: str) -> dict[str, Any]:
        """The files of a revision, with the hashes the hub publishes."""
        api = self._hub.HfApi(token=self._token)
        files = []
        for item in api.list_repo_tree(repo, recursive=True, revision=revision):
            if not isinstance(item, self._hf_api.RepoFile):
                continue
            if item.lfs is not None:
                files.append({"name": item.path, "size": item.lfs.size, "sha256": item.lfs.sha256})
            else:
                files.append({"name": item.path, "size": item.size, "git_sha1": item.blob_id})
        return {"ok": True, "files": files}

    def get(self, repo: str, revision: str, name: str, size: int, etag: str, part: str) -> dict[str, Any]:
        """Append the rest of a file to ``part``. The caller verifies the content."""
        url = self._hub.hf_hub_url(repo, name, revision=revision)
        about = self._hub.get_hf_file_metadata(url, token=self._token, timeout=30)
        if about.commit_hash not in (None, revision):
            return _contradiction(f"{name} is answered for commit {about.commit_hash}, wanted {revision}")
        if about.etag not in (None, etag):
            return _contradiction(f"{name} has ETag {about.etag}, while the listing says {etag}")
        if about.size not in (None, size):
            return _contradiction(f"{name} has {about.size} bytes, while the listing says {size}")
        headers = self._hub.utils.build_hf_headers(token=self._token)
        headers["Accept-Encoding"] = "identity"
        if _origin(about.location) != _origin(url):
            # A storage host gets no token of the hub's.
            headers.pop("authorization", None)
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b", buffering=0) as out:
            begun = out.seek(0, os.SEEK_END)
            if begun > size:
                begun = out.seek(0)
                out.truncate()
            self._file_download.http_get(
                about.location, out, resume_size=begun, headers=headers, expected_size=size, displayed_filename=name
            )
            return {"ok": True, "size": out.seek(0, os.SEEK_END)}


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _contradiction(message: str) -> dict[str, Any]:
    return {"ok": False, "kind": "contradiction", "status": None, "retry_after": None, "message": message}


def main() -> int:
    """Serve requests until standard input ends. ``argv[1]`` is the parent's process id."""
    _die_with_parent(int(sys.argv[1]))
    logging.getLogger("huggingface_hub").addHandler(_Tell())
    try:
        hub = Hub()
    except ImportError as error:
        _answer({"ok": False, "kind": "library", "message": f"{sys.executable} has no huggingface_hub ({error})"})
        return 2
    # From here on a silence is the network's.
    _answer({"event": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("op")
        try:
            _answer(hub.list(**request) if operation == "list" else hub.get(**request))
        except Exception as error:  # whatever it is, the parent decides
            _answer(describe(error))
            if operation == "get" and Path(request["part"]).exists() and isinstance(error, ValueError):
                Path(request["part"]).unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
