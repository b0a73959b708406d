"""Name of the patched runtime image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

# On the controller Ansible does not put the configured module_utils on the import path; modules get it by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))
from reap.errors import ReapError
from reap.images.naming import image_name, patch_set

DOCUMENTATION = r"""
name: reap_patched_image
short_description: Name of the patched image made of a base image
description:
  - C(reap-runtime:<base>-<patch set>), 12 hex digits each. A function of the base's identity, of the patches in this
    repository and of the router variant alone, so every host and every role gets the same name without asking.
options:
  _input:
    description: The base's digest (C(sha256:...)), or any reference to it.
    type: str
    required: true
  router:
    description: Router variant.
    type: str
    choices: [torch, padded]
    default: torch
"""


def reap_patched_image(identity: str, router: str = "torch") -> str:
    """See reap.images.derived.image_name."""
    try:
        return image_name(str(identity), str(router))
    except ReapError as error:
        raise AnsibleFilterError(str(error)) from error


def reap_patch_set(router: str = "torch") -> str:
    """See reap.images.naming.patch_set."""
    try:
        return patch_set(str(router))
    except ReapError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """Names of the filters."""

    def filters(self) -> dict[str, Any]:
        return {"reap_patched_image": reap_patched_image, "reap_patch_set": reap_patch_set}
