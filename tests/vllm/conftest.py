"""vLLM's own Python, out of the runtime image that the simulated Spark serves with.

Needs `python3 -m sim build` once. REAP_VLLM_PYTHON names a Python that has vllm instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _sim(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sim", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"python3 -m sim {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture(scope="session")
def vllm_python() -> list[str]:
    """Command that runs a Python script from standard input's folder with vllm installed, reading standard input."""
    own = os.environ.get("REAP_VLLM_PYTHON")
    if own:
        return [own]
    status = json.loads(_sim("status", "--json"))
    image = status["facts"].get("runtime_image")
    if not image:
        pytest.fail("the runtime image is not built; run: python3 -m sim build runtime-image")
    registry = status["services"]["registry"]["url"].removeprefix("http://")
    reference = f"{registry}/{image['reference'].split('/', 1)[1]}@{image['digest']}"
    run = [
        "run",
        "--rm",
        "--interactive",
        "--network",
        "none",
        "--volume",
        f"{ROOT / 'tests/vllm'}:{ROOT / 'tests/vllm'}:ro",
    ]
    return [*status["engine"]["command"], *run, "--entrypoint", "/usr/bin/python3", reference]


@pytest.fixture(scope="session")
def ask_vllm(vllm_python: list[str]) -> Callable[[dict[str, list[str]]], dict[str, Any]]:
    """Feed argument lists to vLLM's parser; what it says of each, or None where it takes it."""

    def ask(lists: dict[str, list[str]]) -> dict[str, Any]:
        script = str(ROOT / "tests/vllm/check_arguments.py")
        done = subprocess.run(
            [*vllm_python, script], input=json.dumps(lists), capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        answers: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answers

    return ask
