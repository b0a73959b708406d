"""mitogen_linear, with what this recipe's modules need of it and mitogen 0.3.54 lacks.

Mitogen follows only absolute imports of ansible.module_utils, so relatively imported parts of `reap` would stay on the
controller; and a module's arguments may hold dates, as YAML reads them, which Ansible itself sends as text.
"""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ansible_mitogen.loaders
import ansible_mitogen.module_finder
import ansible_mitogen.planner
import ansible_mitogen.strategy

PACKAGE = "ansible.module_utils.reap"

# name, path, whether it is a package
Part = tuple[str, str, bool]


def imported(name: str, path: Path, package: bool) -> set[str]:
    """Full names that a module imports relatively; some name a thing in a module instead of a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = name.split(".")
            base = parents[: len(parents) - node.level + package]
            base += node.module.split(".") if node.module else []
            for full in ([*base, alias.name] for alias in node.names):
                # A package is imported before its parts.
                names |= {".".join(full[:length]) for length in range(len(PACKAGE.split(".")), len(full) + 1)}
    return names


def find(name: str, root: Path) -> Part | None:
    """The file of a module of the package in `root`."""
    place = root.joinpath(*name.removeprefix(PACKAGE).strip(".").split("."))
    if (place / "__init__.py").exists():
        return name, str(place / "__init__.py"), True
    beside = place.with_suffix(".py")
    return (name, str(beside), False) if beside.exists() else None


def with_relative_imports(parts: list[Part]) -> list[Part]:
    """The parts, and those of `reap` that they import relatively."""
    found = {part[0]: part for part in parts}
    if PACKAGE not in found:
        return parts
    root = Path(found[PACKAGE][1]).parent
    queue = [part for part in parts if part[0].startswith(PACKAGE)]
    while queue:
        name, path, package = queue.pop()
        for other in imported(name, Path(path), package):
            part = found.get(other) or find(other, root)
            if part and other not in found:
                found[other] = part
                queue.append(part)
    return sorted(found.values())


_scan = ansible_mitogen.module_finder.scan


@functools.wraps(_scan)
def _scan_all(*arguments: Any, **named: Any) -> list[Part]:
    return with_relative_imports(_scan(*arguments, **named))


if not hasattr(_scan, "__wrapped__"):
    ansible_mitogen.module_finder.scan = _scan_all
    ansible_mitogen.planner.json = SimpleNamespace(
        **{**vars(json), "dumps": functools.partial(json.dumps, default=str)}
    )

_Linear: Any = ansible_mitogen.loaders.strategy_loader.get("linear", class_only=True)


class StrategyModule(ansible_mitogen.strategy.StrategyMixin, _Linear):  # type: ignore[misc]
    """Named for Ansible's plugin loader."""
