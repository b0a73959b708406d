"""Bad settings are named on the controller, before a host is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def preflight(tmp_path: Path, *extra: str, host: str = "spark-under-test") -> subprocess.CompletedProcess[str]:
    """Preflight against a host that cannot be reached: only what needs no host can be said of it."""
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(f"sparks:\n  hosts:\n    {host}:\n      ansible_host: 127.0.0.1\n      ansible_port: 9\n")
    command = [
        str(Path(sys.executable).parent / "ansible-playbook"),
        "-i",
        str(inventory),
        "playbooks/preflight.yml",
        *extra,
    ]
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "LC_ALL": "C.UTF-8",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("reap_profile=k144-nospec-200", "did you mean k144-nospec-200k"),
        ("watchdog_flor_kb=8388608", "did you mean watchdog_floor_kb"),
        ("watchdog_floor_kb=8G", "'8G', wanted int"),
        ("reap_port=http", "'http', wanted a TCP port"),
        ("reap_port=70000", "'70000', wanted a TCP port"),
        ("spark_host_expect_mem_total_min_kb=lots", "'lots', wanted int"),
    ],
)
def test_a_bad_setting_is_one_clear_error_and_the_host_is_not_touched(
    tmp_path: Path, setting: str, wanted: str
) -> None:
    done = preflight(tmp_path, "-e", setting)
    assert done.returncode != 0
    assert "spark-under-test: 1 setting(s) to correct; nothing was touched" in done.stdout
    assert wanted in done.stdout
    assert "unreachable=0" in done.stdout


def test_good_settings_reach_the_host_and_an_unreachable_one_is_named(tmp_path: Path) -> None:
    done = preflight(tmp_path)
    assert done.returncode != 0
    assert "unreachable=1" in done.stdout
    assert "check ansible_host, the network and the SSH key" in done.stdout


def test_a_secret_is_not_shown_in_an_error(tmp_path: Path) -> None:
    done = preflight(tmp_path, "-e", '{"model_fetch_token": ["s3cr3t-t0ken"]}')
    assert "s3cr3t-t0ken" not in done.stdout + done.stderr
