"""What a fresh host is like after the role spark_host, and what a host that is no Spark is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = Path(__file__).resolve().parents[1]


def test_systemd_runs_and_no_unit_has_failed(host: Host) -> None:
    state = host.run("systemctl is-system-running")
    failed = host.run("systemctl --failed --no-legend --plain")
    assert state.stdout.strip() == "running", failed.stdout


def test_docker_runs_containers_and_starts_at_boot(host: Host) -> None:
    assert host.service("docker").is_running
    assert host.service("docker").is_enabled
    # An image of nothing but links into the host's /usr: a container without any pull.
    host.check_output(
        "cd $(mktemp -d) && mkdir usr proc sys dev etc"
        " && ln -s usr/bin bin && ln -s usr/lib lib && ln -s usr/lib64 lib64"
        " && tar -c . | docker import - links >/dev/null"
    )
    said = host.check_output("docker run --rm --network none -v /usr:/usr:ro links /bin/echo from inside")
    assert said == "from inside"


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ("/etc/reap", "root"),
        ("/opt/reap/bin", "root"),
        ("/run/reap", "root"),
        ("/var/lib/reap", "root"),
        ("/var/lib/reap/models", "reap"),
        ("/var/lib/reap/cache", "reap"),
        ("/var/lib/reap/evidence", "root"),
    ],
)
def test_folders_belong_to_whom_they_should(host: Host, path: str, owner: str) -> None:
    folder = host.file(path)
    assert folder.is_directory
    assert folder.user == owner
    assert folder.mode == 0o755


def test_the_user_cannot_log_in(host: Host) -> None:
    assert host.user("reap").shell == "/usr/sbin/nologin"


def test_the_program_runs(host: Host) -> None:
    assert host.check_output("/opt/reap/bin/reap --version").startswith("reap ")
    assert host.file("/opt/reap/bin/reap").mode == 0o755


def test_locked_memory_is_unlimited_for_new_logins(host: Host) -> None:
    limits = host.file("/etc/security/limits.d/90-reap.conf").content_string
    assert "* soft memlock unlimited" in limits
    assert "* hard memlock unlimited" in limits


def test_the_folder_in_run_is_made_anew_at_boot(host: Host) -> None:
    # /run is empty after a boot; this is the command that systemd runs then.
    host.check_output("rm -rf /run/reap && systemd-tmpfiles --create /etc/tmpfiles.d/reap.conf")
    assert host.file("/run/reap").is_directory


def playbook(name: str, *extra: str) -> subprocess.CompletedProcess[str]:
    """Run one of the repository's playbooks against the scenario's host."""
    # Molecule's own settings would point Ansible at another inventory and colour what is read here.
    unwanted = ("MOLECULE_", "ANSIBLE_", "FORCE_COLOR", "PY_COLORS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environment |= {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    inventories = ["-i", str(ROOT / "molecule" / "shared" / "inventory"), "-i", str(SCENARIO / "inventory")]
    program = str(Path(sys.executable).parent / "ansible-playbook")
    command = [program, *inventories, name, *extra]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def line(done: subprocess.CompletedProcess[str]) -> str:
    """What the end of a run says of the host."""
    return done.stdout[done.stdout.index("HOSTS **") :].splitlines()[1]


def files(host: Host) -> str:
    """The recent files of the host's configuration and programs, with their content."""
    return str(
        host.check_output("find /etc /opt /var/lib/reap -newermt '-1 day' -type f | sort | xargs -d '\\n' sha256sum")
    )


def test_a_host_that_is_no_spark_is_refused_once_and_left_alone(host: Host) -> None:
    before = files(host)
    # The production inventory's expectations, on this host.
    spark = {
        "spark_host_expect_architecture": "aarch64",
        "spark_host_expect_products": ["NVIDIA_DGX_Spark", "DGX Spark"],
        "spark_host_expect_gpu": "NVIDIA GB10",
    }
    done = playbook("site.yml", "-e", json.dumps(spark))
    assert done.returncode != 0
    assert "is not the host that the inventory promises; nothing was changed" in done.stdout
    for found in ("architecture is x86_64", "product is", "GPU is none"):
        assert found in done.stdout
    assert "changed=0" in done.stdout
    assert files(host) == before


@pytest.mark.parametrize("name", ["start", "rollback"])
def test_without_a_service_it_is_said_what_to_run(host: Host, name: str) -> None:
    assert not host.file("/etc/systemd/system/reap.service").exists
    done = playbook(f"playbooks/{name}.yml")
    assert done.returncode != 0
    assert line(done).startswith("reap-spark-host  FAILED  changed=0 ")
    assert "nothing is provisioned" in line(done)
    assert "run: ansible-playbook site.yml -l reap-spark-host" in line(done)


def test_a_stop_without_a_service_is_good_and_says_that_there_is_none(host: Host) -> None:
    assert not host.file("/etc/systemd/system/reap.service").exists
    done = playbook("playbooks/stop.yml")
    assert done.returncode == 0, done.stdout[-2000:]
    assert line(done).startswith("reap-spark-host  ok      changed=0 ")
    assert "nothing is provisioned, so nothing was stopped; run: ansible-playbook site.yml" in line(done)


def test_the_status_of_a_host_without_the_program_says_what_to_run(host: Host) -> None:
    host.check_output("mv /opt/reap/bin/reap /opt/reap/bin/away")
    try:
        done = playbook("playbooks/status.yml")
    finally:
        host.check_output("mv /opt/reap/bin/away /opt/reap/bin/reap")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "nothing is provisioned" in line(done)
    assert "run: ansible-playbook site.yml -l reap-spark-host" in line(done)


@pytest.fixture
def gpu(host: Host) -> Iterator[list[str]]:
    """A double of nvidia-smi, and settings that expect its GPU: the engine must offer a runtime for it."""
    host.check_output("printf '#!/bin/sh\necho NVIDIA GB10\n' > /usr/local/bin/nvidia-smi")
    host.check_output("chmod 755 /usr/local/bin/nvidia-smi")
    yield ["-e", json.dumps({"spark_host_expect_gpu": "NVIDIA GB10"})]
    host.check_output("rm -f /usr/local/bin/nvidia-smi")


@pytest.fixture
def stopped(host: Host) -> Iterator[Callable[[], str]]:
    """The engine and its socket are stopped; gives a look at all packages and at how the engine is set up."""
    host.check_output("systemctl stop docker.socket docker.service")
    yield lambda: str(
        host.check_output("dpkg-query --show | sha256sum; cat /etc/docker/daemon.json 2>/dev/null || true")
    )
    host.check_output("systemctl unmask --runtime docker.socket docker.service && systemctl start docker.service")


def test_a_stopped_engine_is_started_and_no_package_changes(host: Host, stopped: Callable[[], str]) -> None:
    before = stopped()
    done = playbook("playbooks/provision.yml", "--tags", "spark_host_install")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "changed=1" in line(done), done.stdout[-3000:]
    assert host.service("docker").is_running
    assert stopped() == before


def test_an_engine_that_cannot_start_is_named_and_neither_replaced_nor_set_anew(
    host: Host, stopped: Callable[[], str], gpu: list[str]
) -> None:
    host.check_output("systemctl mask --runtime docker.socket docker.service")
    before = stopped()
    done = playbook("playbooks/provision.yml", "--tags", "spark_host_install", *gpu)
    assert done.returncode != 0
    assert "Docker is installed and does not answer" in line(done), done.stdout[-3000:]
    assert "masked" in line(done)
    assert "changed=0 " in line(done)
    assert "nvidia-ctk" not in done.stdout
    assert stopped() == before
