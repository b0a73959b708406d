"""Filters of the verification."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

# On the controller Ansible does not put the configured module_utils on the import path; modules get it by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))
from reap.errors import ReapError
from reap.verify.profile import settings_for

DOCUMENTATION = r"""
name: reap_verify_settings
short_description: The settings of a profile's verification
description: A profile becomes the content of /etc/reap/verify.json; bad values are one clear error.
options:
  _input:
    description: The profile, an entry of reap_profiles.
    type: dict
    required: true
  name:
    description: The profile's name.
    type: str
    required: true
  given:
    description: Settings that win over the profile's; a value of none is not given.
    type: dict
    required: true
"""


def reap_verify_settings(profile: dict[str, Any], name: str, given: dict[str, Any]) -> dict[str, Any]:
    """See reap.verify.profile.settings_for."""
    try:
        return settings_for(name, _plain(profile), _plain(given))
    except ReapError as error:
        raise AnsibleFilterError(str(error)) from error


def _plain(value: Any) -> Any:
    """The same data in plain containers: Ansible's own evaluate their items late and cannot be copied by type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class FilterModule:
    """Names of the filters."""

    def filters(self) -> dict[str, Any]:
        return {"reap_verify_settings": reap_verify_settings}
