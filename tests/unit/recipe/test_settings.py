"""Bad settings are named on the controller, before a host is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reap.settings import serial_fault

ROOT = Path(__file__).resolve().parents[3]


def preflight(
    tmp_path: Path, *extra: str, playbook: str = "preflight.yml", variables: str = ""
) -> subprocess.CompletedProcess[str]:
    """A playbook against a host that cannot be reached: only what needs no host can be said of it."""
    inventory = tmp_path / "hosts.yml"
    host = "spark-under-test:\n      ansible_host: 127.0.0.1\n      ansible_port: 9"
    inventory.write_text(f"sparks:\n  hosts:\n    {host}\n      {variables}\n")
    command = [
        str(Path(sys.executable).parent / "ansible-playbook"),
        "-i",
        str(inventory),
        f"playbooks/{playbook}",
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
        ("teardown_modles=true", "did you mean teardown_models"),
        ("teardown_models=perhaps", "'perhaps', wanted bool"),
        ("reap_serial=some", "wanted a number from 1, a percentage such as 25%"),
        ("reap_run_dir=/run/elsewhere", "wanted /run/reap"),
        ("model_fetch_dest={{ model_fetch_modles_dir }}/x", "'model_fetch_modles_dir' is undefined"),
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


# That the settings come first in the others too, test_tags.py reads from the list of tasks.
@pytest.mark.parametrize("playbook", ["provision.yml", "model.yml", "status.yml", "teardown.yml"])
def test_a_playbook_by_itself_judges_the_settings_first(tmp_path: Path, playbook: str) -> None:
    done = preflight(tmp_path, "-e", "reap_profile=k145", playbook=playbook)
    assert done.returncode != 0
    assert "spark-under-test: 1 setting(s) to correct; nothing was touched" in done.stdout
    assert "unknown profile: reap_profile is 'k145'" in done.stdout
    assert "unreachable=0" in done.stdout


def test_with_an_unknown_profile_everything_else_is_said_too(tmp_path: Path) -> None:
    wrong = {"reap_profile": "k145", "reap_port": "http", "watchdog_floor_kb": "8G", "verify_sute": "quick"}
    done = preflight(tmp_path, "-e", json.dumps(wrong))
    assert "spark-under-test: 4 setting(s) to correct; nothing was touched" in done.stdout
    for words in ("unknown profile", "'http', wanted a TCP port", "'8G', wanted int", "did you mean verify_suite"):
        assert words in done.stdout


def test_batches_in_an_inventory_are_refused_because_they_would_have_no_effect(tmp_path: Path) -> None:
    done = preflight(tmp_path, variables="reap_serial: 1")
    assert done.returncode != 0
    assert "reap_serial is set in the inventory, where it has no effect" in done.stdout
    assert "give it with -e" in done.stdout


@pytest.mark.parametrize("value", [1, "1", "25%", [1, "50%"], ["1", 5, "100%"]])
def test_batches_that_ansible_can_use_are_good(value: object) -> None:
    assert serial_fault(value) is None


@pytest.mark.parametrize("value", [0, -1, "0", "some", "", "%", "12.5%", True, [], [1, "some"], "[1, 2]", None, {}])
def test_batches_that_ansible_cannot_use_are_named(value: object) -> None:
    fault = serial_fault(value)
    assert fault is not None
    assert repr(value) in fault


def test_good_settings_reach_the_host_and_an_unreachable_one_is_named(tmp_path: Path) -> None:
    done = preflight(tmp_path)
    assert done.returncode != 0
    assert "unreachable=1" in done.stdout
    assert "check ansible_host, the network and the SSH key" in done.stdout


def test_a_setting_may_be_made_of_a_default_that_only_its_role_knows(tmp_path: Path) -> None:
    done = preflight(tmp_path, "-e", "model_fetch_dest={{ model_fetch_models_dir }}/x", playbook="model.yml")
    assert "unreachable=1" in done.stdout, done.stdout


def test_a_secret_is_not_shown_in_an_error(tmp_path: Path) -> None:
    done = preflight(tmp_path, "-e", '{"model_fetch_token": ["s3cr3t-t0ken"]}')
    assert "s3cr3t-t0ken" not in done.stdout + done.stderr
