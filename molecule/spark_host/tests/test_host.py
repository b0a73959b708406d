"""What a host is like before and after the role spark_host."""

from __future__ import annotations

from testinfra.host import Host


def test_systemd_runs_and_no_unit_has_failed(host: Host) -> None:
    state = host.run("systemctl is-system-running")
    failed = host.run("systemctl --failed --no-legend --plain")
    assert state.stdout.strip() == "running", failed.stdout
