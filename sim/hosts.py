"""Simulated hosts: fresh systemd machines in containers, reached over SSH on 127.0.0.1."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sim import engine as engines
from sim import images, services
from sim.common import (
    CACHE,
    SimError,
    free_port,
    lock,
    object_name,
    program,
    read_json,
    run,
    say,
    step,
    wait_for,
    write_atomic,
    write_json,
)
from sim.engine import Engine
from sim.services import HOSTS

SSH_DIR = CACHE / "ssh"
KEY = SSH_DIR / "id_ed25519"
SSH_CONFIG = CACHE / "ssh_config"
KNOWN_HOSTS = CACHE / "known_hosts"
USER = "spark"
ENTRY = "/usr/local/lib/sim/entry"


def check_name(name: str) -> str:
    """`name` itself where it can be a host name; a SimError otherwise."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise SimError(f"host name {name!r}: wanted 1 to 63 of a-z, 0-9 and '-', with no '-' at its ends")
    return name


def entry_file(name: str) -> Path:
    """Where a host is written down: it exists from before its container does until after that is gone."""
    return HOSTS / f"{name}.json"


def all_entries() -> dict[str, dict[str, Any]]:
    """Every host of this checkout by name."""
    return {path.stem: read_json(path, {}) for path in sorted(HOSTS.glob("*.json"))} if HOSTS.is_dir() else {}


def ssh_config_text(entries: dict[str, dict[str, Any]], key: Path, known_hosts: Path) -> str:
    """An ssh_config with one block for each host that has a port. Host keys are checked."""
    blocks = [
        f"Host {name}\n"
        "  HostName 127.0.0.1\n"
        f"  Port {entry['port']}\n"
        f"  User {USER}\n"
        f'  IdentityFile "{key}"\n'
        "  IdentitiesOnly yes\n"
        f'  UserKnownHostsFile "{known_hosts}"\n'
        "  GlobalKnownHostsFile /dev/null\n"
        "  StrictHostKeyChecking yes\n"
        "  HostKeyAlgorithms ssh-ed25519\n"
        for name, entry in sorted(entries.items())
        if "port" in entry
    ]
    return "# Written by `python3 -m sim`; changes are lost.\n" + "\n".join(blocks)


def known_hosts_text(entries: dict[str, dict[str, Any]]) -> str:
    """The host keys as OpenSSH's known_hosts wants them."""
    return "".join(
        f"[127.0.0.1]:{entry['port']} {entry['host_key']}\n"
        for _, entry in sorted(entries.items())
        if "host_key" in entry
    )


def write_ssh_files() -> None:
    """ssh_config and known_hosts agree with the hosts that exist."""
    with lock("ssh"):
        entries = all_entries()
        write_atomic(KNOWN_HOSTS, known_hosts_text(entries))
        write_atomic(SSH_CONFIG, ssh_config_text(entries, KEY, KNOWN_HOSTS))


def _ensure_key() -> str:
    """The public key that opens every host of this checkout."""
    with lock("ssh"):
        if not KEY.exists():
            SSH_DIR.mkdir(parents=True, exist_ok=True)
            SSH_DIR.chmod(0o700)
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "reap-sim", "-f", KEY])
        return KEY.with_suffix(".pub").read_text().strip()


def up(name: str, docker: str = "preinstalled", fresh: bool = False) -> dict[str, Any]:
    """A host `name` that answers over SSH: a new one, or the one that is there (unless `fresh`). Returns its entry."""
    check_name(name)
    if not program("ssh"):
        engines.install_packages(["openssh-client"], "hosts are reached over SSH")
    start = time.monotonic()
    with lock(f"host-{name}"):
        if fresh and entry_file(name).exists():
            _remove(name)
        entry: dict[str, Any] = read_json(entry_file(name), {})
        if entry and entry.get("docker", docker) != docker:
            raise SimError(
                f"host {name} is there with Docker {entry['docker']}, wanted {docker}: "
                f"`python3 -m sim down {name}` first, or add --fresh"
            )
        container = object_name("host", name)
        made = "host_key" not in entry
        try:
            with lock("services"):
                if not entry:
                    entry = {"name": name, "docker": docker, "port": _port()}
                write_json(entry_file(name), entry)
                engine = engines.ensure()
                services.ensure(engine)
            if not made and engine.running(container):
                say(f"sim: {name} is up already")
            elif not made and engine.exists(container):
                with step(f"starting {name} again"):
                    engine.docker("start", container)
            else:
                made = True
                engine.docker("rm", "--force", "--volumes", container, check=False)
                _create(engine, entry, images.ensure(engine, f"host-{docker}"))
            _ready(engine, entry)
        except BaseException:
            # Nothing half-made stays; a host that was there before is left for a look.
            if made:
                _remove(name)
                services.release()
            raise
    say(f"sim: {name} answers: ssh -F {SSH_CONFIG} {name} ({time.monotonic() - start:.0f} s)")
    return entry


def _port() -> int:
    """A port for SSH that no other host or service of this checkout has."""
    taken = [entry["port"] for entry in all_entries().values() if "port" in entry]
    return free_port([*taken, *services.ports().values()])


