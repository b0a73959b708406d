"""The download: some child processes, watched from outside, ended when they hang, continued where they were."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ReapError
from . import manifest as mf
from .plan import Want, plan_from_listing
from .store import Partial, disk_error

# The package's parent folder, or the zipapp: both are importable paths.
_HERE = Path(__file__).parents[2]
# What one child costs to start (about half a second of a core) is worth it for so many bytes.
_BYTES_PER_WORKER = 32 << 20
# Attempts for a file whose content is wrong although it came whole: damage on the way heals, at the source it does not.
_CONTENT_ATTEMPTS = 3
_WAIT = re.compile(r"Waiting ([0-9.]+)s before retry")
_LONGEST_WAIT_S = 3600.0
# A child's start is half a second of a core; on a host that is busy with a load it has taken more than a minute.
_START_S = 300.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How the download behaves. Times in seconds of the monotonic clock, rates in bytes a second."""

    python: str = sys.executable
    workers: int = 4
    stall_s: float = 60.0
    min_rate: int = 32 * 1024
    patience_s: float = 1800.0
    backoff_s: float = 1.0
    endpoint: str | None = None
    token: str | None = None


class Stopped(Exception):
    """Another part of the download failed; this one ends quietly."""


class _Child:
    """One worker process."""

    def __init__(self, settings: Settings, lock: int | None) -> None:
        environment = {
            key: value
            for key, value in os.environ.items()
            # A token of the caller's, an offline switch or another cache must not change what is fetched.
            if not key.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTHON"))
        }
        environment |= {
            "PYTHONPATH": str(_HERE),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "30",
            "HF_HUB_ETAG_TIMEOUT": "30",
            "HF_HOME": "/nonexistent",
        }
        if settings.endpoint:
            environment["HF_ENDPOINT"] = settings.endpoint.rstrip("/")
        if settings.token:
            environment["HF_TOKEN"] = settings.token
        try:
            self.process = subprocess.Popen(
                [settings.python, "-m", f"{__package__}.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                # The child keeps the revision's lock until it is gone.
                pass_fds=() if lock is None else (lock,),
            )
        except OSError as error:
            raise ReapError(
                f"the downloader {settings.python} cannot be started ({error.strerror}); "
                "install its virtual environment (role model_fetch, step install)"
            ) from error
        self._selector = selectors.DefaultSelector()
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._selector.register(self.process.stdout, selectors.EVENT_READ)
        self._rest = b""
        self.ready = False

    def ask(self, request: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self, wait_s: float) -> dict[str, Any] | None:
        """The next message, or None after ``wait_s``; a child that died answers for itself."""
        if b"\n" not in self._rest and self._selector.select(wait_s):
            assert self.process.stdout is not None
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                return {"ok": False, "kind": "died", "message": self._last_words()}
            self._rest += data
        if b"\n" not in self._rest:
            return None
        line, _, self._rest = self._rest.partition(b"\n")
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                return message
        return None

    def _last_words(self) -> str:
        status = self.process.wait()
        assert self.process.stderr is not None
        lines = self.process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"the downloader ended with {how}{': ' + lines[-1][:300] if lines else ''}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._selector.close()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


# Kinds of worker.describe that waiting does not heal, with what helps.
_PERMANENT = {
    "gated": "the model is gated; accept its terms on the hub with the account of HF_TOKEN",
    "auth": "set HF_TOKEN to a token that may read this repository",
    "repo": "no such repository for this account; check its name, or set HF_TOKEN to a token that may read it",
    "revision": "it has no such commit; correct the revision",
    "file": "the hub lists this file but does not have it: use another revision, or ask its owner",
    "library": "install the downloader (role model_fetch, step install)",
}


class Hub:
    """Downloads into a ``Partial``. One instance per run; ``close`` ends its children."""

    def __init__(
        self,
        settings: Settings,
        repo: str,
        revision: str,
        lock: int | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.repo = repo
        self.revision = revision
        self.host = settings.endpoint or os.environ.get("HF_ENDPOINT") or "the hub"
        self._lock = lock
        self._note = note
        self._stop = threading.Event()
        self._children: set[_Child] = set()
        self._idle: list[_Child] = []
        self._guard = threading.Lock()
        self._alive = time.monotonic()

    def close(self) -> None:
        """End every child."""
        self._stop.set()
        with self._guard:
            children, self._children = list(self._children), set()
        for child in children:
            child.kill()

    def listing(self) -> dict[str, Want]:
        """The revision's files with their hashes.

        Raises:
            ReapError: the hub refuses, has no such revision, or is not reached within the patience.
        """
        child: list[_Child] = []
        reply = self._insist(child, {"op": "list", "repo": self.repo, "revision": self.revision}, None, "the listing")
        self._keep(child)
        return plan_from_listing(reply["files"])

    def download(self, wants: Sequence[Want], partial: Partial, verified: Callable[[mf.Entry], None]) -> None:
        """Fetch and verify every file of ``wants``, in their order.

        Args:
            verified: called once per file from several threads, after the file has its name.

        Raises:
            ReapError: the first thing that could not be healed.
        """
        todo: queue.SimpleQueue[Want] = queue.SimpleQueue()
        for want in wants:
            todo.put(want)
        count = min(self.settings.workers, len(wants), 1 + sum(want.size for want in wants) // _BYTES_PER_WORKER)
        errors: list[BaseException] = []

        def slot() -> None:
            child: list[_Child] = []
            try:
                while not self._stop.is_set():
                    try:
                        want = todo.get_nowait()
                    except queue.Empty:
                        return
                    verified(self._one(child, want, partial))
            except Stopped:
                pass
            except BaseException as error:  # handed to the caller's thread
                errors.append(error)
                self._stop.set()
            finally:
                self._keep(child)

        if count == 1:
            slot()
            if errors:
                raise errors[0]
            return
        threads = [threading.Thread(target=slot, name=f"download-{i}", daemon=True) for i in range(count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self.close()
            raise
        if errors:
            raise errors[0]

    def _one(self, child: list[_Child], want: Want, partial: Partial) -> mf.Entry:
        part = partial.part(want)
        request = {
            "op": "get",
            "repo": self.repo,
            "revision": self.revision,
            "name": want.name,
            "size": want.size,
            "etag": want.etag,
            "part": str(part),
        }
        for attempt in range(_CONTENT_ATTEMPTS):
            self._insist(child, request, part, want.name)
            try:
                entry, problem = mf.verify(part, want)
                if entry is not None:
                    partial.accept(want, entry)
                    return entry
                part.unlink(missing_ok=True)
            except OSError as error:
                raise disk_error(error, part) from error
            if attempt + 1 < _CONTENT_ATTEMPTS:
                self._note(f"{problem}; fetching this file again")
        raise ReapError(
            f"{self.host} gives wrong content: {problem}, {_CONTENT_ATTEMPTS} times. "
            "The hub, a proxy or this host's memory is damaged; nothing of it is kept."
        )

    def _insist(self, child: list[_Child], request: dict[str, Any], part: Path | None, what: str) -> dict[str, Any]:
        """Repeat one request until it succeeds, is refused for good, or nothing has moved for the patience."""
        failures, whole = 0, f"{self.repo}@{self.revision}"
        while True:
            before = _size(part)
            reply = self._attempt(child, request, part)
            if reply.get("ok"):
                self._alive = time.monotonic()
                return reply
            if _size(part) - before >= 1 << 20:
                failures = 0
                self._alive = time.monotonic()
            failures += 1
            kind, message = str(reply.get("kind")), str(reply.get("message"))
            if kind in _PERMANENT:
                how = f"HTTP {reply['status']}" if reply.get("status") else message
                raise ReapError(f"{self.host} refuses {what} of {whole} ({how}): {_PERMANENT[kind]}")
            if kind == "disk":
                raise disk_error(
                    OSError(reply.get("errno", 0), os.strerror(reply.get("errno", 0)), reply.get("file")),
                    Path(str(part)),
                )
            if kind == "contradiction" and failures >= _CONTENT_ATTEMPTS:
                raise ReapError(f"{self.host} contradicts itself about {whole}: {message}. Nothing of it is kept.")
            asked = min(float(reply.get("retry_after") or 0), _LONGEST_WAIT_S)
            pause = max(
                asked, min(60.0, self.settings.backoff_s * 2.0 ** min(failures - 1, 6)) * random.uniform(0.5, 1.0)
            )
            idle = time.monotonic() - self._alive
            if idle + pause > self.settings.patience_s:
                raise ReapError(
                    f"{self.host} has not sent a byte of {what} of {whole} for {idle:.0f} s ({message}). "
                    "Look at the network and the hub's state, then run it again; it goes on where it was."
                )
            self._note(f"{what}: {message}; trying again in {pause:.0f} s")
            if self._stop.wait(pause):
                raise Stopped

    def _attempt(self, slot: list[_Child], request: dict[str, Any], part: Path | None) -> dict[str, Any]:
        """One request to a child. A child without enough bytes for the stall time is ended."""
        settings = self.settings
        if not slot:
            slot.append(self._new_child())
        child = slot[0]
        child.ask(request)
        mark, marked = _size(part), time.monotonic()
        allowed = settings.stall_s if child.ready else _START_S + settings.stall_s
        while not self._stop.is_set():
            reply = child.answer(0.25)
            now = time.monotonic()
            if reply is not None and reply.get("event") == "ready":
                child.ready = True
                mark, marked, allowed = _size(part), now, settings.stall_s
                continue
            if reply is not None and reply.get("event") == "note":
                note = str(reply.get("message", ""))
                self._note(note)
                if wait := _WAIT.search(note):
                    # The hub asked for this pause (429 with Retry-After); it is no stall.
                    allowed = min(float(wait[1]), _LONGEST_WAIT_S) + settings.stall_s
                    mark, marked = _size(part), now
                continue
            if reply is not None:
                if reply.get("kind") == "died":
                    self._drop(slot)
                return reply
            if now - marked >= allowed:
                moved = _size(part) - mark
                if moved < settings.min_rate * settings.stall_s:
                    self._drop(slot)
                    return {
                        "ok": False,
                        "kind": "stall",
                        "message": f"the connection stalled ({moved} bytes in {now - marked:.0f} s)",
                    }
                mark, marked, allowed = _size(part), now, settings.stall_s
                self._alive = now
        raise Stopped

    def _new_child(self) -> _Child:
        with self._guard:
            if self._idle:
                return self._idle.pop()
        child = _Child(self.settings, self._lock)
        with self._guard:
            self._children.add(child)
        return child

    def _keep(self, slot: list[_Child]) -> None:
        """Keep a child for the next request, unless it ends with this thread, as the kernel's promise to it says."""
        if threading.current_thread() is threading.main_thread() and not self._stop.is_set():
            with self._guard:
                self._idle += slot
            slot.clear()
        self._drop(slot)

    def _drop(self, slot: list[_Child]) -> None:
        while slot:
            child = slot.pop()
            with self._guard:
                mine = child in self._children
                self._children.discard(child)
            if mine:
                child.kill()


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0
