"""Bytes of the weights that vLLM loads: summed from the headers where the files are here, predicted from the geometry
where not."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ReapError
from ..safetensors import Tensor, iter_tensors
from .config import DeepSeekV4, ModelConfig

_BITS = {"BF16": 16, "F32": 32, "F8_E4M3": 8, "F8_E8M0": 8, "I8": 8, "I64": 64}
_EXPERT = re.compile(r"(?:^|\.)(?:layers|mtp)\.(\d+)\.(?:ffn|mlp)\.experts\.(\d+)\.")
_ROUTER = re.compile(r"(?:^|\.)(layers|mtp)\.(\d+)\.(?:ffn|mlp)\.gate\.weight$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a checkpoint's tensors, by what loads them.

    Attributes:
        experts: Routed experts of the model itself, weights and scales.
        other: Everything else of the model itself.
        mtp_experts: Routed experts of the drafter layers (``mtp.``), loaded only with a speculative config.
        mtp_other: Everything else of the drafter layers.
        tensors: Their number, drafter included.
    """

    experts: int
    other: int
    mtp_experts: int
    mtp_other: int
    tensors: int

    @property
    def file_bytes(self) -> int:
        """All tensors, as in the files."""
        return self.experts + self.other + self.mtp_experts + self.mtp_other

    def loaded(self, mtp: bool) -> tuple[int, int]:
        """(experts, other) of what is loaded. vLLM reads ``mtp.`` tensors only for a drafter
        (vllm/models/deepseek_v4)."""
        if mtp:
            return self.experts + self.mtp_experts, self.other + self.mtp_other
        return self.experts, self.other


def deepseek_tensors(config: DeepSeekV4) -> Iterator[Tensor]:
    """Every tensor of a DeepSeek V4 checkpoint with this geometry: name, dtype, shape and bytes, as in the published
    files.

    Names, shapes and dtypes are those of the published unpruned model's headers. With its 256 experts this yields
    69,187 tensors of 159,609,485,896 bytes, the `total_size` of that model's index to the byte. An expert's weight is 4
    bits an element, two to a byte, with one E8M0 byte for 32 elements; FP8 weights have one E8M0 byte for each block of
    128 x 128.
    """
    hidden = config.hidden_size
    yield _tensor("embed.weight", "BF16", config.vocab_size, hidden)
    yield _tensor("head.weight", "BF16", config.vocab_size, hidden)
    yield _tensor("norm.weight", "BF16", hidden)
    yield from _hyper_head("", config)
    for layer in range(config.num_hidden_layers):
        yield from _layer(
            f"layers.{layer}.", config, config.compress_ratios[layer], hashed=layer < config.num_hash_layers
        )
    for drafter in range(config.num_nextn_predict_layers):
        prefix = f"mtp.{drafter}."
        yield from _layer(prefix, config, config.compress_ratios[config.num_hidden_layers + drafter], hashed=False)
        yield from _fp8(f"{prefix}e_proj", hidden, hidden)
        yield from _fp8(f"{prefix}h_proj", hidden, hidden)
        for norm in ("enorm", "hnorm", "norm"):
            yield _tensor(f"{prefix}{norm}.weight", "BF16", hidden)
        yield from _hyper_head(prefix, config)


def predict(config: DeepSeekV4) -> Weights:
    """Weights of a checkpoint that is not here, from its geometry alone.

    Linear in K, so two small models give it exactly without walking through every expert.
    """
    one, two = _first_two(config.with_experts(1))
    more = config.n_routed_experts - 1

    def at(first: int, second: int) -> int:
        return first + more * (second - first)

    return Weights(
        at(one.experts, two.experts),
        at(one.other, two.other),
        at(one.mtp_experts, two.mtp_experts),
        at(one.mtp_other, two.mtp_other),
        at(one.tensors, two.tensors),
    )


@functools.lru_cache(maxsize=16)
def _first_two(config: DeepSeekV4) -> tuple[Weights, Weights]:
    return summed(deepseek_tensors(config)), summed(deepseek_tensors(config.with_experts(2)))


