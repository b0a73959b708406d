"""Gives testinfra the hosts of the scenario whose tests run: over SSH with checked host keys, as root.

`molecule verify` runs the tests in the scenario's folder. By hand: `cd molecule/<scenario> && pytest tests`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Fills in what was not given on the command line."""
    inventory = Path.cwd() / "inventory" / "hosts.yml"
    if config.option.hosts is None and inventory.exists():
        hosts = yaml.safe_load(inventory.read_text())["sparks"]["hosts"]
        # A machine that computes for a model answers late.
        config.option.hosts = ",".join(f"ssh://{name}?timeout=120" for name in hosts)
        config.option.ssh_config = str(REPOSITORY / ".cache" / "sim" / "ssh_config")
        config.option.sudo = True
