"""Filters that several roles and playbooks share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

# On the controller Ansible does not put the configured module_utils on the import path; modules get it by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))
from reap.errors import ReapError
from reap.identity import host_problems

DOCUMENTATION = r"""
name: reap_host_problems
short_description: What a host has that its expectations do not allow
description: One sentence for each expectation that the host's facts do not meet; an empty list when all are met.
options:
  _input:
    description: What the module spark_facts returned.
    type: dict
    required: true
  expect:
    description: The expectations, as role spark_host documents them.
    type: dict
    required: true
"""


def reap_repository(folder: str) -> str:
    """The root of this repository, seen from any folder in it: the nearest parent that holds ansible.cfg."""
    start = Path(folder).resolve()
    for candidate in (start, *start.parents):
        if (candidate / "ansible.cfg").is_file():
            return str(candidate)
    raise AnsibleFilterError(
        f"no ansible.cfg in {folder} or above it: run the playbooks from a clone of the repository"
    )


def reap_host_problems(facts: dict[str, Any], expect: dict[str, Any]) -> list[str]:
    """See reap.identity.host_problems."""
    try:
        return host_problems(facts, expect)
    except ReapError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """Names of the filters."""

    def filters(self) -> dict[str, Any]:
        return {"reap_repository": reap_repository, "reap_host_problems": reap_host_problems}
