"""What the last lines of a run say of each host."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SPEC = importlib.util.spec_from_file_location("reap_summary", ROOT / "plugins" / "callback" / "reap_summary.py")
assert SPEC is not None
assert SPEC.loader is not None
PLUGIN = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PLUGIN)
PLAYS = """
- name: Prepare
  hosts: all
  gather_facts: false
  tasks:
    - name: A step
      ansible.builtin.assert:
        that: inventory_hostname != prepare_fails | default('')
        fail_msg: "{{ inventory_hostname }} cannot"
      tags: prepare
- name: Serve
  hosts: all
  gather_facts: false
  serial: "{{ reap_serial | default('100%') }}"
  tasks:
    - name: A restart
      ansible.builtin.assert:
        that: inventory_hostname != serve_fails | default('')
      tags: serve
"""
RESCUED = """
- name: Verify
  hosts: all
  gather_facts: false
  tasks:
    - name: The page of all hosts is named
      ansible.builtin.set_stats:
        data:
          reap_pages: artifacts/index.html
        aggregate: false
    - name: Way back
      when: inventory_hostname == 'a'
      block:
        - name: A way back
          ansible.builtin.fail:
            msg: no way back
      rescue:
        - name: The verification passed
          ansible.builtin.fail:
            msg: it failed, and there was no way back
"""


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"msg": "no such file", "stdout": "noise"}, "no such file"),
        ({"msg": "", "stderr": "two\nlines"}, "two lines"),
        ({"msg": "failed to validate", "stdout": "floor_kb is 9\n", "stderr": ""}, "failed to validate: floor_kb is 9"),
        ({"msg": "failed to validate", "stdout": "", "stderr": "no TOML"}, "failed to validate: no TOML"),
        ({"msg": "failed to validate"}, "failed to validate"),
        ({}, "no message"),
    ],
)
def test_a_failure_is_told_by_what_says_most(result: dict[str, Any], said: str) -> None:
    assert PLUGIN.first_message(result) == said


def test_a_long_message_is_cut() -> None:
    assert len(PLUGIN.first_message({"msg": "x" * 1000})) == PLUGIN.SHOWN_CHARACTERS


def summary(folder: Path, *arguments: str, plays: str = PLAYS) -> tuple[int, dict[str, str]]:
    """Exit status of a run, and what its last lines say by host; under `all` what they say of all hosts."""
    (folder / "play.yml").write_text(plays, encoding="utf-8")
    (folder / "hosts").write_text("".join(f"{name} ansible_connection=local\n" for name in "abc"), encoding="utf-8")
    program = str(Path(sys.executable).parent / "ansible-playbook")
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    environment |= {"LC_ALL": "C.UTF-8"}
    command = [program, "-i", str(folder / "hosts"), str(folder / "play.yml"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout[done.stdout.index("HOSTS **") :].splitlines()[1:-1]
    return done.returncode, {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_a_good_run_is_a_line_for_each_host(tmp_path: Path) -> None:
    assert summary(tmp_path) == (0, dict.fromkeys("abc", "ok changed=0"))


@pytest.mark.parametrize("tag", ["prepare", "serve"])
def test_a_play_without_a_task_counts_for_nothing(tmp_path: Path, tag: str) -> None:
    assert summary(tmp_path, "--tags", tag) == (0, dict.fromkeys("abc", "ok changed=0"))


def test_a_host_that_fails_is_named_with_its_reason_and_the_others_are_good(tmp_path: Path) -> None:
    status, lines = summary(tmp_path, "-e", "prepare_fails=a", "-e", "reap_serial=1")
    assert status != 0
    assert lines == {"a": "FAILED changed=0 A step: a cannot", "b": "ok changed=0", "c": "ok changed=0"}


def test_hosts_behind_a_batch_that_failed_are_not_called_good(tmp_path: Path) -> None:
    status, lines = summary(tmp_path, "-e", "serve_fails=b", "-e", "reap_serial=1")
    assert status != 0
    assert lines["a"] == "ok changed=0"
    assert lines["b"].startswith("FAILED changed=0 A restart: ")
    assert lines["c"].startswith("HELD changed=0 Serve was not begun: every host of the batch before failed")


def test_the_failure_that_ended_it_is_told_and_not_one_that_was_rescued(tmp_path: Path) -> None:
    status, lines = summary(tmp_path, plays=RESCUED)
    assert status != 0
    assert lines["a"] == "FAILED changed=0 The verification passed: it failed, and there was no way back"
    assert lines["b"] == "ok changed=0"
    assert lines["all"] == "hosts: artifacts/index.html"
