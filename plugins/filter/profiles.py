"""Filters that turn a profile into what runs: vLLM's argument list, the container's environment, the service's file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ansible.errors import AnsibleFilterError

# On the controller Ansible does not put the configured module_utils on the import path; modules get it by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))
from reap.errors import ReapError
from reap.profiles import Profile, container_environment, vllm_arguments
from reap.serve.config import service_settings

T = TypeVar("T")

DOCUMENTATION = """
name: reap_vllm_args
short_description: A profile as vLLM's argument list, as a container environment, as the file of reap.service
version_added: "0.1.0"
description:
  - C(reap_vllm_args) gives what follows C(vllm serve).
  - C(reap_container_env) gives the environment of the container, without secrets.
  - C(reap_service_config) gives the content of /etc/reap/service.json.
options:
  _input:
    description: One entry of C(reap_profiles); for C(reap_service_config) the settings of role reap_service.
    type: dict
    required: true
"""

EXAMPLES = """
arguments: "{{ reap_profile_data | reap_vllm_args(reap_model_dir, '127.0.0.1', 8000) }}"
"""


def reap_vllm_args(profile: Any, model_dir: str, host: str, port: int, name: str = "profile") -> list[str]:
    """Arguments after ``vllm serve``; see :func:`reap.profiles.vllm_arguments`."""
    return _told(
        lambda: vllm_arguments(Profile.from_mapping(_plain(profile), name), model_dir=model_dir, host=host, port=port)
    )


def reap_container_env(profile: Any, cache_dir: str, name: str = "profile") -> dict[str, str]:
    """Environment of the container; see :func:`reap.profiles.container_environment`."""
    return _told(lambda: container_environment(Profile.from_mapping(_plain(profile), name), cache_dir=cache_dir))


def reap_service_config(settings: Any) -> dict[str, Any]:
    """Content of the service's file; see :func:`reap.serve.config.service_settings`."""
    return _told(lambda: service_settings(_plain(settings)))


def _plain(value: Any) -> Any:
    """The same data in plain containers: Ansible's own evaluate their items late and cannot be copied by type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _told(work: Callable[[], T]) -> T:
    try:
        return work()
    except ReapError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The filters by name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "reap_vllm_args": reap_vllm_args,
            "reap_container_env": reap_container_env,
            "reap_service_config": reap_service_config,
        }
