"""Which counts the patched router takes from the kernel, in the runtime image's own torch; the kernel is a double."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reap.patches.core import added_file

SCRIPT = Path(__file__).with_name("check_router.py")
CHECKS = re.findall(r"^    (\w+),$", SCRIPT.read_text().partition("CHECKS = (")[2].partition("\n)")[0], re.MULTILINE)

# Each spoils one line of the entry; the check named must notice.
SPOILED = {
    "the kernel is never asked": ("    if key not in _refused:", "    if False:", "supported_counts_stay_native"),
    "nothing is remembered": ("            _refused.add(key)\n", "            pass\n", "refusal_is_remembered"),
    "every error is a refusal": (
        "            if not is_refusal(error):",
        "            if False:",
        "other_errors_propagate",
    ),
    "padding in logits is 0": ('value=float("-inf"))', "value=0.0)", "padded_sees_the_next_count"),
    "padding in the bias is 0": ("PADDED_BIAS = -1e30", "PADDED_BIAS = 0.0", "padded_sees_the_next_count"),
    "padded rows are looked up": (
        "            tokens = tokens.masked_fill(padding, 0)\n",
        "            pass\n",
        "padding_may_lie_outside_the_table",
    ),
}


@pytest.fixture(scope="module")
def answers(vllm_python: list[str]) -> dict[str, dict[str, Any]]:
    """One start of the image's Python for the entry as it is and every spoiled one."""
    source = added_file("router.py", "torch").decode()
    sources = {"": source}
    for what, (old, new, _) in SPOILED.items():
        assert source.count(old) == 1, what
        sources[what] = source.replace(old, new)
    done = subprocess.run(
        [*vllm_python, str(SCRIPT)], input=json.dumps(sources), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_the_entry(answers: dict[str, dict[str, Any]], name: str) -> None:
    assert answers[""][name] is None


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_entry_is_noticed(answers: dict[str, dict[str, Any]], what: str) -> None:
    assert answers[what][SPOILED[what][2]] is not None
