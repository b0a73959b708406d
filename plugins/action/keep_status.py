"""Keep a host's status on the controller, with the watchdog's evidence of its last kill and the picture of it."""

from __future__ import annotations

import base64
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
module: keep_status
short_description: Keep a host's status on the controller, with the picture of its last kill
description:
  - Writes C(status.json). Where it names evidence of a kill, fetches that C(bundle.json) and draws C(series.html)
    beside it, below C(watchdog/).
  - Nothing is changed on the host, and nothing is fetched twice, because a kill's evidence never changes.
options:
  status:
    description: What C(reap status --json) said.
    type: dict
    required: true
  folder:
    description: Folder on the controller, one for each host; made if missing.
    type: path
    required: true
"""


class ActionModule(ActionBase):
    """Write; slurp and draw."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {"status": {"type": "dict", "required": True}, "folder": {"type": "path", "required": True}}
        )
        # Through JSON: plain values whatever types the variables have.
        status = json.loads(json.dumps(arguments["status"], default=str))
        folder = Path(arguments["folder"])
        write(folder / "status.json", (json.dumps(status) + "\n").encode())
        if not status.get("evidence"):
            return {"changed": False}
        remote = Path(status["evidence"])
        bundle = folder / "watchdog" / remote.parent.name / remote.name
        page = bundle.with_name("series.html")
        if not page.is_file():
            slurped = self._execute_module(
                module_name="ansible.legacy.slurp", module_args={"src": str(remote)}, task_vars=task_vars
            )
            if slurped.get("failed"):
                raise AnsibleActionFail(f"{remote} cannot be read on the host: {slurped.get('msg')}")
            data = base64.b64decode(slurped["content"])
            write(bundle, data)
            try:
                drawn = self._draw(data)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                # A kill during a power cut leaves half of it: the host's status is worth having all the same.
                text = f"{remote} is damaged and cannot be drawn ({error!r}); as it is: {bundle}"
                return {"changed": False, "warnings": [text]}
            write(page, drawn.encode())
        return {"changed": False, "page": str(page)}

    @staticmethod
    def _draw(data: bytes) -> str:
        try:
            from pages.memory_series import render_series_page
        except ImportError as error:
            raise AnsibleActionFail(f"the page cannot be drawn ({error}): run make venv on the controller") from error
        return render_series_page(json.loads(data))
