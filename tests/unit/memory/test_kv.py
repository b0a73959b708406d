"""KV-cache accounting, to the token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reap.memory.config import flash
from reap.memory.kv import ACCOUNTING, accounting_of, kv_fit
from reap.sizes import GIB, to_bytes


@pytest.mark.parametrize(
    ("kv", "batched", "mtp", "tokens", "concurrency", "page_true"),
    [
        ("6G", 4096, True, 537_516, 2.69, 2.48),  # logged on GB10 and on an H200
        ("14G", 8192, False, 762_036, 3.81, 3.46),  # logged on an H200
    ],
)
def test_logged_figures_to_the_token(kv, batched, mtp, tokens, concurrency, page_true):
    found = kv_fit(accounting_of(flash(144), mtp), "deepseek_v4", to_bytes(kv), 200_000, batched)
    assert found.tokens == tokens
    assert round(found.concurrency, 2) == concurrency
    assert round(found.page_true_concurrency, 2) == page_true
    assert found.page_true_tokens == int(found.page_true_concurrency * 200_000)
    assert found.page_true_tokens < tokens
    assert found.accounting == ACCOUNTING
    assert "0.20 to 0.23" in ACCOUNTING


def test_pages_and_blocks():
    accounting = accounting_of(flash(160), True)
    assert (accounting.c4_page, accounting.c128_page, accounting.indexer_page, accounting.swa_page) == (
        37_440,
        1_728,
        8_640,
        37_440,
    )
    assert accounting.pool_block == 1_051_776
    assert accounting.full_block == 1_002_240
    assert accounting.blocks(to_bytes("6G")) == 6125
    assert -(-accounting.request_bytes(200_000, 4096) // accounting.full_block) == 2279


@pytest.mark.parametrize(("batched", "gib"), [(2048, 1.61), (4096, 2.42), (8192, 4.05)])
def test_the_least_for_one_request(batched, gib):
    least = accounting_of(flash(144), False).min_bytes(200_000, batched)
    assert least / GIB == pytest.approx(gib, abs=0.006)
    assert least % 1_051_776 == 0


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("batched", [1, 2048, 8192, 300_000])
def test_the_least_is_the_least(mtp, batched):
    accounting = accounting_of(flash(144), mtp)
    least = accounting.min_bytes(200_000, batched)
    assert accounting.page_true_concurrency(least, 200_000, batched) >= 1
    assert accounting.page_true_concurrency(least - 1, 200_000, batched) < 1
    # vLLM's own check at start asks for less, so a cache of this size passes it too.
    assert accounting.request_bytes(200_000, batched) <= least


def test_it_does_not_depend_on_k():
    assert accounting_of(flash(130), True) == accounting_of(flash(256), True)


def test_other_layers_have_no_accounting_and_say_so():
    config = flash(144)
    other = replace(config, compress_ratios=(0, *config.compress_ratios[1:2], 128, *config.compress_ratios[3:]))
    assert accounting_of(other, False) is None
    found = kv_fit(None, "llama", to_bytes("512M"), 32_768, 8192)
    assert (found.tokens, found.concurrency, found.min_bytes) == (None, None, None)
    assert "llama" in found.reason
    assert "512M" in found.reason
