"""What the role makes of a fleet: who asks the hub at once, who waits and how long, and whom each host asks.

ansible-core renders the role's own variables; what a look at each host would have said is given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
DEST = "/m/org/model/1"


def look(**changes: Any) -> dict[str, Any]:
    """What module model_fetch_state says of a host."""
    return {"ready": False, "dest": DEST, "fleet": True, "importable": False, **changes}


def rendered(tmp_path: Path, hosts: dict[str, dict[str, Any]], **variables: Any) -> dict[str, Any]:
    """For each host its command's arguments about peers and the peers that it is told of; None: no fleet for it."""
    listed = {
        name: {"__model_fetch_state": state} | ({"__model_fetch_peer": {"address": name}} if state["fleet"] else {})
        for name, state in hosts.items()
    }
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": listed}}))
    defaults = {"model_fetch_seeds": [], "model_fetch_peer_wait": 120, "model_fetch_offline": False}
    defaults |= {"model_fetch_dest": DEST, "reap_run_dir": "/run/reap", "model_fetch_timeout": 0}
    content = {
        "argv": "{{ __model_fetch_argv_peers }}",
        "others": "{{ __model_fetch_others if __model_fetch_spread else [] }}",
        "lifetime": "{{ __model_fetch_peer_lifetime }}",
    }
    save = {"dest": f"{tmp_path}/{{{{ inventory_hostname }}}}.json", "content": "{{ shown | to_json }}"}
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars_files": [str(ROOT / "roles/model_fetch/vars/main.yml")],
        "vars": {**defaults, **variables, "shown": content},
        "tasks": [{"ansible.builtin.copy": save}],
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(tmp_path / "hosts.yml"), "-c", "local",
         str(tmp_path / "play.yml"), "-e", f"ansible_python_interpreter={sys.executable}"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in hosts}


def waits(told: dict[str, Any]) -> dict[str, int | None]:
    """Seconds that each host waits for a peer before it asks the hub; None: it asks no peer at all."""
    found: dict[str, int | None] = {}
    for name, shown in told.items():
        words = dict(word.split("=") for word in shown["argv"])
        found[name] = int(words["--peer-wait"]) if words else None
        assert words.get("--peers") in (None, "/run/reap/fetch-peers")
    return found


def test_the_first_asks_the_hub_and_the_others_would_go_one_after_the_other(tmp_path: Path) -> None:
    hosts = {"a": look(ready=True), "b": look(), "c": look(), "d": look()}
    told = rendered(tmp_path, hosts)
    assert waits(told) == {"a": 0, "b": 0, "c": 120, "d": 240}
    assert told["c"]["others"] == ["a", "b", "d"]
    # Longer than a day, which a slow hub needs for 94 GB.
    assert int(told["c"]["lifetime"]) == 7 * 86400
    told = rendered(tmp_path, hosts, model_fetch_seeds=["c"], model_fetch_timeout=3600)
    assert waits(told) == {"a": 0, "b": 120, "c": 0, "d": 240}
    assert int(told["c"]["lifetime"]) == 3600 + 86400


def test_an_offline_fleet_begins_where_the_disk_is_and_everybody_waits(tmp_path: Path) -> None:
    hosts = {"a": look(), "b": look(), "c": look(importable=True)}
    assert waits(rendered(tmp_path, hosts)) == {"a": 120, "b": 240, "c": 0}
    # The hub is nobody's next step, so that nobody has to go after somebody.
    assert waits(rendered(tmp_path, hosts, model_fetch_offline=True)) == {"a": 120, "b": 120, "c": 120}


def test_a_host_that_does_not_take_part_does_not_disturb_the_others(tmp_path: Path) -> None:
    told = rendered(tmp_path, {"a": look(fleet=False), "b": look(), "c": look()})
    assert waits(told) == {"a": None, "b": 0, "c": 120}
    assert (told["a"]["others"], told["b"]["others"], told["c"]["others"]) == ([], ["c"], ["b"])
    # Two of which one takes part are no fleet.
    assert waits(rendered(tmp_path, {"a": look(fleet=False), "b": look()})) == {"a": None, "b": None}


def test_nobody_is_asked_where_all_have_it(tmp_path: Path) -> None:
    assert waits(rendered(tmp_path, {"a": look(ready=True), "b": look(ready=True)})) == {"a": None, "b": None}