def _create(engine: Engine, entry: dict[str, Any], image: str) -> None:
    """Makes the container; systemd starts in it."""
    name = entry["name"]
    container = object_name("host", name)
    volume = object_name("volume", name)
    privileges = engine.privileges(image)
    with step(f"making the host {name}"):
        # The nested engine's overlay2 cannot lie on this engine's overlay: its data goes to a volume.
        engine.docker("volume", "rm", "--force", volume, check=False)
        engine.docker("volume", "create", *services.labels("volume"), volume)
        options = [
            *("--hostname", name, *services.labels("host"), "--network", object_name("network")),
            *("--cgroupns", "private", "--tmpfs", "/run:exec,mode=755", "--tmpfs", "/run/lock"),
            *("--volume", f"{volume}:/var/lib/docker"),
            # vLLM's processes share memory through /dev/shm of the host (host IPC); the engine's default is 64 MB.
            *("--shm-size", "2g"),
            # systemd's signal for an orderly halt; a reboot from inside ends with an error code and starts again.
            *("--stop-signal", "SIGRTMIN+3", "--restart", "on-failure"),
        ]
        for last in (False, False, True):
            published = ["--publish", f"127.0.0.1:{entry['port']}:22"]
            command = ["run", "--detach", "--name", container, *privileges, *options, *published, image, ENTRY]
            started = engine.docker(*command, check=False)
            if started.returncode == 0:
                break
            engine.docker("rm", "--force", container, check=False)
            if last or not services.port_clash(started.stderr):
                raise SimError(f"the host {name} did not start: {started.stderr.strip()}")
            entry["port"] = _port()
        _install_key(engine, entry)


def _install_key(engine: Engine, entry: dict[str, Any]) -> None:
    """Lets our key in, and learns the host's own through the engine, so that even the first connection is checked."""
    container = object_name("host", entry["name"])
    script = (
        f"install -d -o {USER} -g {USER} -m 0700 /home/{USER}/.ssh && "
        f"install -o {USER} -g {USER} -m 0600 /dev/stdin /home/{USER}/.ssh/authorized_keys"
    )
    engine.docker("exec", "--interactive", container, "sh", "-c", script, input_text=_ensure_key() + "\n")
    read: dict[str, str] = {}

    def has_key() -> bool:
        done = engine.docker("exec", container, "cat", "/etc/ssh/ssh_host_ed25519_key.pub", check=False)
        read["key"] = " ".join(done.stdout.split()[:2])
        return bool(read["key"])

    wait_for(has_key, 120, f"the SSH host key of {entry['name']}")
    entry["host_key"] = read["key"]
    write_json(entry_file(entry["name"]), entry)


def _ready(engine: Engine, entry: dict[str, Any]) -> None:
    """Waits until systemd has started everything and SSH answers."""
    name = entry["name"]
    container = object_name("host", name)
    state = ""

    def booted() -> bool:
        nonlocal state
        state = engine.docker("exec", container, "systemctl", "is-system-running", check=False).stdout.strip()
        if not engine.running(container):
            logs = engine.docker("logs", "--tail", "20", container, check=False)
            raise SimError(f"the host {name} ended at its start:\n{(logs.stdout + logs.stderr).strip()}")
        return state in ("running", "degraded")

    wait_for(booted, 300, f"systemd on {name}")
    if state == "degraded":
        failed = engine.output("exec", container, "systemctl", "--failed", "--no-legend", "--plain")
        say(f"sim: note: {name} has failed units:\n{failed}")
    write_ssh_files()
    wait_for(lambda: ssh(name, "true", quiet=True) == 0, 120, f"SSH on {name}")


def ssh(name: str, *command: str, quiet: bool = False) -> int:
    """The exit status of a command over SSH on the host."""
    sink = subprocess.DEVNULL if quiet else None
    words = ["ssh", "-F", str(SSH_CONFIG), "-o", "ConnectTimeout=5", "-o", "BatchMode=yes", name, *command]
    return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False).returncode


def _remove(name: str) -> None:
    engine = engines.current()
    if engine is not None:
        engine.docker("rm", "--force", "--volumes", object_name("host", name), check=False)
        engine.docker("volume", "rm", "--force", object_name("volume", name), check=False)
    entry_file(name).unlink(missing_ok=True)
    write_ssh_files()


def down(names: list[str]) -> None:
    """Removes hosts with all that they hold, those that are there; the last one takes the services with it."""
    for name in names:
        check_name(name)
        with lock(f"host-{name}"), step(f"removing {name}"):
            _remove(name)
    services.release()


def down_all() -> None:
    """Removes everything this checkout runs, held or not."""
    with lock("services"):
        services.HOLD.unlink(missing_ok=True)
        services.stop_all()
        for name in all_entries():
            entry_file(name).unlink(missing_ok=True)
    write_ssh_files()


def require(name: str) -> tuple[Engine, dict[str, Any]]:
    """(engine, entry) of a host that runs; a SimError that names the hosts that do, otherwise."""
    entries = all_entries()
    engine = engines.current()
    if engine is None or name not in entries or not engine.running(object_name("host", name)):
        known = ", ".join(entries) or "none"
        raise SimError(f"no host {name} runs here (hosts: {known}): start it with `python3 -m sim up {name}`")
    return engine, entries[name]


def reboot(name: str, hard: bool = False) -> None:
    """Restarts a host and waits until it answers again: an orderly reboot, or with `hard` a power cut."""
    engine, entry = require(name)
    container = object_name("host", name)
    with lock(f"host-{name}"), step(f"{'cutting the power of' if hard else 'rebooting'} {name}"):
        if hard:
            engine.docker("kill", container)
            engine.docker("start", container)
        else:
            engine.docker("restart", "--time", "90", container)
        _ready(engine, entry)


def execute(name: str, command: list[str]) -> int:
    """Runs a command as root on the host, without SSH; returns its exit status."""
    engine, _ = require(name)
    terminal = ["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    words = [*engine.command, "exec", "--interactive", *terminal, object_name("host", name), *command]
    return subprocess.run(words, check=False).returncode
