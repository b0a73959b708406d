"""How long a model takes to reach 2, 4, 8 and 16 hosts that all want it at once, as a multiple of one copy.

    .venv/bin/python tests/benchmarks/model_fetch_spread.py [--megabytes 64] [--rate 3] [--svg FILE]

Prints one JSON object. One copy is the model's bytes through the rate limit: it cannot be quicker.

Real: the decisions (whom to ask, whom to take from, when to ask the hub), the hub's protocol, huggingface_hub, hashing,
the one copy that a host gives at a time. Doubles: the hosts are folders and threads of this process, and in the place
of rsync over SSH stands a copy of files that sends --rate megabytes a second at most for each giving host; the hub has
the same limit. rsync over SSH between hosts is shown by the Molecule scenario model_fleet.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins" / "module_utils")]
from reap.fetch import downloader, engine, hub, manifest, peers, progress, store
from reap.fetch.plan import Want
from sim.hub import sample
from sim.hub.faults import RateLimit
from sim.hub.server import Hub

REPO = "bench/model"
SIZES = (1, 2, 4, 8, 16)
CHUNK = 1 << 16


class Lan(peers.Peers):
    """``Peers`` with folders for hosts. ``hosts`` and ``limits`` are set for each measurement."""

    hosts: ClassVar[dict[str, Path]] = {}
    limits: ClassVar[dict[str, RateLimit]] = {}

    def _ask(self, peer: peers.Peer) -> dict[str, object]:
        return peers._have(self.hosts[peer.address], self.repo, self.revision)

    def _copy(
        self,
        peer: peers.Peer,
        partial: store.Partial,
        missing: Mapping[str, Want],
        have: Callable[[manifest.Entry], None],
        moved: Callable[[Mapping[str, int]], None],
    ) -> str | None:
        giver = self.hosts[peer.address] / self.repo / self.revision
        slot = os.open(giver / "reap-manifest.json", os.O_RDONLY)
        try:
            fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for want in missing.values():
                part = partial.part(want)
                with (giver / want.name).open("rb") as data, part.open("wb") as out:
                    while chunk := data.read(CHUNK):
                        out.write(chunk)
                        time.sleep(max(0.0, self.limits[peer.address].reserve(len(chunk))))
                entry, problem = manifest.verify(part, want)
                if entry is None:
                    return problem
                partial.accept(want, entry)
                have(entry)
        except BlockingIOError:
            return "busy"
        finally:
            os.close(slot)
        return None


def spread(folder: Path, server: Hub, commit: str, python: str, count: int, rate: float) -> dict[str, Any]:
    """Let ``count`` hosts want the model at once, as the role does: the first may ask the hub, the others wait."""
    Lan.hosts = {f"spark@host-{number}": folder / str(number) for number in range(count)}
    Lan.limits = {address: RateLimit(rate) for address in Lan.hosts}
    settings = hub.Settings(python=python, endpoint=server.url)

    def fetch(number: int) -> str:
        others = tuple(peers.Peer(address) for address in Lan.hosts if address != f"spark@host-{number}")
        request = engine.Request(
            repo=REPO,
            revision=commit,
            dest=folder / str(number) / REPO / commit,
            settings=settings,
            peers=peers.Access(fixed=others, wait_s=120 * number),
        )
        return engine.fetch(request, progress.Progress(None, "model_fetch")).source

    began = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        sources = list(pool.map(fetch, range(count)))
    seconds = time.monotonic() - began
    shutil.rmtree(folder)
    return {"hosts": count, "seconds": round(seconds, 1), "from_the_hub": sources.count("hub")}


def draw(rows: list[dict[str, Any]], text: str) -> str:
    """A picture as SVG that can be read on light and on dark pages."""
    left, top, width, height, most = 52, 34, 420, 230, 16

    def at(index: float, multiple: float) -> str:
        return f"{left + 40 + index * (width - 80) / (len(SIZES) - 1):.1f},{top + height * (1 - multiple / most):.1f}"

    lines = {
        "hub": [float(n) for n in SIZES],
        "log": [1 + math.log2(n) for n in SIZES],
        "seen": [float(row["multiple"]) for row in rows],
    }
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 330" role="img" aria-label="{text}">',
        "<style>text{font:13px sans-serif;fill:#222}.grid{stroke:#8884}polyline{fill:none;stroke-width:2}"
        ".hub{stroke:#b35900}.log{stroke:#777;stroke-dasharray:5 4}.seen{stroke:#0b62b8}circle{fill:#0b62b8}"
        ".key-hub{fill:#b35900}.key-log{fill:#666}.key-seen{fill:#0b62b8}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}.hub{stroke:#f0a35e}.log{stroke:#aaa}.seen{stroke:#6db3f2}"
        "circle{fill:#6db3f2}.key-hub{fill:#f0a35e}.key-log{fill:#bbb}.key-seen{fill:#6db3f2}}</style>",
        f'<text x="{left}" y="18">time as a multiple of one copy</text>',
    ]
    for multiple in range(0, most + 1, 4):
        y = at(0, multiple).split(",")[1]
        out.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>')
        out.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{multiple}</text>')
    for index, size in enumerate(SIZES):
        x = at(index, 0).split(",")[0]
        out.append(f'<text x="{x}" y="{top + height + 20}" text-anchor="middle">{size}</text>')
    out.append(
        f'<text x="{left + width / 2}" y="{top + height + 42}" text-anchor="middle">hosts that want the model</text>'
    )
    for name, values in lines.items():
        points = " ".join(at(index, value) for index, value in enumerate(values))
        out.append(f'<polyline class="{name}" points="{points}"/>')
    for index, value in enumerate(lines["seen"]):
        x, y = at(index, value).split(",")
        out.append(
            f'<circle cx="{x}" cy="{y}" r="4"/>'
            f'<text x="{x}" y="{float(y) + (-9 if index > 2 else 19):.1f}" text-anchor="middle">{value}</text>'
        )
    labels = {"hub": "each from the hub (N)", "log": "1 + log2 N", "seen": "measured"}
    for name, label in labels.items():
        y = float(at(0, lines[name][-1]).split(",")[1]) + {"hub": 4, "seen": 4, "log": 30}[name]
        out.append(f'<text class="key-{name}" x="{left + width - 26}" y="{y:.1f}">{label}</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    """Measure, print one JSON object, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3.0, help="megabytes a second that a host or the hub sends")
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    python = ROOT / ".cache" / "downloader" / f"{sys.version_info.major}.{sys.version_info.minor}"
    python.parent.mkdir(parents=True, exist_ok=True)
    downloader.install(python, ROOT / "roles/model_fetch/files/requirements.txt", [])
    rate = options.rate * 1e6
    rows = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        sample.write(folder / "hub" / REPO, shards=16, shard_bytes=options.megabytes * 1_000_000 // 16)
        server = Hub(folder / "hub")
        server.faults.replace({"total_bytes_per_s": rate})
        threading.Thread(target=server.serve_forever, daemon=True).start()
        revision = server.repositories.revision(REPO, "main")
        assert revision is not None
        size = sum(file.size for file in revision.files.values())
        engine.Peers = Lan  # type: ignore[misc]
        for count in SIZES:
            row = spread(folder / "hosts", server, revision.commit, str(python / "bin" / "python"), count, rate)
            one = size / rate
            rows.append({**row, "multiple": round(row["seconds"] / one, 2), "log2": round(1 + math.log2(count), 2)})
            print(rows[-1], file=sys.stderr, flush=True)
        server.shutdown()
    print(json.dumps({"megabytes": options.megabytes, "megabytes_per_s": options.rate, "load": load, "rows": rows}))
    if options.svg:
        said = ", ".join(f"{row['hosts']} hosts: {row['multiple']}" for row in rows)
        options.svg.write_text(draw(rows, f"time to reach all hosts as a multiple of one copy: {said}"))


if __name__ == "__main__":
    main()
