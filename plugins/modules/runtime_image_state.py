#!/usr/bin/python
"""Thin shell round ``reap.images``: which of the runtime images are on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: runtime_image_state
short_description: Say whether the pinned image and the patched image made of it are on the host
description:
  - Asks the container engine over its socket. Changes nothing and contacts no registry.
  - Fails where another base stands behind the same reference than the one that was patched before.
author: [reap]
options:
  base:
    description: Identity and sources of the base image, as C(reap image --base) takes them.
    type: dict
    required: true
  build:
    description: The patched image, as C(reap image --build) takes it. Without it only the base is looked for.
    type: dict
  engine_optional:
    description: A host without an answering engine has no images instead of being an error (fresh host, check mode).
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Never changes anything.
  diff_mode:
    support: none
    description: Never changes anything.
"""

EXAMPLES = r"""
- name: The state of the runtime image is known
  runtime_image_state:
    base:
      repository: registry.example/runtime
      digest: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
  register: __state
"""

RETURN = r"""
base:
  description: ID, by which identity it matched, source, validated or not, and what it is; null where it is missing.
  returned: success
  type: dict
  sample: {id: "sha256:...", matched: repo digest, source: disk, validated: true, reference: "host/name@sha256:..."}
image:
  description: ID of the finished patched image; null where it is missing or made of another base.
  returned: success
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.reap.errors import ReapError
from ansible.module_utils.reap.images import base as bases
from ansible.module_utils.reap.images import derived
from ansible.module_utils.reap.images.engine import Engine, EngineError


def main() -> None:
    """Look and answer."""
    module = AnsibleModule(
        argument_spec={
            "base": {"type": "dict", "required": True},
            "build": {"type": "dict"},
            "engine_optional": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    engine, image, found = Engine(), None, None
    try:
        spec = bases.Spec.of(module.params["base"])
        try:
            found = bases.locate(engine, spec)
        except EngineError as error:
            if error.status or not module.params["engine_optional"]:
                raise
        if module.params["build"] and found:
            build = derived.Build.of(module.params["build"])
            image = derived.current(engine, build, found)
            if image is None:
                derived.refuse_changed_base(engine, build, found)
    except ReapError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, base=found.record() if found else None, image=image)


if __name__ == "__main__":
    main()
