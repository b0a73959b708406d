"""Filter of the watchdog role."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "module_utils" / "reap"

DOCUMENTATION = r"""
name: reap_program_hash
short_description: What part of the reap program a running service was started from
description:
  - Hash over the sources of one part of the program and of the modules at the package's root.
  - Written into a unit file it makes a changed program a changed unit, and nothing else.
options:
  _input:
    description: Folder of the package, such as C(watch).
    type: str
    required: true
"""


def reap_program_hash(part: str) -> str:
    """16 hex digits of the SHA-256 over the names and bytes of the sources."""
    folder = PACKAGE / part
    if not folder.is_dir():
        raise ValueError(f"the reap program has no part {part!r} in {PACKAGE}")
    digest = hashlib.sha256()
    command = PACKAGE / "cli" / f"{part}.py"
    sources = [*folder.rglob("*.py"), *PACKAGE.glob("*.py"), PACKAGE / "cli" / "__init__.py"]
    for path in sorted({*sources, *([command] if command.is_file() else [])}):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


class FilterModule:
    """Names of the filters."""

    def filters(self) -> dict[str, Any]:
        return {"reap_program_hash": reap_program_hash}
