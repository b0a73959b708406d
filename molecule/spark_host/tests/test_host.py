"""What a fresh host is like after the role spark_host, and what a host that is no Spark is told."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_a_host_that_is_no_spark_is_refused_once_and_left_alone(host: Host) -> None:
    before = host.check_output(
        "find /etc /opt /var/lib/reap -newermt '-1 day' -type f | sort | xargs -d '\\n' sha256sum"
    )
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    # The production inventory's expectations, on this host.
    spark = {
        "spark_host_expect_architecture": "aarch64",
        "spark_host_expect_products": ["NVIDIA_DGX_Spark", "DGX Spark"],
        "spark_host_expect_gpu": "NVIDIA GB10",
    }
    settings = [word for key, value in spark.items() for word in ("-e", f'{{"{key}": {value!r}}}'.replace("'", '"'))]
    inventories = ["-i", str(ROOT / "molecule" / "shared" / "inventory"), "-i", str(SCENARIO / "inventory")]
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), *inventories, "site.yml", *settings],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "is not the host that the inventory promises; nothing was changed" in done.stdout
    for found in ("architecture is x86_64", "product is", "GPU is none"):
        assert found in done.stdout
    assert "changed=0" in done.stdout
    after = host.check_output(
        "find /etc /opt /var/lib/reap -newermt '-1 day' -type f | sort | xargs -d '\\n' sha256sum"
    )
    assert after == before
