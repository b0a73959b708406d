"""Bring the watchdog's evidence of a kill to the controller and draw it there."""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

DOCUMENTATION = r"""
module: watchdog_page
short_description: Fetch the evidence of a kill and draw its memory series
description:
  - Fetches a C(bundle.json) of C(reap watch) and draws C(series.html) beside it, both on the controller.
  - Nothing is changed on the host, and nothing is fetched twice, because a kill's evidence never changes.
options:
  bundle:
    description: Path of the bundle on the host, as C(reap status) names it.
    type: path
    required: true
  artifacts:
    description: Folder on the controller for the kills of this host; each gets a folder of its own.
    type: path
    required: true
"""

ROOT = Path(__file__).resolve().parents[2]


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    beside.write_bytes(data)
    beside.replace(path)


class ActionModule(ActionBase):
    """Slurp, draw."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {"bundle": {"type": "path", "required": True}, "artifacts": {"type": "path", "required": True}}
        )
        remote = Path(arguments["bundle"])
        folder = Path(arguments["artifacts"]) / remote.parent.name
        page = folder / "series.html"
        if not page.is_file():
            slurped = self._execute_module(
                module_name="ansible.legacy.slurp", module_args={"src": str(remote)}, task_vars=task_vars
            )
            if slurped.get("failed"):
                raise AnsibleActionFail(f"{remote} cannot be read on the host: {slurped.get('msg')}")
            data = base64.b64decode(slurped["content"])
            drawn = self._draw(data).encode()
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / remote.name, data)
            _write(page, drawn)
        return {"changed": False, "page": str(page)}

    @staticmethod
    def _draw(data: bytes) -> str:
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        # A worker has no home it may write to for sure; matplotlib wants a folder for its font list.
        os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / f"reap-matplotlib-{os.getuid()}"))
        try:
            from pages.memory_series import render_series_page
        except ImportError as error:
            raise AnsibleActionFail(f"the page cannot be drawn ({error}): run make venv on the controller") from error
        try:
            return render_series_page(json.loads(data))
        except (KeyError, TypeError, ValueError) as error:
            raise AnsibleActionFail(f"it is no evidence of a kill: {error!r}") from error
