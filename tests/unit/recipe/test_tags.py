"""Every role and every step has its tag in every playbook, and production can read every playbook.

A tag that selects nothing is a green run that did nothing, which nobody notices.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
IMPORT = "ansible.builtin.import_role"
PLAYBOOKS = ["site.yml", *(f"playbooks/{path.name}" for path in sorted((ROOT / "playbooks").glob("*.yml")))]
# What a playbook does beside roles, with the tag of it.
OWN_TAGS = {"playbooks/preflight.yml": {"memory"}, "playbooks/status.yml": {"status"}}


def load(path: Path) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def ansible(*arguments: str) -> str:
    """What ansible-playbook says of playbooks without running them; one process for all, because each start costs."""
    program = str(Path(sys.executable).parent / "ansible-playbook")
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    environment |= {"LC_ALL": "C.UTF-8"}
    command = [program, "-i", "inventories/production", "-l", "spark-2822", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@functools.cache
def tasks_of_all() -> dict[str, list[tuple[str, set[str]]]]:
    """Every task of every playbook with its tags, as --list-tasks shows them."""
    _, *parts = re.split(r"^playbook: (.+)$", ansible("--list-tasks", *PLAYBOOKS), flags=re.MULTILINE)
    found = {}
    for playbook, text in zip(parts[::2], parts[1::2], strict=True):
        lines = re.findall(r"^ {6}(.+?)\tTAGS: \[(.*)\]$", text, re.MULTILINE)
        found[playbook] = [(name, set(tags.split(", ")) - {""}) for name, tags in lines]
    return found


def tasks(playbook: str) -> list[tuple[str, set[str]]]:
    """Every task of a playbook with its tags."""
    return tasks_of_all()[playbook]


def wanted_tags(playbook: str) -> Iterator[tuple[str, str]]:
    """Role and tag: the role's own, and one for each step that the playbook takes of it."""
    path = ROOT / playbook
    for play in load(path):
        if "ansible.builtin.import_playbook" in play:
            yield from wanted_tags(str((path.parent / play["ansible.builtin.import_playbook"]).relative_to(ROOT)))
        imported = [task[IMPORT] for task in play.get("tasks", []) if IMPORT in task]
        for role in [*({"name": entry["role"]} for entry in play.get("roles", [])), *imported]:
            name, step = role["name"], role.get("tasks_from")
            yield name, name
            for task in load(ROOT / "roles" / name / "tasks" / "main.yml") if step is None else []:
                step_file = task.get("ansible.builtin.import_tasks")
                if step_file:
                    yield name, f"{name}_{step_file.removesuffix('.yml')}"
            if step not in (None, "wait"):
                yield name, f"{name}_{step}"


WANTED = sorted({(playbook, role, tag) for playbook in PLAYBOOKS for role, tag in wanted_tags(playbook)})


def test_the_cases_below_are_all_there() -> None:
    assert len(WANTED) > 60
    for case in (
        ("playbooks/teardown.yml", "reap_service", "reap_service"),
        ("playbooks/teardown.yml", "watchdog", "watchdog_remove"),
        ("playbooks/start.yml", "reap_service", "reap_service_start"),
        ("site.yml", "model_fetch", "model_fetch_run"),
    ):
        assert case in WANTED


@pytest.mark.parametrize(("playbook", "role", "tag"), WANTED)
def test_a_tag_selects_the_tasks_of_its_role(playbook: str, role: str, tag: str) -> None:
    chosen = [name for name, tags in tasks(playbook) if tag in tags]
    assert any(name.startswith(f"{role} : ") for name in chosen), chosen


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_no_task_is_without_a_tag_and_the_settings_are_judged_first_with_every_tag(playbook: str) -> None:
    found = tasks(playbook)
    assert [name for name, tags in found if not tags] == []
    assert found[0] == ("Every setting is valid", {"always"})


@pytest.mark.parametrize("playbook", OWN_TAGS)
def test_what_is_no_role_has_a_tag_too(playbook: str) -> None:
    assert OWN_TAGS[playbook] <= set().union(*(tags for _, tags in tasks(playbook)))


def test_tags_choose_as_the_list_says() -> None:
    said = ansible("playbooks/teardown.yml", "--list-tasks", "--tags", "watchdog_remove")
    assert "watchdog : The watchdog runs no more" in said
    assert "reap_service : " not in said


def test_every_playbook_can_be_read_with_the_production_inventory() -> None:
    said = ansible("--syntax-check", *PLAYBOOKS)
    assert re.findall(r"^playbook: (.+)$", said, re.MULTILINE) == PLAYBOOKS
