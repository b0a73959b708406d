"""Write docs/variables.md from the roles' argument specs and group_vars/all, so that the page cannot be out of date.

python3 tools/variables.py           write the page
python3 tools/variables.py --check   exit 1 when it differs from what would be written
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "plugins" / "module_utils"))
from reap.settings import RUN_OPTIONS

PAGE = ROOT / "docs" / "variables.md"
# In the order of a run.
ROLES = ("spark_host", "runtime_image", "model_fetch", "vllm_patches", "watchdog", "reap_service", "verify")
HEAD = """# Variables

Written by `make docs` from `roles/*/meta/argument_specs.yml` and `group_vars/all/main.yml`; do not edit by hand.

Set a variable for all Sparks, a group or a host in the inventory (`inventories/production`): whatever an inventory says
wins over `group_vars/all` of this repository and over the roles' defaults. A misspelt name or a value of the wrong type
is an error of every playbook before a host is touched.
"""


def cell(value: Any) -> str:
    """A value for a cell of a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return " ".join(text.split()).replace("|", "\\|")


def description(option: dict[str, Any]) -> str:
    text = option["description"]
    return cell(text if isinstance(text, str) else " ".join(text))


def role_table(role: str) -> list[str]:
    """The section of one role."""
    path = ROOT / "roles" / role / "meta" / "argument_specs.yml"
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"]["main"]
    defaults = yaml.safe_load((ROOT / "roles" / role / "defaults" / "main.yml").read_text(encoding="utf-8")) or {}
    lines = [f"## {role}", "", f"{spec['short_description']}.", "", "| variable | type | default | what it is |"]
    lines.append("|---|---|---|---|")
    for name, option in sorted((spec.get("options") or {}).items()):
        kind = option["type"] + (f" of {option['elements']}" if "elements" in option else "")
        if "choices" in option:
            kind += ": " + ", ".join(str(choice) for choice in option["choices"])
        value = "(secret)" if option.get("no_log") else cell(defaults.get(name))
        lines.append(f"| `{name}` | {kind} | `{value}` | {description(option)} |")
    return [*lines, ""]


def shared_table() -> list[str]:
    """The section of group_vars/all/main.yml: every variable with the comment above it."""
    lines = ["## Shared by all roles", "", "| variable | default | what it is |", "|---|---|---|"]
    text = (ROOT / "group_vars" / "all" / "main.yml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    comment: list[str] = []
    for line in text.splitlines():
        name = line.split(":")[0]
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
        elif not line.strip():
            comment = []
        elif name in values:
            lines.append(f"| `{name}` | `{cell(values[name])}` | {cell(' '.join(comment))} |")
    return [*lines, ""]


def run_table() -> list[str]:
    """The section of what a playbook itself reads."""
    lines = ["## Given to a run", "", "What a playbook itself reads, with `-e`.", ""]
    lines += ["| variable | type | default | what it is |", "|---|---|---|---|"]
    for name, option in RUN_OPTIONS.items():
        lines.append(f"| `{name}` | {option['type']} | `{cell(option['default'])}` | {description(dict(option))} |")
    return [*lines, ""]


def page() -> str:
    lines = [HEAD, *shared_table(), *run_table()]
    for role in ROLES:
        lines += role_table(role)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            print(f"{PAGE.relative_to(ROOT)} is out of date: run `make docs`", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
