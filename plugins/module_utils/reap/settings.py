"""Settings that belong to a run or to the host's programs and not to one role. Pure judgement, no file is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .schema import shown

# What a playbook itself reads, in the form of a role's argument specs; tools/variables.py writes the page from it.
RUN_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "reap_serial": {
        "type": "raw",
        "default": "100%",
        "description": (
            "On how many hosts the service is restarted at the same time: a number, a percentage or a list of them. "
            "Only with -e: Ansible reads it before any variable of the inventory."
        ),
    },
    "teardown_models": {
        "type": "bool",
        "default": False,
        "description": "A teardown removes the models too, every revision of them.",
    },
    "teardown_evidence": {
        "type": "bool",
        "default": False,
        "description": "A teardown removes the evidence on the host too: verifications, kills of the watchdog, wedges.",
    },
}

# Programs on the host, and the unit's RuntimeDirectory, know the folder by this path without being told.
RUN_DIR = "/run/reap"
_RUN_DIR_NAMES = ("reap_run_dir", "reap_service_run_dir", "watchdog_run_dir", "verify_run_dir")

_BATCH = re.compile(r"[1-9][0-9]*%?")


def serial_fault(value: object) -> str | None:
    """What is wrong with a value of ``reap_serial``, in one sentence; nothing where Ansible can use it."""
    batches = value if isinstance(value, list) else [value]
    if batches and all(not isinstance(batch, bool) and _BATCH.fullmatch(str(batch)) for batch in batches):
        return None
    return (
        f"reap_serial is {shown(value)}, wanted a number from 1, a percentage such as 25%, or a list of them: "
        """-e reap_serial=2, or -e '{"reap_serial": [1, "25%"]}'"""
    )


def run_dir_faults(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting that puts the folder of running state elsewhere.

    Args:
        values: setting -> its value, of those that are given.
    """
    return [
        f"{name} is {values[name]!r}, wanted {RUN_DIR}: programs on the host know it by this path; take it out of the "
        "inventory"
        for name in _RUN_DIR_NAMES
        if name in values and str(values[name]).rstrip("/") != RUN_DIR
    ]
