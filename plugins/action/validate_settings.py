"""Check every setting of a host before the host is touched."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase

# On the controller Ansible does not put the configured module_utils on the import path; modules get it by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))
from reap.errors import ReapError
from reap.profiles import Profile

DOCUMENTATION = r"""
module: validate_settings
short_description: Check every setting of a host before the host is touched
description:
  - Compares the host's variables with the argument specs of all roles and with group_vars/all, on the controller only.
  - A name that starts like a role's variable and is none is an error with the nearest known name.
  - A value of the wrong type or outside its choices is an error that says what was found and what is wanted.
  - All problems are reported at once.
options: {}
"""

ROOT = Path(__file__).resolve().parents[2]
# Names that belong to the test bed's inventory.
INVENTORY_PREFIXES = ("reap_sim_",)
# Names that are given with -e and belong to a playbook, not to a role.
RUN_NAMES = {"reap_serial"}


def role_options(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Every role's options by role name, from meta/argument_specs.yml."""
    options = {}
    for path in sorted(root.glob("roles/*/meta/argument_specs.yml")):
        specs = yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"]
        options[path.parts[-3]] = specs["main"].get("options") or {}
    return options


def shared_names(root: Path) -> set[str]:
    """Names that group_vars/all defines."""
    names: set[str] = set()
    for path in sorted(root.glob("group_vars/all/*.yml")):
        names |= set(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    return names


def unknown_names(names: set[str], roles: dict[str, dict[str, dict[str, Any]]], shared: set[str]) -> list[str]:
    """A sentence for each name that looks like one of the recipe's settings and is none."""
    known = shared.union(RUN_NAMES, *[set(options) for options in roles.values()])
    prefixes = (*(f"{role}_" for role in roles), "reap_")
    problems = []
    for name in sorted(names):
        if not name.startswith(prefixes) or name in known or name.startswith(INVENTORY_PREFIXES):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see docs/variables.md for the known ones"
        problems.append(f"unknown setting {name}: {hint}")
    return problems


def _plain_spec(option: dict[str, Any]) -> dict[str, Any]:
    """The parts of an option that ArgumentSpecValidator takes."""
    kept = ("type", "elements", "choices", "required", "no_log")
    spec = {key: option[key] for key in kept if key in option}
    spec["required"] = False  # a setting that is not given has the role's default
    if "options" in option:
        spec["options"] = {name: _plain_spec(value) for name, value in option["options"].items()}
    return spec


def wrong_values(values: dict[str, Any], options: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each value that is not what its option wants."""
    problems = []
    for name, option in options.items():
        if name not in values or values[name] is None:
            continue
        outcome = ArgumentSpecValidator({name: _plain_spec(option)}).validate({name: values[name]})
        if not outcome.error_messages:
            continue
        shown = "(secret)" if option.get("no_log") else repr(values[name])
        wanted = option.get("type", "str")
        choices = option.get("choices")
        if choices:
            wanted = "one of " + ", ".join(str(choice) for choice in choices)
        meaning = option.get("description", "")
        meaning = meaning if isinstance(meaning, str) else " ".join(meaning)
        first_sentence = re.split(r"(?<=\.)\s", meaning.strip())[0]
        problems.append(f"{name} is {shown}, wanted {wanted}: {first_sentence}")
    return problems


class ActionModule(ActionBase):
    """Runs on the controller only."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        host = task_vars["inventory_hostname"]
        roles = role_options(ROOT)
        problems = unknown_names(set(task_vars), roles, shared_names(ROOT))

        profiles = task_vars.get("reap_profiles") or {}
        profile = self._templar.template(task_vars.get("reap_profile"))
        if profile not in profiles:
            near = difflib.get_close_matches(str(profile), profiles, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            problems.append(
                f"unknown profile: reap_profile is {profile!r}, wanted one of {', '.join(profiles)}: {hint}"
                "a profile is a key of reap_profiles in group_vars/all/profiles.yml"
            )
        else:
            try:
                Profile.from_mapping(self._templar.template(task_vars["reap_profile_data"]), profile)
            except ReapError as error:
                problems.append(str(error))
            except AnsibleError as error:
                problems.append(f"profile {profile} cannot be evaluated: {error}")
            for options in roles.values():
                values = {}
                for name in options:
                    if name not in task_vars:
                        continue
                    try:
                        values[name] = self._templar.template(task_vars[name])
                    except AnsibleError as error:
                        problems.append(f"{name} cannot be evaluated: {error}")
                problems += wrong_values(values, options)
            port = self._templar.template(task_vars.get("reap_port"))
            if not re.fullmatch(r"\d+", str(port)) or not 1 <= int(port) <= 65535:
                problems.append(
                    f"reap_port is {port!r}, wanted a TCP port from 1 to 65535: correct it in the inventory"
                )

        result["changed"] = False
        if problems:
            result["failed"] = True
            result["msg"] = f"{host}: {len(problems)} setting(s) to correct; nothing was touched.\n- " + "\n- ".join(
                problems
            )
        return result