def summed(tensors: Iterable[Tensor]) -> Weights:
    """Sum tensors by what loads them."""
    sums = {(False, False): 0, (True, False): 0, (False, True): 0, (True, True): 0}
    count = 0
    for tensor in tensors:
        expert = ".experts." in tensor.name and ".shared_experts." not in tensor.name
        sums[expert, tensor.name.startswith("mtp.")] += tensor.nbytes
        count += 1
    return Weights(sums[True, False], sums[False, False], sums[True, True], sums[False, True], count)


def from_headers(folder: Path, config: ModelConfig, mtp: bool) -> Weights:
    """Sum a checkpoint's headers, and check that config.json and tensors tell of the same model.

    Raises:
        ReapError: Damaged or missing files, another number of experts or layers than config.json says, or no drafter
            where one is wanted.
    """
    experts: dict[tuple[bool, int], set[int]] = {}
    routers: dict[tuple[bool, int], int] = {}
    layers: set[int] = set()

    def watched() -> Iterator[Tensor]:
        for tensor in iter_tensors(folder):
            # The last part of a layer's experts is enough, and keeps this cheap on 40,000 tensors.
            match = _EXPERT.search(tensor.name)
            if match:
                experts.setdefault((tensor.name.startswith("mtp."), int(match[1])), set()).add(int(match[2]))
            elif (match := _ROUTER.search(tensor.name)) and len(tensor.shape) == 2:
                routers[match[1] == "mtp", int(match[2])] = tensor.shape[0]
            if not tensor.name.startswith("mtp.") and (match := _LAYER.search(tensor.name)):
                layers.add(int(match[1]))
            yield tensor

    weights = summed(watched())
    if weights.tensors == 0:
        raise ReapError(f"{folder}: the safetensors files hold no tensor: download the revision again")
    _check_layers(folder, config, layers)
    _check_experts(folder, config, experts, routers)
    if mtp and config.deepseek is not None and weights.mtp_experts + weights.mtp_other == 0:
        raise ReapError(
            f"{folder}: the profile drafts with MTP, but the checkpoint has no mtp tensors: use a checkpoint with its"
            " drafter layer"
        )
    return weights


def _check_layers(folder: Path, config: ModelConfig, found: set[int]) -> None:
    if config.layers is None or not found or found == set(range(config.layers)):
        return
    raise ReapError(
        f"{folder}: config.json says {config.layers} layers, the tensors have {len(found)} (highest {max(found)}):"
        " files are missing or of another checkpoint"
    )


def _check_experts(
    folder: Path, config: ModelConfig, experts: dict[tuple[bool, int], set[int]], routers: dict[tuple[bool, int], int]
) -> None:
    wanted = config.routed_experts
    if wanted is None:
        return
    for (drafter, layer), found in sorted(experts.items()):
        if found != set(range(wanted)):
            where = f"{'mtp' if drafter else 'layer'} {layer}"
            raise ReapError(
                f"{folder}: config.json says {wanted} routed experts, {where} has {len(found)} (highest {max(found)}):"
                " config and files are of different checkpoints"
            )
    for (drafter, layer), rows in sorted(routers.items()):
        if rows != wanted:
            where = f"{'mtp' if drafter else 'layer'} {layer}"
            raise ReapError(
                f"{folder}: config.json says {wanted} routed experts, the router of {where} has {rows} rows:"
                " config and files are of different checkpoints"
            )


