"""Killed twenty times, client, hub and host in turn: the result is whole and nothing was there to serve before."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reap.fetch.store import partial_of
from sim.hub import sample
from sim.hub.repository import Repositories
from sim.hub.requestlog import sent_twice

from .conftest import REPO, contents
from .test_download import environment

ROOT = Path(__file__).parents[3]
FILES = 40
FILE_BYTES = 4 << 20
RATE = 12_000_000  # bytes a second of the hub, so that there is time to be killed in
KILLS = 20


class HubProcess:
    """The hub as a process of its own, at one address, so that it can be killed and come back."""

    def __init__(self, root: Path, log: Path, faults: Path) -> None:
        self.command = [sys.executable, "-m", "sim.hub", f"--root={root}", f"--log={log}", f"--faults={faults}"]
        self.port = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*self.command, f"--port={self.port}"], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def hub_process(root: Path, log: Path, faults: Path) -> Iterator[HubProcess]:
    hub = HubProcess(root, log, faults)
    try:
        yield hub
    finally:
        hub.kill()


def on_disk(dest: Path) -> int:
    total = 0
    for path in partial_of(dest).rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def descendants(pid: int) -> list[int]:
    """The process and its children, as a power cut would meet them."""
    found = [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found


def test_twenty_kills(tmp_path: Path, python: str) -> None:
    source = sample.write(tmp_path / "hub" / REPO, shards=FILES, shard_bytes=FILE_BYTES)
    total = sum(len(data) for data in contents(source).values())
    faults, log = tmp_path / "faults.json", tmp_path / "hub.jsonl"
    faults.write_text(json.dumps({"total_bytes_per_s": RATE}))
    found = Repositories(tmp_path / "hub").revision(REPO, "main")
    assert found is not None
    dest = tmp_path / "models" / REPO / found.commit
    source_of_chance = random.Random(7)
    marks = sorted(source_of_chance.randrange(total // 50, total * 6 // 10) for _ in range(KILLS))

    with hub_process(tmp_path / "hub", log, faults) as hub:
        command = [
            sys.executable, "-m", "reap", "fetch", f"--repo={REPO}", f"--revision={found.commit}", f"--dest={dest}",
            f"--downloader={python}", f"--endpoint={hub.url}", "--stall-timeout=30", "--patience=300", "--workers=2",
        ]  # fmt: skip

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        client = start()
        kills = 0
        times: list[float] = []
        for number, mark in enumerate(marks):
            limit = time.monotonic() + 300
            while on_disk(dest) < mark and client.poll() is None:
                assert time.monotonic() < limit, f"no progress after kill {number}"
                time.sleep(0.01)
            # Nothing to serve, and no client that ended by itself.
            assert not dest.exists()
            assert client.poll() is None
            kills += 1
            times.append(time.time())
            if number % 3 == 1:
                hub.kill()
                hub.start()
                continue
            # The client alone (its children have to notice), or all of its processes at once, as in a power cut.
            victims = [client.pid] if number % 3 == 0 else descendants(client.pid)
            for pid in victims:
                # The first's end may have ended the others.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            client.wait()
            client = start()
        assert client.wait(timeout=600) == 0
        assert kills == KILLS

    copied = contents(dest)
    copied.pop("reap-manifest.json")
    assert copied == contents(source)
    twice = sent_twice(map(json.loads, log.read_text().splitlines()), f"/{REPO}/", times)
    print(
        f"{total} bytes wanted, {sum(twice)} sent twice: {sum(twice) / KILLS / FILE_BYTES:.2f} files a kill, "
        f"{max(twice) / FILE_BYTES:.2f} at most"
    )
    assert max(twice) <= FILE_BYTES
    shutil.rmtree(dest)
