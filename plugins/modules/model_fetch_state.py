#!/usr/bin/python
"""Thin shell round ``reap.fetch.state``: is the revision on the host, and can the host download?"""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_fetch_state
short_description: Say whether a model revision is on the host, without reading it
description:
  - Compares the folder with its manifest by size, modification time and inode of every file,
    and config.json with what is expected.
  - Opens no model file and changes nothing.
author: [reap]
options:
  repo:
    description: Repository as owner/name.
    type: str
    required: true
  revision:
    description: Full commit id.
    type: str
    required: true
  dest:
    description: Folder of the revision.
    type: path
    required: true
  expect:
    description: Keys of config.json, dotted, and the values they must have. A list means any of its values.
    type: dict
    default: {}
  downloader:
    description: The downloader's virtual environment.
    type: path
    required: true
  imports:
    description: Folders on the host that the revision may be taken from.
    type: list
    elements: path
    default: []
  fleet:
    description: Whether this host takes the model from others and gives it; told back, so that the others can see it.
    type: bool
    default: false
  requirements_sha256:
    description: sha256 of the pinned requirements that the virtual environment must have been made from.
    type: str
    required: true
attributes:
  check_mode:
    support: full
    description: Never changes anything.
  diff_mode:
    support: none
    description: Never changes anything.
"""

EXAMPLES = r"""
- name: What is on the host is known
  model_fetch_state:
    repo: org/name
    revision: 0123456789abcdef0123456789abcdef01234567
    dest: /var/lib/reap/models/org/name/0123456789abcdef0123456789abcdef01234567
    downloader: /opt/reap/downloader
    requirements_sha256: "{{ lookup('ansible.builtin.file', 'requirements.txt') | hash('sha256') }}"
"""

RETURN = r"""
ready:
  description: The revision is there, whole, verified and the expected one.
  returned: success
  type: bool
reasons:
  description: Why it is not ready.
  returned: success
  type: list
  elements: str
size:
  description: Bytes of the verified revision; 0 when there is none.
  returned: success
  type: int
begun:
  description: Bytes of an unfinished download.
  returned: success
  type: int
downloader:
  description: State of the virtual environment, V(ready), V(missing) or V(stale).
  returned: success
  type: str
dest:
  description: Folder of the revision.
  returned: success
  type: str
importable:
  description: One of O(imports) has the revision.
  returned: success
  type: bool
fleet:
  description: O(fleet).
  returned: success
  type: bool
missing_packages:
  description: Distribution packages that a download or a copy from another host needs and that are missing.
  returned: success
  type: list
  elements: str
"""

import contextlib
import importlib.util
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.reap.errors import ReapError
from ansible.module_utils.reap.fetch import downloader, local
from ansible.module_utils.reap.fetch.state import inspect


def missing_packages() -> list[str]:
    """Names of the distribution's packages for what is not there."""
    missing = [] if importlib.util.find_spec("ensurepip") is not None else ["python3-venv"]
    return missing + [name for name in ("rsync",) if shutil.which(name) is None]


def importable(folders: list[str], repo: str, revision: str) -> bool:
    """Whether one of the folders has the revision; the fetch itself says what is wrong with one that has not."""
    for folder in folders:
        with contextlib.suppress(ReapError, OSError):
            local.find(Path(folder), repo, revision)
            return True
    return False


def main() -> None:
    """Look and answer."""
    module = AnsibleModule(
        argument_spec={
            "repo": {"type": "str", "required": True},
            "revision": {"type": "str", "required": True},
            "dest": {"type": "path", "required": True},
            "expect": {"type": "dict", "default": {}},
            "downloader": {"type": "path", "required": True},
            "imports": {"type": "list", "elements": "path", "default": []},
            "fleet": {"type": "bool", "default": False},
            "requirements_sha256": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    p = module.params
    try:
        state = inspect(p["repo"], p["revision"], Path(p["dest"]), p["expect"])
    except (ReapError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=False,
        ready=state.ready,
        reasons=state.reasons,
        size=state.size,
        begun=state.begun,
        downloader=downloader.state(Path(p["downloader"]), p["requirements_sha256"]),
        dest=p["dest"],
        importable=not state.ready and importable(p["imports"], p["repo"], p["revision"]),
        fleet=p["fleet"],
        missing_packages=missing_packages(),
    )


if __name__ == "__main__":
    main()
