#!/usr/bin/python
"""Keys with which hosts of one run read a model from each other, and their end."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_fetch_peer
short_description: Let hosts of one run read a verified model from each other over SSH
description:
  - Each host makes a key pair whose private half never leaves it and lies in memory (a folder below /run).
  - Its public half may do one thing on the others, C(reap fetch --serve-peer), until V(absent) takes it away,
    and for O(lifetime) at most.
author: [reap]
options:
  state:
    description:
      - V(key) makes the key, V(present) lets the peers' keys in and learns their host keys, V(absent) undoes both.
    type: str
    choices: [key, present, absent]
    required: true
  folder:
    description: Folder of the key, of the known host keys and of the list of peers; what C(reap fetch --peers) reads.
    type: path
    required: true
  address:
    description: Address under which the peers reach this host.
    type: str
    default: ""
  port:
    description: SSH port under which the peers reach this host.
    type: int
    default: 22
  lifetime:
    description:
      - Seconds after which a key that nobody took away opens nothing any more. Longer than the slowest download, for
        the others wait for that and come with these keys.
    type: int
    default: 604800
  program:
    description: The reap program.
    type: path
  models:
    description: Folder of the models that may be read.
    type: path
  peers:
    description: What V(key) returned on the other hosts.
    type: list
    elements: dict
    default: []
attributes:
  check_mode:
    support: none
    description: Not called in check mode.
  diff_mode:
    support: none
    description: Keys are shown nowhere.
"""

EXAMPLES = r"""
- name: This host has a key for this run
  model_fetch_peer:
    state: key
    folder: /run/reap/fetch-peers
    address: 10.0.0.1
"""

RETURN = r"""
public_key:
  description: Public half of the key, without a comment.
  returned: state is key
  type: str
host_keys:
  description: This host's own public host keys.
  returned: state is key
  type: list
  elements: str
address:
  description: user@address for the peers.
  returned: state is key
  type: str
port:
  description: SSH port for the peers.
  returned: state is key
  type: int
"""

import json
import os
import pwd
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.reap.fetch.peers import KEY, KNOWN_HOSTS, PEERS

MARK = "reap-fetch-peer"


def make_key(folder: Path, address: str, port: int) -> dict[str, Any]:
    """A fresh key pair; one left from an earlier run is replaced.

    In one move, and with the list of peers left in place: a fetch of a run that was interrupted may be using them.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    fresh = folder / "new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", MARK, "-f", str(fresh / KEY)]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    public = " ".join((fresh / f"{KEY}.pub").read_text().split()[:2])
    # ssh would compare the private key with a public one beside it that is not its own.
    (folder / f"{KEY}.pub").unlink(missing_ok=True)
    (fresh / KEY).replace(folder / KEY)
    shutil.rmtree(fresh)
    host_keys = [" ".join(path.read_text().split()[:2]) for path in sorted(Path("/etc/ssh").glob("ssh_host_*_key.pub"))]
    return {"public_key": public, "host_keys": host_keys, "address": f"{login()}@{address}", "port": port}


def write(path: Path, text: str) -> None:
    """In one move: a fetch may be reading it."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def login() -> str:
    """The user that Ansible logged in as: where a key for SSH belongs."""
    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name


def rewrite(added: list[str]) -> None:
    """Replace this program's lines in the user's authorized_keys; every other line stays as it is."""
    user = pwd.getpwnam(login())
    folder = Path(user.pw_dir) / ".ssh"
    file = folder / "authorized_keys"
    before = file.read_text().splitlines() if file.exists() else []
    after = [line for line in before if not line.endswith(f" {MARK}")] + added
    if after == before:
        return
    if not folder.exists():
        folder.mkdir(mode=0o700)
        os.chown(folder, user.pw_uid, user.pw_gid)
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    beside = file.with_name(".authorized_keys.reap-new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.writelines(f"{line}\n" for line in after)
    os.chown(beside, user.pw_uid, user.pw_gid)
    beside.chmod(mode)
    beside.replace(file)


def main() -> None:
    """Run one state."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["key", "present", "absent"], "required": True},
            "folder": {"type": "path", "required": True},
            "address": {"type": "str", "default": ""},
            "port": {"type": "int", "default": 22},
            "lifetime": {"type": "int", "default": 604800},
            "program": {"type": "path"},
            "models": {"type": "path"},
            "peers": {"type": "list", "elements": "dict", "default": []},
        },
        required_if=[("state", "key", ["address"]), ("state", "present", ["program", "models"])],
    )
    p = module.params
    folder = Path(p["folder"])
    try:
        if p["state"] == "key":
            module.exit_json(changed=True, **make_key(folder, p["address"], p["port"]))
        if p["state"] == "absent":
            rewrite([])
            shutil.rmtree(folder, ignore_errors=True)
            module.exit_json(changed=True)
        command = shlex.join([p["program"], "fetch", "--serve-peer", "--models", p["models"]])
        until = time.strftime("%Y%m%d%H%M", time.localtime(time.time() + p["lifetime"]))
        options = f'restrict,expiry-time="{until}",command="{command}"'
        rewrite([f"{options} {peer['public_key']} {MARK}" for peer in p["peers"]])
        lines = []
        for peer in p["peers"]:
            host, port = str(peer["address"]).rpartition("@")[2], int(peer["port"])
            name = host if port == 22 else f"[{host}]:{port}"
            lines += [f"{name} {key}\n" for key in peer["host_keys"]]
        write(folder / KNOWN_HOSTS, "".join(lines))
        write(folder / PEERS, json.dumps([{"address": peer["address"], "port": peer["port"]} for peer in p["peers"]]))
    except subprocess.CalledProcessError as error:
        module.fail_json(msg=f"ssh-keygen failed: {error.stderr.decode(errors='replace').strip()}")
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}")
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()
