"""Sizes by vLLM's rule."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError
from hypothesis import given, settings
from hypothesis import strategies as st

from reap.errors import ReapError
from reap.sizes import gib, human_bytes, to_bytes

ROOT = Path(__file__).resolve().parents[3]

# What vLLM 0.32.0's own human_readable_int returned for the same text.
VLLM_SAYS = {
    "14G": 15032385536,
    "6G": 6442450944,
    "6g": 6000000000,
    "512M": 536870912,
    "512m": 512000000,
    "1k": 1000,
    "1K": 1024,
    "25.6k": 25600,
    "0.5g": 500000000,
    "1.5t": 1500000000000,
    "2T": 2199023255552,
    " 8192 ": 8192,
    "0": 0,
    "15032385536": 15032385536,
}


@pytest.mark.parametrize(("text", "expected"), VLLM_SAYS.items())
def test_reads_what_vllm_reads(text, expected):
    assert to_bytes(text) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        "G",
        "14GB",
        "14 G",
        "14GiB",
        "6.5G",
        "-1",
        "-5G",
        "1e9",
        "0x10",
        "1_000",
        "+5",
        "nan",
        "inf",
        ".5g",
        "5.g",
        "١٤G",
        "9" * 5000,
        "14G\0",
        None,
        1.5,
        -1,
        True,
        [],
        {},
        b"14G",
    ],
)
def test_anything_else_is_an_error_that_says_what_was_given(value):
    with pytest.raises(ReapError) as error:
        to_bytes(value, "kv_cache_memory")
    assert "kv_cache_memory" in str(error.value)
    shown = repr(value) if not isinstance(value, str) else repr(value.strip())[:40].rstrip("'")
    assert shown in str(error.value) or str(value) in str(error.value)


def test_decimals_before_a_capital_letter_are_explained():
    with pytest.raises(ReapError, match=r"did you mean 6\.5g"):
        to_bytes("6.5G")


@settings(deadline=None)
@given(st.integers(min_value=0, max_value=2**80))
def test_print_and_parse_are_inverse(value):
    assert to_bytes(human_bytes(value)) == value


@settings(deadline=None)
@given(st.from_regex(r"[0-9]{1,12}[kmgtKMGT]?", fullmatch=True))
def test_parse_print_parse_is_stable(text):
    assert to_bytes(human_bytes(to_bytes(text))) == to_bytes(text)


@pytest.mark.parametrize(
    ("value", "text"), [(15032385536, "14G"), (6 * 10**9, "6g"), (0, "0"), (1537, "1537"), (5 << 30, "5G")]
)
def test_prints_the_shortest_exact_text(value, text):
    assert human_bytes(value) == text


@pytest.mark.parametrize("value", [-1, 1.0, True, None, "14G"])
def test_only_whole_bytes_are_printed(value):
    with pytest.raises(ReapError):
        human_bytes(value)


def test_gib_is_for_people():
    assert gib(15032385536) == "14.00 GiB"


def filters():
    spec = importlib.util.spec_from_file_location("sizes_filter", ROOT / "plugins/filter/sizes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FilterModule().filters()


def test_the_filters_are_the_same_functions():
    found = filters()
    assert found["to_bytes"]("14G") == 15032385536
    assert found["human_bytes"](15032385536) == "14G"
    assert found["gib"]("14G") == "14.00 GiB"


@pytest.mark.parametrize(("name", "value"), [("to_bytes", "8GB"), ("human_bytes", -1), ("ledger_table", {"ledger": 1})])
def test_a_filter_fails_with_a_message(name, value):
    with pytest.raises(AnsibleFilterError) as error:
        filters()[name](value)
    assert "Traceback" not in str(error.value)
