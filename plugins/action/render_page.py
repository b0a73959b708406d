"""Bring a run's evidence to the controller, draw its page there, and put the page beside the evidence."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

# Ansible does not put the repository on the controller's import path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pages import write

DOCUMENTATION = r"""
module: render_page
short_description: Fetch a run's report.json, draw its page and put it beside it
description:
  - Fetches C(report.json) of a run of C(reap verify), draws C(report.html) on the controller and copies it to the host.
  - Nothing is asked of the host when the controller has both already, because a run's evidence never changes.
  - Then draws C(index.html), the page of all hosts, in the folder above C(artifacts).
options:
  folder:
    description: Folder of the run on the host.
    type: path
    required: true
  artifacts:
    description: Folder of the host's runs on the controller.
    type: path
    required: true
"""


def _pages() -> tuple[Callable[[dict[str, Any]], str], Callable[[Path], Path]]:
    """What draws a report, and what writes the page of all hosts into a folder."""
    try:
        from pages.fleet import write_index
        from pages.report import render_report
    except ImportError as error:
        raise AnsibleActionFail(f"the page cannot be drawn ({error}): run make venv on the controller") from error
    return render_report, write_index


class ActionModule(ActionBase):
    """Slurp, draw, copy."""

    TRANSFERS_FILES = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {"folder": {"type": "path", "required": True}, "artifacts": {"type": "path", "required": True}}
        )
        remote = Path(arguments["folder"])
        local = Path(arguments["artifacts"]) / remote.name
        report, page = local / "report.json", local / "report.html"
        index = local.parents[1] / "index.html"
        result = {"changed": False, "report": str(report), "page": str(page), "index": str(index)}
        if report.is_file() and page.is_file() and index.is_file():
            return result
        if self._task.check_mode:
            return {**result, "changed": True}
        render_report, write_index = _pages()
        slurped = self._execute_module(
            module_name="ansible.legacy.slurp", module_args={"src": str(remote / "report.json")}, task_vars=task_vars
        )
        if slurped.get("failed"):
            raise AnsibleActionFail(f"{remote}/report.json cannot be read on the host: {slurped.get('msg')}")
        data = base64.b64decode(slurped["content"])
        write(report, data)
        write(page, render_report(json.loads(data)).encode())
        self._put(page, remote / page.name, task_vars)
        write_index(index.parent)
        return result

    def _put(self, source: Path, dest: Path, task_vars: dict[str, Any] | None) -> None:
        task = self._task.copy()
        task.args = {"src": str(source), "dest": str(dest), "owner": "root", "group": "root", "mode": "0644"}
        copy = self._shared_loader_obj.action_loader.get(
            "ansible.builtin.copy",
            task=task,
            connection=self._connection,
            play_context=self._play_context,
            loader=self._loader,
            templar=self._templar,
            shared_loader_obj=self._shared_loader_obj,
        )
        done: dict[str, Any] = copy.run(task_vars=task_vars)
        if done.get("failed"):
            raise AnsibleActionFail(f"{dest} cannot be written on the host: {done.get('msg')}")