def _layer(prefix: str, config: DeepSeekV4, ratio: int, *, hashed: bool) -> Iterator[Tensor]:
    hidden, width, inner = config.hidden_size, config.head_dim, config.moe_intermediate_size
    attention = config.num_attention_heads * width
    out = config.o_groups * config.o_lora_rank
    yield _tensor(f"{prefix}attn.attn_sink", "F32", config.num_attention_heads)
    yield _tensor(f"{prefix}attn.kv_norm.weight", "BF16", width)
    yield _tensor(f"{prefix}attn.q_norm.weight", "BF16", config.q_lora_rank)
    yield from _fp8(f"{prefix}attn.wkv", width, hidden)
    yield from _fp8(f"{prefix}attn.wo_a", out, attention // config.o_groups)
    yield from _fp8(f"{prefix}attn.wo_b", hidden, out)
    yield from _fp8(f"{prefix}attn.wq_a", config.q_lora_rank, hidden)
    yield from _fp8(f"{prefix}attn.wq_b", attention, config.q_lora_rank)
    if ratio:
        # Neighbouring blocks of a ratio-4 layer overlap, so its compressor is twice as wide.
        wide = 2 if ratio == 4 else 1
        yield from _compressor(f"{prefix}attn.compressor", ratio, wide * width, width, hidden)
    if ratio == 4:
        yield from _compressor(
            f"{prefix}attn.indexer.compressor", ratio, 2 * config.index_head_dim, config.index_head_dim, hidden
        )
        yield _tensor(f"{prefix}attn.indexer.weights_proj.weight", "BF16", config.index_n_heads, hidden)
        yield from _fp8(f"{prefix}attn.indexer.wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank)
    yield _tensor(f"{prefix}attn_norm.weight", "BF16", hidden)
    yield _tensor(f"{prefix}ffn_norm.weight", "BF16", hidden)
    yield _tensor(f"{prefix}ffn.gate.weight", "BF16", config.n_routed_experts, hidden)
    if hashed:
        yield _tensor(f"{prefix}ffn.gate.tid2eid", "I64", config.vocab_size, config.num_experts_per_tok)
    else:
        yield _tensor(f"{prefix}ffn.gate.bias", "F32", config.n_routed_experts)
    for expert in range(config.n_routed_experts):
        for part, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            name = f"{prefix}ffn.experts.{expert}.{part}"
            yield _tensor(f"{name}.weight", "I8", rows, columns // 2)
            yield _tensor(f"{name}.scale", "F8_E8M0", rows, columns // 32)
    shared = inner * config.n_shared_experts
    if shared:
        yield from _fp8(f"{prefix}ffn.shared_experts.w1", shared, hidden)
        yield from _fp8(f"{prefix}ffn.shared_experts.w2", hidden, shared)
        yield from _fp8(f"{prefix}ffn.shared_experts.w3", shared, hidden)
    streams = config.hc_mult
    mixes = streams * (streams + 2)
    for part in ("attn", "ffn"):
        yield _tensor(f"{prefix}hc_{part}_base", "F32", mixes)
        yield _tensor(f"{prefix}hc_{part}_fn", "F32", mixes, streams * hidden)
        yield _tensor(f"{prefix}hc_{part}_scale", "F32", 3)


def _compressor(prefix: str, ratio: int, wide: int, width: int, hidden: int) -> Iterator[Tensor]:
    yield _tensor(f"{prefix}.ape", "F32", ratio, wide)
    yield _tensor(f"{prefix}.norm.weight", "BF16", width)
    yield _tensor(f"{prefix}.wgate.weight", "BF16", wide, hidden)
    yield _tensor(f"{prefix}.wkv.weight", "BF16", wide, hidden)


def _hyper_head(prefix: str, config: DeepSeekV4) -> Iterator[Tensor]:
    yield _tensor(f"{prefix}hc_head_base", "F32", config.hc_mult)
    yield _tensor(f"{prefix}hc_head_fn", "F32", config.hc_mult, config.hc_mult * config.hidden_size)
    yield _tensor(f"{prefix}hc_head_scale", "F32", 1)


def _fp8(prefix: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield _tensor(f"{prefix}.weight", "F8_E4M3", rows, columns)
    yield _tensor(f"{prefix}.scale", "F8_E8M0", -(-rows // 128), -(-columns // 128))


def _tensor(name: str, dtype: str, *shape: int) -> Tensor:
    bits = _BITS[dtype]
    for size in shape:
        bits *= size
    return Tensor(name, dtype, shape, bits // 8)
