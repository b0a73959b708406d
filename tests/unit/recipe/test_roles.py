"""What every role promises: the same keys in defaults and argument specs, documented, and none of them private."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())


def options(role: str) -> dict[str, Any]:
    specs = yaml.safe_load((ROOT / "roles" / role / "meta" / "argument_specs.yml").read_text(encoding="utf-8"))
    found: dict[str, Any] = specs["argument_specs"]["main"].get("options") or {}
    return found


def defaults(role: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "roles" / role / "defaults" / "main.yml").read_text(encoding="utf-8")) or {}


def test_the_recipe_has_its_roles() -> None:
    assert set(ROLES) == {
        "spark_host",
        "runtime_image",
        "vllm_patches",
        "model_fetch",
        "reap_service",
        "watchdog",
        "verify",
    }


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_argument_specs_have_the_same_keys(role: str) -> None:
    assert set(defaults(role)) == set(options(role))


@pytest.mark.parametrize("role", ROLES)
def test_every_option_carries_the_roles_prefix_a_type_and_a_description(role: str) -> None:
    for name, option in options(role).items():
        assert name.startswith(f"{role}_"), name
        assert option.get("type"), name
        assert option.get("description"), name


@pytest.mark.parametrize("role", ROLES)
def test_every_default_is_explained_in_the_defaults_file(role: str) -> None:
    lines = (ROOT / "roles" / role / "defaults" / "main.yml").read_text(encoding="utf-8").splitlines()
    text_above: set[str] = set()
    commented = False
    for line in lines:
        if line.startswith("#"):
            commented = True
        elif not line.strip():
            commented = False
        elif line[0] not in " -" and ":" in line and commented:
            text_above.add(line.split(":")[0])
    assert set(defaults(role)) <= text_above


@pytest.mark.parametrize("role", ROLES)
def test_main_names_steps_only_and_tags_each(role: str) -> None:
    tasks = yaml.safe_load((ROOT / "roles" / role / "tasks" / "main.yml").read_text(encoding="utf-8"))
    steps = [step for task in tasks for step in ([*task["block"], *task["always"]] if "block" in task else [task])]
    for task in steps:
        assert {"ansible.builtin.import_tasks", "ansible.builtin.include_tasks"} & set(task), task["name"]
        assert any(str(tag).startswith(role) for tag in task.get("tags", [])), task["name"]


@pytest.mark.parametrize("role", ROLES)
def test_every_role_has_a_readme(role: str) -> None:
    assert (ROOT / "roles" / role / "README.md").is_file()


def test_the_page_of_variables_is_the_one_that_make_docs_writes() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "variables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
