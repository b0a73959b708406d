"""A look at one revision's folder: is it there, whole and the wanted one? No model file is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import manifest as mf
from .plan import check_config, check_identity
from .store import partial_of


@dataclass(frozen=True, slots=True)
class State:
    """What a look at the folders says, without reading a model file."""

    ready: bool
    reasons: list[str]
    size: int
    begun: int


def inspect(repo: str, revision: str, dest: Path, expect: Mapping[str, Any]) -> State:
    """Whether the revision is there, whole and the wanted one, by its manifest and the directory alone.

    Raises:
        ReapError: the checkpoint that is there is whole but another one than ``expect`` describes.
    """
    check_identity(repo, revision)
    begun = 0
    if dest.is_symlink():
        return State(False, [f"{dest} is a link; wanted a folder of plain files"], 0, 0)
    if not dest.is_dir():
        partial = partial_of(dest)
        begun = sum(found.st_size for found in mf.walk(partial).values())
        return State(False, ["begun, not finished" if partial.is_dir() else "not there"], 0, begun)
    record = mf.load(dest)
    if record is None:
        return State(False, ["there is no manifest, so nobody has verified it"], 0, 0)
    if (record.repo, record.commit) != (repo, revision):
        return State(False, [f"its manifest is of {record.repo}@{record.commit}"], 0, 0)
    reasons = [f"{fault.name} is {_KINDS[fault.kind]}" for fault in mf.faults(dest, record)]
    if not reasons and expect:
        check_config(dest, expect, f"{repo}@{revision}")
    return State(not reasons, reasons, record.size, 0)


_KINDS = {
    "missing": "missing",
    "changed": "not the file that was verified",
    "extra": "not part of the revision",
    "link": "a link, wanted a plain file",
}
