"""A checkpoint's config.json, as far as memory depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..safetensors import read_json

# DeepSeek V4 Flash, from the published config.json of the unpruned model; K is the only thing that REAP changes.
FLASH_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "num_hash_layers": 3,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "hc_mult": 4,
    "max_position_embeddings": 1048576,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
}


@dataclass(frozen=True, slots=True)
class DeepSeekV4:
    """Geometry of a DeepSeek V4 checkpoint; every field is the config.json key of the same name, in elements.

    `compress_ratios` has one entry for each layer and one for each drafter layer: 0 is a sliding-window layer, 4 one
    with a sparse indexer.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_hash_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    index_n_heads: int
    index_head_dim: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    hc_mult: int
    max_position_embeddings: int
    sliding_window: int
    compress_ratios: tuple[int, ...]

    def with_experts(self, routed_experts: int) -> DeepSeekV4:
        """The same model pruned to K = `routed_experts` in every layer."""
        return replace(self, n_routed_experts=routed_experts)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What config.json says.

    Attributes:
        model_type: Its model_type.
        deepseek: The geometry, where it is a DeepSeek V4.
        routed_experts: n_routed_experts, where it has one.
        layers: num_hidden_layers, where it has one.
    """

    model_type: str
    deepseek: DeepSeekV4 | None
    routed_experts: int | None
    layers: int | None


def flash(routed_experts: int) -> DeepSeekV4:
    """DeepSeek V4 Flash with K routed experts in each layer."""
    return parse_deepseek(FLASH_CONFIG, "DeepSeek V4 Flash").with_experts(routed_experts)


def read_config(folder: Path) -> ModelConfig:
    """config.json of a checkpoint folder.

    Raises:
        ReapError: Unreadable, no JSON object, no model_type, or a deepseek_v4 config that lacks a key or has one out of
            range.
    """
    path = folder / "config.json"
    found = read_json(path, 5_000_000)
    if not isinstance(found, dict):
        raise ReapError(f"{path} holds {type(found).__name__}, not an object: download the revision again")
    model_type = found.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ReapError(f"{path} has no model_type: it is no model's config.json")
    deepseek = parse_deepseek(found, str(path)) if model_type == "deepseek_v4" else None
    return ModelConfig(
        model_type, deepseek, _optional(found, "n_routed_experts"), _optional(found, "num_hidden_layers")
    )


def parse_deepseek(config: Mapping[str, Any], where: str) -> DeepSeekV4:
    """The geometry of a deepseek_v4 config.

    Raises:
        ReapError: A key is missing, is no positive whole number, or compress_ratios does not cover the layers.
    """
    values: dict[str, Any] = {}
    for key in FLASH_CONFIG:
        if key == "model_type":
            continue
        if key not in config:
            raise ReapError(f"{where} has no {key}, which a deepseek_v4 model needs: download the revision again")
        values[key] = config[key]
    ratios = values.pop("compress_ratios")
    least = {"num_nextn_predict_layers": 0, "num_hash_layers": 0, "n_shared_experts": 0}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least.get(key, 1) <= value <= 2**31:
            raise ReapError(f"{where}: {key} is {value!r}; a whole number of at least {least.get(key, 1)} is wanted")
    layers, drafters = values["num_hidden_layers"], values["num_nextn_predict_layers"]
    if layers + drafters > 10_000 or values["n_routed_experts"] > 100_000:
        raise ReapError(f"{where}: {layers} layers of {values['n_routed_experts']} experts are no DeepSeek V4 model")
    if values["num_hash_layers"] > layers or values["qk_rope_head_dim"] > values["head_dim"]:
        raise ReapError(f"{where}: num_hash_layers or qk_rope_head_dim is larger than what it is a part of")
    if not isinstance(ratios, list) or not all(
        isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in ratios
    ):
        raise ReapError(f"{where}: compress_ratios is {str(ratios)[:60]}; a list of whole numbers is wanted")
    if len(ratios) < layers + drafters:
        raise ReapError(
            f"{where}: compress_ratios has {len(ratios)} entries for {layers} layers and {drafters} drafter layers"
        )
    # Later checkpoints pad the list; what lies past the drafters belongs to no layer.
    return DeepSeekV4(**values, compress_ratios=tuple(ratios[: layers + drafters]))


def _optional(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
