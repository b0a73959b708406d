"""Several hosts: a group, batches, and failures that stay where they happen.

The order matters: each test begins with what the one before left, all three hosts serving.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import testinfra

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = Path(__file__).resolve().parents[1]
HOSTS = ("reap-fleet-1", "reap-fleet-2", "reap-fleet-3")
FIRST, SECOND, THIRD = HOSTS
# Makes another generation of the service.
ANOTHER_LIMIT = {"stack": "16777216"}


def site(*arguments: str) -> tuple[int, dict[str, str], str]:
    """Run site.yml. Returns its exit status, its last lines by host, and all that it said."""
    # Molecule's own settings would point Ansible at another inventory and colour what is read here.
    unwanted = ("MOLECULE_", "ANSIBLE_", "FORCE_COLOR", "PY_COLORS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environment |= {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "REAP_PROGRESS": "log"}
    inventories = ["-i", str(ROOT / "molecule" / "shared" / "inventory"), "-i", str(SCENARIO / "inventory")]
    command = [str(Path(sys.executable).parent / "ansible-playbook"), *inventories, "site.yml"]
    command += ["--skip-tags", "runtime_image,vllm_patches,verify", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout[done.stdout.index("HOSTS **") :].splitlines()[1:]
    return done.returncode, {line.split()[0]: line for line in lines if line.startswith("reap-fleet")}, done.stdout


def setting(**values: Any) -> list[str]:
    """The same settings for all hosts, as -e takes them; a text may be a template that looks at inventory_hostname."""
    return ["-e", json.dumps(values)]


def run(name: str, command: str) -> str:
    host = testinfra.get_host(f"ssh://{name}", ssh_config=str(ROOT / ".cache/sim/ssh_config"), sudo=True)
    return str(host.check_output(command))


def served(name: str) -> str:
    """The generation that the host serves, and all that changes when something of it is touched."""
    return run(
        name,
        "docker inspect -f '{{index .Config.Labels \"reap.generation\"}} {{.Id}} {{.State.StartedAt}}' reap-model"
        " && curl -sf http://127.0.0.1:8000/v1/models"
        " && sha256sum /etc/reap/* /opt/reap/bin/reap /etc/systemd/system/reap*.service",
    )


def down_time(name: str) -> tuple[int, int]:
    """When the service was last left and entered again, µs of the clock that all simulated hosts share."""
    names = ("ActiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    out, up = (int(run(name, f"systemctl show --value -p {entry} reap.service")) for entry in names)
    return out, up


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """What every host serves; each test brings it up to date."""
    return {name: served(name) for name in HOSTS}


def now(before: dict[str, str]) -> list[str]:
    """The hosts that serve something else than before, which is then remembered."""
    found = {name: served(name) for name in HOSTS}
    changed = [name for name in HOSTS if found[name] != before[name]]
    before.update(found)
    return changed


def test_a_group_in_batches_is_touched_alone_and_one_host_after_the_other(before: dict[str, str]) -> None:
    status, lines, said = site("-l", "broad", "-e", "reap_serial=1", *setting(reap_service_ulimits=ANOTHER_LIMIT))
    assert status == 0, said[-3000:]
    assert list(lines) == [SECOND, THIRD]
    assert all(" ok " in line for line in lines.values())
    assert now(before) == [SECOND, THIRD]
    (_, back), (away, _) = sorted(down_time(name) for name in (SECOND, THIRD))
    assert back < away


def test_a_host_that_fails_keeps_what_it_serves_and_stops_no_other(before: dict[str, str]) -> None:
    """The first fails on the way, the second before it is touched; the third gets the other model."""
    status, lines, said = site(
        *("-e", "reap_serial=1", "-e", "reap_sim_model=sim/no-needle"),
        *setting(
            reap_service_ulimits=ANOTHER_LIMIT,
            model_fetch_reserve_bytes=f"{{{{ 900000000000000 if inventory_hostname == '{FIRST}' else 1000000000 }}}}",
            spark_host_expect_architecture=f"{{{{ 'aarch64' if inventory_hostname == '{SECOND}' else 'x86_64' }}}}",
        ),
    )
    assert status != 0
    assert "FAILED" in lines[FIRST], said[-3000:]
    assert "free; wanted" in lines[FIRST]
    assert "FAILED  changed=0 " in lines[SECOND]
    assert "architecture is x86_64" in lines[SECOND]
    assert " ok " in lines[THIRD]
    assert now(before) == [THIRD]


def test_an_unreachable_host_is_named_and_stops_no_other(before: dict[str, str]) -> None:
    address = f"{{{{ 'nowhere.invalid' if inventory_hostname == '{SECOND}' else inventory_hostname }}}}"
    status, lines, said = site("--tags", "spark_host", *setting(ansible_host=address))
    assert status != 0
    assert "unreachable" in lines[SECOND], said[-3000:]
    assert "check ansible_host" in lines[SECOND]
    assert " ok " in lines[FIRST]
    assert " ok " in lines[THIRD]
    assert now(before) == []


def test_a_batch_that_fails_keeps_the_next_from_being_restarted(before: dict[str, str]) -> None:
    generations = {name: before[name].split()[0] for name in HOSTS}
    status, lines, said = site("-e", "reap_serial=1", "-e", "reap_service_entrypoint=/usr/bin/dash")
    assert status != 0
    assert "FAILED" in lines[FIRST], said[-3000:]
    assert "did not serve: the container ended" in lines[FIRST]
    assert "serves again" in said
    for name in (SECOND, THIRD):
        assert "HELD" in lines[name]
        assert "Serve was not begun" in lines[name]
    # The first went back to what it had served by itself; the model was loaded anew for that.
    assert now(before) == [FIRST]
    assert {name: before[name].split()[0] for name in HOSTS} == generations
