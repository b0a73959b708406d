"""What the module spark_facts says of an engine and of a port, with doubles of the programs that it asks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
INFO = json.dumps({"ServerVersion": "29.1.3", "Runtimes": {"runc": {}, "nvidia": {}}})


@pytest.fixture(scope="module")
def facts() -> Iterator[ModuleType]:
    """The module, with the package under the name that Ansible gives it on a host."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".identity", ".serve", ".serve.state"):
            patch.setitem(sys.modules, f"ansible.module_utils.reap{name}", importlib.import_module(f"reap{name}"))
        spec = importlib.util.spec_from_file_location("spark_facts", ROOT / "plugins" / "modules" / "spark_facts.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put doubles on the path, in place of every program of this machine: name -> shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(**scripts: str) -> None:
        for name, script in scripts.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)

    return put


def systemctl(load_state: str, enabled: str = "enabled") -> str:
    return f'case "$1" in show) echo {load_state};; is-enabled) echo {enabled};; esac'


def test_an_engine_that_answers_is_known(facts: ModuleType, programs: Callable[..., None]) -> None:
    programs(docker=f"echo '{INFO}'", systemctl=systemctl("loaded"))
    assert facts.docker_facts() == {
        "docker": "29.1.3",
        "docker_error": None,
        "docker_installed": True,
        "docker_runtimes": ["nvidia", "runc"],
        "docker_enabled": True,
    }


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo Cannot connect to the Docker daemon >&2; exit 1", "Cannot connect to the Docker daemon"),
        # The client of a daemon that is not there answers with what it knows itself, and this status.
        ('echo \'{"ServerVersion": ""}\'; echo no daemon >&2; exit 1', "no daemon"),
        ("echo not JSON", "cannot be read"),
    ],
)
def test_a_stopped_engine_is_installed_and_says_why_it_is_silent(
    facts: ModuleType, programs: Callable[..., None], script: str, why: str
) -> None:
    programs(docker=script, systemctl=systemctl("loaded"))
    found = facts.docker_facts()
    assert (found["docker"], found["docker_installed"], found["docker_runtimes"]) == ("", True, [])
    assert why in found["docker_error"]


def test_a_slow_engine_is_installed(
    facts: ModuleType, programs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(docker="exit 0", systemctl=systemctl("loaded"))
    plain = subprocess.run

    def slow(command: list[str], **options: Any) -> Any:
        if command[0].endswith("docker"):
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return plain(command, **options)

    monkeypatch.setattr(subprocess, "run", slow)
    found = facts.docker_facts()
    assert (found["docker"], found["docker_installed"]) == ("", True)
    assert "30 s" in found["docker_error"]


@pytest.mark.parametrize(("load_state", "installed"), [("loaded", True), ("masked", True), ("not-found", False)])
def test_without_a_program_the_unit_decides(
    facts: ModuleType, programs: Callable[..., None], load_state: str, installed: bool
) -> None:
    programs(systemctl=systemctl(load_state))
    assert facts.docker_facts()["docker_installed"] is installed


def test_a_host_without_any_of_it_has_no_engine(facts: ModuleType, programs: Callable[..., None]) -> None:
    programs()
    found = facts.docker_facts()
    assert (found["docker"], found["docker_installed"], found["docker_enabled"]) == ("", False, False)


@pytest.fixture
def port() -> Iterator[int]:
    """A port of loopback on which this process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def served(folder: Path, port: int, **changes: Any) -> str:
    """The state of a service on a port; its supervisor is this process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    state = {"phase": "serving", "boot_id": boot, "pid": os.getpid(), "endpoint": f"http://127.0.0.1:{port}"}
    (folder / "service.json").write_text(json.dumps(state | changes), encoding="utf-8")
    return str(folder)


def test_a_port_with_no_listener_is_free(facts: ModuleType, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert not facts.port_taken(probe.getsockname()[1], str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, False),
        ({"phase": "loading"}, False),
        # Its supervisor was killed, and its container still listens.
        ({"pid": 2**30, "container_pid": os.getpid()}, False),
        # What a stop, a reboot or a lost process leaves says nothing of who listens now.
        ({"phase": "absent"}, True),
        ({"boot_id": "another"}, True),
        ({"pid": 2**30, "container_pid": None}, True),
        ({"endpoint": "http://127.0.0.1:1"}, True),
    ],
)
def test_only_a_service_that_lives_has_its_port(
    facts: ModuleType, tmp_path: Path, port: int, changes: dict[str, Any], taken: bool
) -> None:
    assert facts.port_taken(port, served(tmp_path, port, **changes)) is taken


@pytest.mark.parametrize("text", ["", "no JSON", "[]"])
def test_a_state_that_cannot_be_read_has_no_port(facts: ModuleType, tmp_path: Path, port: int, text: str) -> None:
    (tmp_path / "service.json").write_text(text)
    assert facts.port_taken(port, str(tmp_path))


def test_a_part_of_a_model_is_counted_and_a_whole_one_needs_nothing(facts: ModuleType, tmp_path: Path) -> None:
    model = tmp_path / "org" / "name" / "revision"
    found = facts.model_disk(str(model))
    assert (found["present"], found["whole"], found["device"]) == (0, False, tmp_path.stat().st_dev)
    assert found["free"] > 0
    part = model.with_name("revision.partial") / "folder"
    part.mkdir(parents=True)
    (part / "a").write_bytes(b"x" * 1000)
    assert (facts.model_disk(str(model))["present"], facts.model_disk(str(model))["whole"]) == (1000, False)
    model.mkdir()
    assert facts.model_disk(str(model))["whole"]


def test_a_host_without_an_engine_has_no_image_yet(facts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object, **__: object) -> None:
        raise facts.ReapError("no container engine answers")

    monkeypatch.setattr(facts.Engine, "call", nobody)
    found = facts.image_disk({"repository": "host/image", "digest": f"sha256:{'0' * 64}"})
    assert (found["path"], found["whole"]) == ("/var/lib/docker", False)
