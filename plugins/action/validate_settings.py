"""Check every setting of a host before the host is touched."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError, AnsibleUndefinedVariable
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.utils.vars import load_extra_vars

# On the controller Ansible does not put the configured module_utils on the import path; modules get it by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))
from reap.errors import ReapError
from reap.profiles import Profile
from reap.settings import RUN_OPTIONS, run_dir_faults, serial_fault

DOCUMENTATION = r"""
module: validate_settings
short_description: Check every setting of a host before the host is touched
description:
  - Compares the host's variables with the argument specs of all roles, with group_vars/all and with what a playbook
    itself reads, on the controller only.
  - A name that starts like one of these and is none is an error with the nearest known name.
  - A value of the wrong type or outside its choices is an error that says what was found and what is wanted.
  - All problems are reported at once.
options: {}
"""

ROOT = Path(__file__).resolve().parents[2]
# Names that belong to the test bed's inventory.
INVENTORY_PREFIXES = ("reap_sim_",)
# The parser in C, where this Python has it: a run waits for these files.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def role_options(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Every role's options by role name, from meta/argument_specs.yml."""
    options = {}
    for path in sorted(root.glob("roles/*/meta/argument_specs.yml")):
        specs = yaml.load(path.read_text(encoding="utf-8"), LOADER)["argument_specs"]
        options[path.parts[-3]] = specs["main"].get("options") or {}
    return options


def shared_names(root: Path) -> set[str]:
    """Names that group_vars/all defines."""
    names: set[str] = set()
    for path in sorted(root.glob("group_vars/all/*.yml")):
        names |= set(yaml.load(path.read_text(encoding="utf-8"), LOADER) or {})
    return names


def unknown_names(names: set[str], roles: dict[str, dict[str, dict[str, Any]]], shared: set[str]) -> list[str]:
    """A sentence for each name that looks like one of the recipe's settings and is none."""
    known = shared.union(RUN_OPTIONS, *[set(options) for options in roles.values()])
    prefixes = (*(f"{role}_" for role in roles), "reap_", "teardown_")
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
        known_profile = isinstance(profile, str) and profile in profiles
        if known_profile:
            problems += self._profile_faults(task_vars, profile)
        else:
            near = difflib.get_close_matches(str(profile), profiles, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            problems.append(
                f"unknown profile: reap_profile is {profile!r}, wanted one of {', '.join(profiles)}: {hint}"
                "a profile is a key of reap_profiles in group_vars/all/profiles.yml"
            )

        values: dict[str, Any] = {}
        defaults = set().union(*roles.values())
        for name in sorted(task_vars.keys() & {"reap_port", "reap_run_dir"}.union(RUN_OPTIONS, *roles.values())):
            try:
                values[name] = self._templar.template(task_vars[name])
            except AnsibleUndefinedVariable as error:
                # A default is known within its role alone: there the role's own check judges what is made of it.
                missing = re.search(r"'(\w+)' is undefined", str(error))
                if known_profile and not (missing and missing[1] in defaults):
                    problems.append(f"{name} cannot be evaluated: {error}")
            except AnsibleError as error:
                # What cannot be evaluated for want of a profile is no problem of its own.
                if known_profile:
                    problems.append(f"{name} cannot be evaluated: {error}")
        for options in roles.values():
            problems += wrong_values(values, options)
        problems += wrong_values(values, {name: dict(option) for name, option in RUN_OPTIONS.items()})
        problems += run_dir_faults(values) + self._serial_faults(values)
        port = values.get("reap_port", 1)
        if not re.fullmatch(r"\d+", str(port)) or not 1 <= int(str(port)) <= 65535:
            problems.append(f"reap_port is {port!r}, wanted a TCP port from 1 to 65535: correct it in the inventory")

        result["changed"] = False
        if problems:
            result["failed"] = True
            result["msg"] = f"{host}: {len(problems)} setting(s) to correct; nothing was touched.\n- " + "\n- ".join(
                problems
            )
        return result

    def _profile_faults(self, task_vars: dict[str, Any], profile: str) -> list[str]:
        """What is wrong with the data of the profile, after all that an inventory changes in it."""
        try:
            Profile.from_mapping(self._templar.template(task_vars["reap_profile_data"]), profile)
        except ReapError as error:
            return [str(error)]
        except AnsibleError as error:
            return [f"profile {profile} cannot be evaluated: {error}"]
        return []

    def _serial_faults(self, values: dict[str, Any]) -> list[str]:
        """What is wrong with the batches; from an inventory they would have no effect, and nobody would notice."""
        if "reap_serial" not in values:
            return []
        if "reap_serial" not in load_extra_vars(self._loader):
            return [
                "reap_serial is set in the inventory, where it has no effect, because Ansible makes the batches before "
                "it reads a host's variables: take it out there, and give it with -e reap_serial=..."
            ]
        fault = serial_fault(values["reap_serial"])
        return [fault] if fault else []
