"""Draw a host's memory ledger on the controller: a page, and the result as JSON beside it. Nothing is asked of the
host."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

# Ansible does not put the repository on the controller's import path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pages import write

DOCUMENTATION = r"""
module: memory_page
short_description: Draw a host's memory ledger on the controller
description:
  - Writes C(memory.html) and C(memory.json) into a folder of the controller from the result of M(memory_fit).
  - They record what was found, so writing them is no change of the host and never reported as one.
options:
  fit:
    description: What M(memory_fit) returned.
    type: dict
    required: true
  folder:
    description: Folder on the controller, one for each host; made if missing.
    type: path
    required: true
"""

# What belongs to the task that was run, not to the answer.
_OF_THE_TASK = ("changed", "failed", "invocation", "warnings", "deprecations", "msg")


class ActionModule(ActionBase):
    """Draw and write."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {"fit": {"type": "dict", "required": True}, "folder": {"type": "path", "required": True}}
        )
        # Through JSON: plain values whatever types the variables have.
        fit = json.loads(json.dumps(arguments["fit"], default=str))
        fit = {key: value for key, value in fit.items() if key not in _OF_THE_TASK}
        if not isinstance(fit.get("ledger"), list):
            raise AnsibleActionFail("fit holds no ledger: give what memory_fit returned")
        folder = Path(arguments["folder"])
        page = self._draw(str((task_vars or {}).get("inventory_hostname", "this host")), fit)
        try:
            write(folder / "memory.json", (json.dumps(fit, indent=2) + "\n").encode())
            write(folder / "memory.html", page.encode())
        except OSError as error:
            raise AnsibleActionFail(f"{folder} on the controller cannot be written: {error.strerror}") from error
        return {**result, "changed": False, "page": str(folder / "memory.html"), "json": str(folder / "memory.json")}

    @staticmethod
    def _draw(host: str, fit: dict[str, Any]) -> str:
        try:
            from pages.ledger import render_ledger_page
        except ImportError as error:
            raise AnsibleActionFail(f"the page cannot be drawn ({error}): run make venv on the controller") from error
        try:
            return str(render_ledger_page(host, fit))
        except (KeyError, TypeError, ValueError) as error:
            raise AnsibleActionFail(f"fit is no result of memory_fit: {error!r}") from error
