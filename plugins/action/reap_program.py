"""Install the reap package on the host as one runnable file."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

DOCUMENTATION = r"""
module: reap_program
short_description: Install the reap program on the host
description:
  - Packs C(plugins/module_utils/reap) into a zipapp on the controller and copies it,
    so that the host decides with the same code.
  - The archive is the same bytes for the same sources, so an unchanged program is not copied again.
options:
  dest:
    description: Path of the program on the host.
    type: path
    required: true
"""

PACKAGE = Path(__file__).resolve().parents[1] / "module_utils" / "reap"
# zip cannot hold an earlier time; a fixed one keeps the archive the same for the same sources.
EPOCH = (1980, 1, 1, 0, 0, 0)
MAIN = b"from reap.cli import main\n\nraise SystemExit(main())\n"
SHEBANG = b"#!/usr/bin/python3\n"


def build_zipapp(package: Path) -> bytes:
    """The package as an executable zip archive; the same bytes for the same sources."""
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        entries = {"__main__.py": MAIN}
        for path in sorted(package.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                entries[f"{package.name}/{path.relative_to(package).as_posix()}"] = path.read_bytes()
        for name in sorted(entries):
            info = zipfile.ZipInfo(name, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, entries[name])
    return buffer.getvalue()


class ActionModule(ActionBase):
    """Build on the controller, hand over to ansible.builtin.copy."""

    TRANSFERS_FILES = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec({"dest": {"type": "path", "required": True}})
        dest = Path(arguments["dest"])
        with tempfile.TemporaryDirectory(prefix="reap-") as folder:
            source = Path(folder) / dest.name
            source.write_bytes(build_zipapp(PACKAGE))
            task = self._task.copy()
            # A destination that ends in a slash makes copy create the folder, in check mode too.
            task.args = {
                "src": str(source),
                "dest": f"{dest.parent}/",
                "owner": "root",
                "group": "root",
                "mode": "0755",
            }
            copy = self._shared_loader_obj.action_loader.get(
                "ansible.builtin.copy",
                task=task,
                connection=self._connection,
                play_context=self._play_context,
                loader=self._loader,
                templar=self._templar,
                shared_loader_obj=self._shared_loader_obj,
            )
            result: dict[str, Any] = copy.run(task_vars=task_vars)
        return result
