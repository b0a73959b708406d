"""Names by which the recipe knows what it made: labels of images, and names of the containers of a build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a patched image says of itself.
LABEL_BASE, LABEL_BASE_ID, LABEL_PATCHES = "io.reap.base", "io.reap.base-id", "io.reap.patch-set"
LABEL_MATCHED, LABEL_VALIDATED = "io.reap.base-matched", "io.reap.base-validated"
LABEL_ROUTER, LABEL_TESTED = "io.reap.router", "io.reap.self-test"
# A patched image before its self-test; whatever still has it when no build runs was left by one that was killed.
LABEL_CANDIDATE = "io.reap.candidate"
# The layer that was built on a base: what was installed on which name, and the ID that the name had then. A patched
# image made of it inherits both.
LABEL_CUTLASS, LABEL_CUTLASS_ON = "io.reap.cutlass", "io.reap.cutlass-on"

# Containers of a build are known by their name: a label would be committed into the image and from there into every
# container of the service.
WORK = "reap-image-work"
WORK_STEPS = ("cutlass", "apply", "image", "selftest")


def labels_of(image: Mapping[str, Any]) -> dict[str, str]:
    """Labels of an image as `Engine.image` or the engine's list gives it."""
    return dict(image.get("Labels") or (image.get("Config") or {}).get("Labels") or {})


def tags_of(image: Mapping[str, Any]) -> list[str]:
    """Names of an image; an engine may list one that has none as ``<none>:<none>``."""
    return [name for name in image.get("RepoTags") or [] if not name.startswith("<none>")]
