"""A real hub on loopback, a small checkpoint on it, and the real downloader in its pinned environment."""

from __future__ import annotations

import fcntl
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reap.fetch import downloader, engine, hub, progress
from sim.hub import sample
from sim.hub.server import Hub

ROOT = Path(__file__).parents[3]
REPO = "org/model"
# Another than in the scenario of the role, which looks for its own on command lines of the same machine.
TOKEN = "hf_unit_sesame_0123456789"


@pytest.fixture(scope="session")
def python() -> str:
    """Python of the downloader's virtual environment, made as a host makes it and kept between runs."""
    folder = ROOT / ".cache" / "downloader" / f"{sys.version_info.major}.{sys.version_info.minor}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        downloader.install(folder, ROOT / "roles/model_fetch/files/requirements.txt", [])
    return str(folder / "bin" / "python")


@dataclass
class Site:
    """One hub with ``org/model`` on it, and a folder that plays a host's disk."""

    hub: Hub
    source: Path
    models: Path
    python: str

    @property
    def revision(self) -> str:
        found = self.hub.repositories.revision(REPO, "main")
        assert found is not None
        return found.commit

    @property
    def dest(self) -> Path:
        return self.models / REPO / self.revision

    def faults(self, *rules: dict[str, Any], **more: Any) -> None:
        self.hub.faults.replace({"rules": list(rules), **more})

    def request(self, **changes: Any) -> engine.Request:
        settings = {
            "python": self.python,
            "endpoint": self.hub.url,
            "workers": 2,
            "stall_s": 60.0,
            "patience_s": 120.0,
            "backoff_s": 0.1,
            **changes.pop("settings", {}),
        }
        wanted: dict[str, Any] = {
            "repo": REPO,
            "revision": self.revision,
            "dest": self.dest,
            "models": self.models,
            "settings": hub.Settings(**settings),
        }
        return engine.Request(**{**wanted, **changes})

    def fetch(self, **changes: Any) -> engine.Outcome:
        return engine.fetch(self.request(**changes), progress.Progress(None, "model_fetch"))

    def command(self, *more: str) -> list[str]:
        """The command line that the role runs, with quick settings."""
        return [
            sys.executable, "-m", "reap", "fetch",
            f"--repo={REPO}", f"--revision={self.revision}", f"--dest={self.dest}",
            f"--models={self.models}", f"--downloader={self.python}", f"--endpoint={self.hub.url}",
            "--stall-timeout=60", "--patience=120", *more,
        ]  # fmt: skip

    def is_whole(self, dest: Path | None = None) -> bool:
        """Whether the folder holds the source's files, bit for bit, and nothing else but the manifest."""
        dest = dest or self.dest
        wanted = contents(self.source)
        found = contents(dest)
        found.pop("reap-manifest.json", None)
        return found == wanted

    def got(self) -> list[dict[str, Any]]:
        """The hub's GET requests for files, in the order in which they ended."""
        lines = [json.loads(line) for line in self.hub.log.lines(60).splitlines()]
        return [line for line in lines if line["method"] == "GET" and "/resolve/" in line["path"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Hub]]:
    """Start hubs over folders; all end with the test."""
    running: list[tuple[Hub, threading.Thread]] = []

    def start(root: Path) -> Hub:
        server = Hub(root)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def site(tmp_path: Path, python: str, serve: Callable[[Path], Hub]) -> Site:
    source = sample.write(tmp_path / "hub" / "org" / "model")
    return Site(serve(tmp_path / "hub"), source, tmp_path / "models", python)
