"""Name of the patched image: a function of the base's identity and of the patch set alone."""

from __future__ import annotations

import hashlib

from ..errors import ReapError
from ..patches import ROUTERS, patch_set_hash
from .base import is_sha256
from .derived import REPOSITORY


def base_key(identity: str) -> str:
    """12 hex digits that stand for a base: those of its digest, else of a hash of its reference.

    Args:
        identity: ``sha256:...``, ``name@sha256:...`` or any other image reference.
    """
    digest = identity.rpartition("@")[2]
    if is_sha256(digest):
        return digest.partition(":")[2][:12]
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def patch_set(router: str) -> str:
    """Identity of the patch set with this router variant, 64 hex digits.

    Raises:
        ReapError: unknown router variant.
    """
    if router not in ROUTERS:
        raise ReapError(f"router variant is {router!r}, wanted one of {', '.join(ROUTERS)}")
    return patch_set_hash(router)


def image_name(identity: str, router: str) -> str:
    """``reap-runtime:<12 hex of the base>-<12 hex of the patch set>``.

    Raises:
        ReapError: unknown router variant, or no identity.
    """
    if not identity:
        raise ReapError("the base image has no digest and no reference")
    return f"{REPOSITORY}:{base_key(identity)}-{patch_set(router)[:12]}"
