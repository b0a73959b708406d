"""What the two big downloads cost side by side, and what the role model_fetch costs when there is nothing to do.

    .venv/bin/python tests/benchmarks/model_fetch_beside.py [--seconds 100] [--runs 5] [--provision]

Prints one JSON object. On a fresh simulated host, with the real roles of playbooks/provision.yml, a real registry and
real pulls. Doubles: the hub is sim.hub, and both are throttled so that either takes --seconds for its bytes: the hub by
itself, the registry by a proxy of this process. What both need before (packages, the downloader) is installed first.
With --provision nothing is: one run of the whole playbook on a fresh host, packages, patched image and watchdog with
it, but not the start of the service (the files of this model are random).

- ``beside``: wall time of both roles in one run, as a multiple of the longer one of the two runs with one of them.
- ``again``: wall time of the converged role as a multiple of ``ansible -m ping``, and the bytes of the model that the
  kernel had to read for it: all its pages are dropped before, and counted after.
- ``provision``: wall time of that one run, as a multiple of --seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import contextlib

from sim import build, hosts, services
from sim.common import FACTS, object_name, read_json
from sim.engine import Engine
from sim.hub.faults import RateLimit

BIN = Path(sys.executable).parent
NAME = "spark-sim"
MODEL = "sim/bench"
INVENTORY = ["--inventory", "inventories/sim"]
ENVIRONMENT = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "LC_ALL": "C.UTF-8", "REAP_PROGRESS": "off"}
# Drops the pages of every file below a folder, or counts those that are in memory (mincore), in bytes.
PAGES = """
import ctypes, mmap, os, sys
libc, total = ctypes.CDLL(None, use_errno=True), 0
for root, _, names in os.walk(sys.argv[2]):
    for name in names:
        if name == "reap-manifest.json":
            continue
        handle = os.open(os.path.join(root, name), os.O_RDONLY)
        size = os.fstat(handle).st_size
        if sys.argv[1] == "drop":
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        elif size:
            area = mmap.mmap(handle, size, mmap.MAP_PRIVATE)
            vector = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            start = ctypes.addressof(ctypes.c_char.from_buffer(area))
            assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), vector) == 0
            total += sum(page & 1 for page in vector) * mmap.PAGESIZE
        os.close(handle)
print(total)
"""


def throttle(address: str, target: tuple[str, int], rate: float) -> int:
    """Start a proxy to ``target`` that hands on ``rate`` bytes a second for all connections together; its port."""
    limit = RateLimit(rate)
    listener = socket.create_server((address, 0))

    def pump(source: socket.socket, sink: socket.socket, limited: bool) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
                if limited:
                    time.sleep(max(0.0, limit.reserve(len(data))))
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(target)
            threading.Thread(target=pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=pump, args=(server, client, True), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def timed(command: list[str]) -> tuple[float, str]:
    """Wall seconds and output of a command that must succeed."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-500:]}"
        )
    return time.monotonic() - began, done.stdout


def on_host(engine: Engine, *command: str) -> str:
    return engine.output("exec", object_name("host", NAME), *command)


def throttled(engine: Engine, model: dict[str, Any], seconds: float) -> Path:
    """Hold the host's ways to the hub and to the registry to ``seconds`` for their bytes; the hub's file."""
    image = read_json(FACTS)["runtime_image"]
    network = engine.output(
        "network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", object_name("network")
    )
    port = throttle(network, ("127.0.0.1", services.ports()["registry"]), image["bytes"] / seconds)
    unit = "/run/systemd/system/lab-registry.service.d/throttled.conf"
    way = f"[Service]\nExecStart=\nExecStart=/usr/lib/systemd/systemd-socket-proxyd {network}:{port}\n"
    script = f"mkdir -p {Path(unit).parent}; printf %s '{way}' >{unit}; systemctl daemon-reload; "
    on_host(engine, "sh", "-c", f"{script} systemctl stop lab-registry.service; systemctl restart lab-registry.socket")
    faults = services.HUB_STATE / "faults.json"
    faults.write_text(json.dumps({"total_bytes_per_s": model["bytes"] / seconds}))
    return faults


def measure(engine: Engine, seconds: float, runs: int, provision: bool) -> dict[str, Any]:
    """All figures; the host is fresh and the services run."""
    revision = build.publish(MODEL, 40, 4)
    model = read_json(FACTS)["checkpoints"][MODEL]
    dest = f"/var/lib/reap/models/{MODEL}/{revision}"
    expect = {"model_type": "deepseek_v4"}
    variables = {"model_fetch_repo": MODEL, "model_fetch_revision": revision, "model_fetch_dest": dest}
    play = [str(BIN / "ansible-playbook"), *INVENTORY, "-l", NAME, "playbooks/provision.yml"]
    play += ["-e", json.dumps({**variables, "model_fetch_expect": expect})]
    if provision:
        faults = throttled(engine, model, seconds)
        try:
            wall = round(timed([*play, "--skip-tags", "reap_service"])[0], 1)
        finally:
            faults.unlink()
        return {"provision": {"wall": wall, "multiple": round(wall / seconds, 3)}}
    play.append("--tags")
    timed([*play, "spark_host,runtime_image_install,model_fetch_install"])

    faults = throttled(engine, model, seconds)

    def fresh() -> None:
        on_host(engine, "sh", "-c", f"rm -rf {dest} /var/lib/reap/images.json; docker image prune --all --force")

    walls: dict[str, float] = {}
    try:
        for name, tags in (("pull", "runtime_image"), ("model", "model_fetch"), ("both", "runtime_image,model_fetch")):
            fresh()
            walls[name] = round(timed([*play, tags])[0], 1)
            print(name, walls[name], file=sys.stderr, flush=True)
    finally:
        faults.unlink()
    beside = {**walls, "multiple": round(walls["both"] / max(walls["pull"], walls["model"]), 3)}

    ping = [str(BIN / "ansible"), *INVENTORY, NAME, "-m", "ansible.builtin.ping"]
    again: dict[str, list[float]] = {"ping": [], "role": []}
    read = 0
    for command in (ping, [*play, "model_fetch"]):
        timed(command)
    for _ in range(runs):
        again["ping"].append(timed(ping)[0])
        on_host(engine, "python3", "-c", PAGES, "drop", dest)
        took, out = timed([*play, "model_fetch"])
        if "changed=0 " not in out:
            raise SystemExit(f"the second run changed something:\n{out[-2000:]}")
        again["role"].append(took)
        read = max(read, int(on_host(engine, "python3", "-c", PAGES, "count", dest)))
    middle = {name: round(statistics.median(values), 2) for name, values in again.items()}
    multiple = round(middle["role"] / middle["ping"], 2)
    return {"beside": beside, "again": {**middle, "multiple": multiple, "model_bytes": model["bytes"], "read": read}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=100.0, help="what the bytes of either take by themselves")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--provision", action="store_true", help="one whole provision of a fresh host instead")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with services.lease() as engine:
        hosts.up(NAME, fresh=True)
        try:
            result = measure(engine, options.seconds, options.runs, options.provision)
        finally:
            hosts.down([NAME])
    print(json.dumps({"load_before": load, "seconds": options.seconds, **result}, indent=1))


if __name__ == "__main__":
    main()
