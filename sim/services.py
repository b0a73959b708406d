"""What all simulated hosts share: the network of the lab, its OCI registry and its model hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sim import engine as engines
from sim import images
from sim.common import (
    CACHE,
    KIND,
    LABEL,
    REPOSITORY,
    SimError,
    free_port,
    http_answers,
    lock,
    object_name,
    read_json,
    stamp,
    step,
    wait_for,
    write_json,
)
from sim.engine import Engine

STAMP = "reap.sim.stamp"

HOLD = CACHE / "hold"
HOSTS = CACHE / "hosts"
LEASES = CACHE / "leases"
PORTS = CACHE / "services.json"
HUB_ROOT = CACHE / "hub"
# faults.json in it makes the hub misbehave, requests.jsonl is its log (sim/hub).
HUB_STATE = CACHE / "hub-state"
REGISTRY_ROOT = CACHE / "registry"

# name: port inside (also the port on 127.0.0.1 of each simulated host)
SERVICES = {"registry": 5000, "hub": 5080}


def labels(kind: str) -> list[str]:
    """`docker run` options that mark an object as this checkout's."""
    return ["--label", f"{LABEL}={CACHE}", "--label", f"{KIND}={kind}"]


def _command(name: str) -> tuple[list[str], list[str]]:
    """(mount options, command) of a service's container."""

    def bind(source: Path, target: str, writable: bool = False) -> str:
        return f"--mount=type=bind,src={source},dst={target}" + ("" if writable else ",readonly")

    if name == "registry":
        REGISTRY_ROOT.mkdir(parents=True, exist_ok=True)
        mounts = [
            bind(REPOSITORY / "sim" / "registry.yml", "/etc/registry.yml"),
            bind(REGISTRY_ROOT, "/var/lib/registry", writable=True),
        ]
        return mounts, ["docker-registry", "serve", "/etc/registry.yml"]
    HUB_ROOT.mkdir(parents=True, exist_ok=True)
    HUB_STATE.mkdir(parents=True, exist_ok=True)
    mounts = [
        bind(REPOSITORY / "sim", "/srv/sim"),
        bind(HUB_ROOT, "/srv/hub"),
        bind(HUB_STATE, "/srv/state", writable=True),
    ]
    options = ["--root=/srv/hub", "--host=0.0.0.0", "--port=5080"]
    options += ["--faults=/srv/state/faults.json", "--log=/srv/state/requests.jsonl"]
    return mounts, ["env", "-C", "/srv", "python3", "-m", "sim.hub", *options]


def url(name: str) -> str:
    """The address of a service on this machine (simulated hosts have their own: 127.0.0.1 and the port in SERVICES)."""
    return f"http://127.0.0.1:{ports()[name]}"


def ports() -> dict[str, int]:
    """The services' ports on this machine's loopback, chosen once."""
    chosen: dict[str, int] = read_json(PORTS, {})
    if set(chosen) != set(SERVICES):
        chosen = {name: free_port() for name in SERVICES}
        write_json(PORTS, chosen)
    return chosen


def port_clash(message: str) -> bool:
    """Whether the engine says that somebody took the port meanwhile."""
    return "port is already allocated" in message or "address already in use" in message


def _stopped_mark(name: str) -> Path:
    return CACHE / f"{name}.stopped"


def ensure(engine: Engine) -> None:
    """Network, registry and hub run and answer. The caller holds the lock `services`."""
    network = object_name("network")
    if engine.docker("network", "inspect", network, check=False).returncode:
        engine.docker("network", "create", *labels("network"), network)
    image = images.ensure(engine, "services")
    for name in SERVICES:
        if not _stopped_mark(name).exists():
            _ensure_one(engine, name, image)


