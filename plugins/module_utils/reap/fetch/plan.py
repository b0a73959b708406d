"""What a revision holds, according to the hub, and what a checkpoint's own files must say to be the wanted one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ReapError

REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# Names that are this program's own inside a model folder.
MANIFEST = "reap-manifest.json"
WORK = ".reap"


@dataclass(frozen=True, slots=True)
class Want:
    """One file of the revision: its size in bytes and the hash that the hub publishes for it.

    ``sha256`` for files in large file storage; otherwise ``git_sha1``, git's blob id: sha1 of ``blob <size>\\0`` and
    the content (git-scm.com, "Git Internals - Git Objects").
    """

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def etag(self) -> str:
        """What the hub gives as the file's ETag: the sha256 of a large file, else the blob id."""
        return self.sha256 or self.git_sha1 or ""


def check_identity(repo: str, revision: str) -> None:
    """Refuse what cannot name one immutable revision.

    Raises:
        ReapError: the repository is not ``owner/name`` or the revision no full commit id.
    """
    if not REPO.fullmatch(repo) or ".." in repo:
        raise ReapError(f"the repository is {repo!r}; wanted owner/name")
    if not COMMIT.fullmatch(revision):
        raise ReapError(
            f"the revision is {revision!r}; wanted a full commit id (40 characters 0-9a-f): a branch or a tag can move"
        )


def check_name(name: str) -> str:
    """A file name of the hub, refused when it could leave the model's folder or hide in it."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 or c in "\\\x7f" for c in name):
        raise ReapError(f"the hub lists a file named {name!r}, which is no plain relative path")
    if parts[0] == WORK or name == MANIFEST:
        raise ReapError(f"the hub lists a file named {name!r}, a name that this program keeps for itself")
    return name


def plan_from_listing(listing: Iterable[Mapping[str, Any]]) -> dict[str, Want]:
    """The plan from entries ``{"name", "size", "sha256"?, "git_sha1"?}``, by name.

    Raises:
        ReapError: a name is unsafe or listed twice, a size is no count, or a hash is missing or malformed.
    """
    plan: dict[str, Want] = {}
    for item in listing:
        name = check_name(str(item.get("name", "")))
        size, sha256, blob = item.get("size"), item.get("sha256"), item.get("git_sha1")
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ReapError(f"the size of {name} is listed as {size!r}; wanted a number of bytes")
        if name in plan:
            raise ReapError(f"{name} is listed twice")
        if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            raise ReapError(f"the sha256 of {name} is listed as {sha256!r}; wanted 64 characters 0-9a-f")
        if blob is not None and not (isinstance(blob, str) and COMMIT.fullmatch(blob)):
            raise ReapError(f"the blob id of {name} is listed as {blob!r}; wanted 40 characters 0-9a-f")
        if sha256 is None and blob is None:
            raise ReapError(f"no hash is listed for {name}, so it could not be verified")
        plan[name] = Want(name, size, sha256, None if sha256 else blob)
    if CONFIG not in plan:
        raise ReapError(f"the revision has no {CONFIG}, so it is no model (it has {len(plan)} files)")
    return plan


def listing(plan: Mapping[str, Want]) -> list[dict[str, Any]]:
    """The plan as JSON; ``plan_from_listing`` reads it back."""
    return [
        {"name": w.name, "size": w.size, **({"sha256": w.sha256} if w.sha256 else {"git_sha1": w.git_sha1})}
        for w in sorted(plan.values(), key=lambda w: w.name)
    ]


def download_order(plan: Mapping[str, Want]) -> list[Want]:
    """What can refuse the revision first, then the big files first, so that no long one is left for the end."""
    first = [plan[name] for name in (CONFIG, INDEX) if name in plan]
    rest = sorted((w for w in plan.values() if w not in first), key=lambda w: (-w.size, w.name))
    return first + rest


def _lookup(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def config_problems(path: Path, expect: Mapping[str, Any]) -> list[str]:
    """Where ``config.json`` differs from the expectation; keys may be dotted, a list means any of its values.

    Returns:
        One text per difference: ``n_routed_experts is 128, wanted 144``.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path.name} cannot be read ({str(error).splitlines()[0]})"]
    if not isinstance(config, dict):
        return [f"{path.name} holds no JSON object"]
    problems = []
    for key, wanted in expect.items():
        found = _lookup(config, key)
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if not any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in allowed):
            shown = " or ".join(json.dumps(value) for value in allowed)
            problems.append(f"{key} is {'missing' if found is None else json.dumps(found)}, wanted {shown}")
    return problems


def check_config(folder: Path, expect: Mapping[str, Any], what: str) -> None:
    """Raise one error with every difference between the checkpoint's config and the profile.

    Raises:
        ReapError: the checkpoint is another one than the profile wants.
    """
    if problems := config_problems(folder / CONFIG, expect):
        raise ReapError(
            f"{what} is not the checkpoint that was asked for: {'; '.join(problems)}. "
            "Give the repository and revision of the right one, or the profile that fits this one."
        )


def check_index(folder: Path, plan: Mapping[str, Want], what: str) -> list[str]:
    """Compare the shard index with the listing, before the shards are fetched.

    Returns:
        Warnings: shards that no index entry names. They are kept, and vLLM does not load them.

    Raises:
        ReapError: the index cannot be read or names a shard that the revision does not have.
    """
    if INDEX not in plan:
        return []
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        named = {str(name) for name in weight_map.values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ReapError(f"{INDEX} of {what} cannot be read ({type(error).__name__}: {error})") from error
    if missing := sorted(named - set(plan)):
        raise ReapError(
            f"{INDEX} of {what} names {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, "
            "which the revision does not have: its upload is incomplete. Use another revision."
        )
    extra = sorted(name for name in plan if name.endswith(".safetensors") and name not in named)
    return [f"{name} is named by no entry of {INDEX}; it is not loaded" for name in extra]
