"""KV-cache accounting of vLLM 0.20 to 0.23 for DeepSeek V4 (FP8 MLA, block size 256), in its own pages.

Every figure follows vLLM's arithmetic (vllm/v1/core/kv_cache_utils.py and the model's cache specs) and was checked
against what vLLM
logged: on GB10 and on an H200, 6G at 200,000 tokens, 4,096 batched tokens and MTP gives 537,516 tokens, 2.69x; on an
H200, 14G at 8,192 without MTP gives 762,036 tokens, 3.81x. Releases from 0.24 on count otherwise.

Two figures are given, because vLLM's logged one flatters. It divides the pool by a request's bytes as if every layer's
pages were packed; what admission takes are whole blocks of the pool, one for each page of each group of layers. Both
are reported; `min_bytes` is by the second.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..sizes import human_bytes
from .config import DeepSeekV4
from .types import KvFit

ACCOUNTING = "DeepSeek V4 FP8 MLA, vLLM 0.20 to 0.23, block size 256"

_BLOCK_TOKENS = 256  # block-size of every profile
_SWA_TOKENS = 64  # tokens in one page of a sliding-window layer
_C4_STATE_TOKENS = 4  # tokens in one page of a ratio-4 layer's compressor state
_C128_STATE_TOKENS = 8  # tokens in one page of a ratio-128 layer's compressor state
_ALIGN = 576  # bytes to which every page is rounded up


@dataclass(frozen=True, slots=True)
class Accounting:
    """Page sizes (bytes) and layer counts of one model; see `accounting_of`.

    Attributes:
        c4_layers: Layers with a sparse indexer (ratio 4).
        c128_layers: Layers of ratio 128.
        swa_layers: Layers with a sliding window: all of them, drafters included.
        window: Tokens of the sliding window.
        c4_page: A ratio-4 layer's compressed keys for 256 tokens.
        c128_page: The same at ratio 128.
        indexer_page: A ratio-4 layer's indexer keys for 256 tokens.
        swa_page: A sliding-window layer's keys for 64 tokens.
    """

    c4_layers: int
    c128_layers: int
    swa_layers: int
    window: int
    c4_page: int
    c128_page: int
    indexer_page: int
    swa_page: int

    @property
    def group_layers(self) -> int:
        """Layers that share one block table: the sliding-window layers make two groups, and the widest group sets the
        pool's width."""
        return -(-self.swa_layers // 2)

    @property
    def pool_block(self) -> int:
        """Bytes of one block of the pool: one page of each kind for every layer of the widest group."""
        return self.group_layers * (self.c4_page + self.c128_page + self.indexer_page)

    @property
    def full_block(self) -> int:
        """F: bytes of 256 tokens in the layers that keep the whole context."""
        return self.c4_layers * (self.c4_page + self.indexer_page) + self.c128_layers * self.c128_page

    def blocks(self, kv_bytes: int) -> int:
        """Blocks of a pool of `kv_bytes`."""
        return kv_bytes // self.pool_block

    def _pages(self, tokens: int, batched: int) -> tuple[int, int, int, int]:
        """Pages of one request in a layer of each kind: full context, sliding window, ratio-4 state, ratio-128
        state."""
        before = self.window - 1
        return (
            _up(tokens, _BLOCK_TOKENS),
            _up(min(before + batched, tokens), _SWA_TOKENS) + 1,
            _up(min(2 * _C4_STATE_TOKENS - 1 + batched, tokens), _C4_STATE_TOKENS) + 1,
            _up(min(before + batched, tokens), _C128_STATE_TOKENS) + 1,
        )

    def request_bytes(self, tokens: int, batched: int) -> int:
        """Bytes that vLLM reckons for one request of `tokens` with `batched` tokens a step (its max_memory_usage_bytes,
        summed)."""
        full, window, c4_state, c128_state = self._pages(tokens, batched)
        return (
            full * self.full_block
            + window * self.swa_layers * self.swa_page
            + c4_state * self.c4_layers * (self.c4_page + self.indexer_page)
            + c128_state * self.c128_layers * self.swa_page
        )

    def concurrency(self, kv_bytes: int, tokens: int, batched: int) -> float:
        """Requests of `tokens` that vLLM logs for a pool of `kv_bytes` ("Maximum concurrency")."""
        return self.blocks(kv_bytes) / _up(self.request_bytes(tokens, batched), self.full_block)

    def request_blocks(self, tokens: int, batched: int) -> int:
        """Blocks of the pool that admission takes for one request: a block for each page of each group's table."""
        full, window, c4_state, c128_state = self._pages(tokens, batched)
        return full + 2 * window + c4_state + c128_state

    def page_true_concurrency(self, kv_bytes: int, tokens: int, batched: int) -> float:
        """Requests of `tokens` by the blocks that admission takes; the pool keeps one block for itself (BlockPool's
        null block)."""
        return max(self.blocks(kv_bytes) - 1, 0) / self.request_blocks(tokens, batched)

    def min_bytes(self, tokens: int, batched: int, requests: int = 1) -> int:
        """The least pool with which `requests` requests of `tokens` are admitted together, in whole blocks."""
        return (requests * self.request_blocks(tokens, batched) + 1) * self.pool_block


def accounting_of(config: DeepSeekV4, mtp: bool) -> Accounting | None:
    """The accounting of a model, or None where its layers are not those on which it was checked.

    Those are 21 of ratio 4, 20 of ratio 128 and 2 of 0, and one more of 0 with the drafter.
    """
    drafters = config.num_nextn_predict_layers if mtp else 0
    ratios = config.compress_ratios[: config.num_hidden_layers + drafters]
    plain, c4, c128 = (sum(1 for ratio in ratios if ratio == kind) for kind in (0, 4, 128))
    if (c4, c128) != (21, 20) or plain != 2 + drafters or drafters > 1:
        return None
    # One cached token: FP8 for the part without rotation, BF16 for the rotated part, one E8M0 scale for 64 elements,
    # padded to 8 bytes.
    plain_part = config.head_dim - config.qk_rope_head_dim
    entry = plain_part + 2 * config.qk_rope_head_dim + 8 * _up(_up(plain_part, 64), 8)
    # FP8 with one fp32 scale.
    indexer_entry = config.index_head_dim + 4
    return Accounting(
        c4_layers=c4,
        c128_layers=c128,
        swa_layers=len(ratios),
        window=config.sliding_window,
        c4_page=_page(_BLOCK_TOKENS // 4 * entry),
        c128_page=_page(_BLOCK_TOKENS // 128 * entry),
        indexer_page=_page(_BLOCK_TOKENS // 4 * indexer_entry),
        swa_page=_page(_SWA_TOKENS * entry),
    )


def kv_fit(accounting: Accounting | None, model_type: str, kv_bytes: int, tokens: int, batched: int) -> KvFit:
    """What a pool of `kv_bytes` holds at `tokens` of context and `batched` tokens a step."""
    if accounting is None:
        reason = (
            f"no KV accounting is known for a {model_type} model with these layers:"
            f" {human_bytes(kv_bytes)} are reserved as given"
        )
        return KvFit(None, None, None, None, None, None, reason)
    logged = accounting.concurrency(kv_bytes, tokens, batched)
    true = accounting.page_true_concurrency(kv_bytes, tokens, batched)
    return KvFit(
        accounting=ACCOUNTING,
        tokens=int(logged * tokens),
        concurrency=logged,
        page_true_tokens=int(true * tokens),
        page_true_concurrency=true,
        min_bytes=accounting.min_bytes(tokens, batched),
        reason=None,
    )


def _up(value: int, unit: int) -> int:
    return -(-value // unit)


def _page(size: int) -> int:
    return _up(size, _ALIGN) * _ALIGN