def _ensure_one(engine: Engine, name: str, image: str) -> None:
    container = object_name(name)
    mounts, command = _command(name)
    sim = REPOSITORY / "sim"
    sources = [sim / "registry.yml"] if name == "registry" else sorted((sim / "hub").glob("*.py"))
    content = stamp([image, *command, *sources])
    seen = f'{{{{index .Config.Labels "{STAMP}"}}}} {{{{.State.Running}}}}'
    found = engine.docker("inspect", "--format", seen, container, check=False).stdout.split()
    if found == [content, "true"]:
        return
    with step(f"starting the {name}"):
        for _ in range(3):
            if found:
                engine.docker("rm", "--force", container, check=False)
            published = f"127.0.0.1:{ports()[name]}:{SERVICES[name]}"
            marks = [*labels(name), "--label", f"{STAMP}={content}"]
            place = ["--network", object_name("network"), "--network-alias", name, "--publish", published]
            # What it writes under the cache belongs to the user whose cache it is.
            place += ["--user", f"{os.getuid()}:{os.getgid()}"]
            started = engine.docker(
                "run", "--detach", "--name", container, *marks, *place, *mounts, image, *command, check=False
            )
            if started.returncode == 0:
                break
            found = ["half made"]
            if not port_clash(started.stderr):
                engine.docker("rm", "--force", container, check=False)
                raise SimError(f"the {name} did not start: {started.stderr.strip()}")
            write_json(PORTS, {**ports(), name: free_port(ports().values())})
        _await(engine, name)


def _await(engine: Engine, name: str) -> None:
    container = object_name(name)

    def ready() -> bool:
        if not engine.running(container):
            logs = engine.docker("logs", "--tail", "15", container, check=False)
            raise SimError(f"the {name} ended at its start:\n{(logs.stdout + logs.stderr).strip()}")
        return http_answers(url(name) + ("/v2/" if name == "registry" else "/"))

    wait_for(ready, 120, f"the {name}")


def control(name: str, action: str, host: str | None = None) -> None:
    """Stops or starts a service, for tests of faults: for all hosts, or as one host sees it."""
    engine = engines.require()
    if host:
        units = [f"lab-{name}.socket"] + ([f"lab-{name}.service"] if action == "stop" else [])
        engine.docker("exec", object_name("host", host), "systemctl", action, *units)
        return
    with lock("services"):
        mark = _stopped_mark(name)
        if action == "stop":
            mark.touch()
            engine.docker("stop", "--time", "5", object_name(name))
        else:
            mark.unlink(missing_ok=True)
            ensure(engine)


@contextlib.contextmanager
def lease() -> Iterator[Engine]:
    """The engine, registry and hub run as long as the block does, also with no host there."""
    mark = LEASES / str(os.getpid())
    with lock("services"):
        LEASES.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        with lock("services"):
            engine = engines.ensure()
            ensure(engine)
        yield engine
    finally:
        mark.unlink(missing_ok=True)
        release()


def _leased() -> bool:
    """Whether a `sim` command that still lives needs the services."""
    alive = False
    for mark in LEASES.glob("*") if LEASES.is_dir() else []:
        if Path(f"/proc/{mark.name}").exists():
            alive = True
        else:
            mark.unlink(missing_ok=True)
    return alive


def release() -> None:
    """Stops the services and a private engine when no host, no command and no hold needs them."""
    with lock("services"):
        if HOLD.exists() or _leased() or any(HOSTS.glob("*.json")):
            return
        stop_all()


def stop_all() -> None:
    """Removes every container, volume and network of this checkout and stops a private engine. Images stay."""
    engine = engines.current()
    if engine is not None:
        containers = engine.ours()
        if containers:
            with step(f"removing {len(containers)} containers"):
                engine.docker("rm", "--force", "--volumes", *containers)
        for what in ("volume", "network"):
            names = engine.ours(what=what)
            if names:
                engine.docker(what, "rm", *names)
    for name in SERVICES:
        _stopped_mark(name).unlink(missing_ok=True)
    engines.stop_private()


def state(engine: Engine | None) -> dict[str, Any]:
    """What `sim status --json` says of the services."""
    runs = {name: engine is not None and engine.running(object_name(name)) for name in SERVICES}
    return {name: {"running": runs[name], "url": url(name)} for name in SERVICES}
