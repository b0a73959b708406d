"""The filters as Ansible finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def debug(expression: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Evaluate an expression on the controller with the recipe's own variables."""
    command = [str(Path(sys.executable).with_name("ansible")), "localhost", "-i", "localhost,", "-c", "local"]
    extra = ["-e", f"@{ROOT}/group_vars/all/main.yml", "-e", f"@{ROOT}/group_vars/all/profiles.yml", *more]
    return subprocess.run(
        [*command, *extra, "-m", "debug", "-a", f"msg={{{{ {expression} }}}}"],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_filter_turns_a_profile_into_arguments() -> None:
    done = debug("reap_profile_data | reap_vllm_args('/m', '127.0.0.1', 8000) | to_json")
    assert done.returncode == 0, done.stdout + done.stderr
    words = json.loads(json.loads(done.stdout[done.stdout.index("{") :])["msg"])
    assert words[:3] == ["/m", "--served-model-name", "DeepSeek-V4-Flash-Spark-Mini"]


def test_a_wrong_profile_is_one_clear_error() -> None:
    done = debug("{'thinkin': true} | reap_vllm_args('/m', '127.0.0.1', 8000, 'mine')")
    assert done.returncode != 0
    assert "profile mine: unknown key 'thinkin' (did you mean 'thinking'?)" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("name", "count"), [("k144-nospec-200k", 20), ("sim-needle-32k", 20)])
def test_a_filter_turns_a_profile_into_the_environment(name: str, count: int) -> None:
    done = debug("reap_profile_data | reap_container_env('/c') | length", "-e", f"reap_profile={name}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(json.loads(done.stdout[done.stdout.index("{") :])["msg"]) >= count
