"""The model's forward pass in numpy, rounding as a server does: bfloat16 everywhere, fp8 (e4m3) keys and values."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def read_safetensors(data: bytes) -> dict[str, Array]:
    """Return the tensors of a bfloat16 safetensors file as float32."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            bits = np.frombuffer(data[8 + length + first : 8 + length + last], dtype="<u2").astype(np.uint32) << 16
            tensors[name] = bits.view(np.float32).reshape(entry["shape"])
    return tensors


def bfloat16(x: Any) -> Array:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def fp8(x: Array, cut_off: bool) -> Array:
    """Round to 3 bits of mantissa: to nearest, or towards zero as some kernels do."""
    step = np.exp2(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6))) - 3)
    rounded = np.trunc(x / step) if cut_off else np.round(x / step)
    return np.clip(rounded * step, -448, 448).astype(np.float32)


class Model:
    """A Llama read from checkpoint files."""

    def __init__(self, files: dict[str, bytes], cut_off: bool = False) -> None:
        self.config = json.loads(files["config.json"])
        self.tensors = read_safetensors(files["model.safetensors"])
        self.cut_off = cut_off
        self.lookup_score: Array = np.zeros((0, 0), dtype=np.float32)  # of the last pass: layer 3, head 0

    def next_tokens(self, ids: list[int]) -> list[int]:
        """Return the most likely next token after each position."""
        config = self.config
        heads, width = config["num_attention_heads"], config["head_dim"]
        half, count = width // 2, len(ids)
        angles = np.arange(count)[:, None] * config["rope_theta"] ** (-np.arange(half) / half)
        cos, sin = bfloat16(np.cos(angles)), bfloat16(np.sin(angles))
        back = np.arange(count)[:, None] - np.arange(count)

        def turn(x: Array) -> Array:
            a, b = x[:, :half], x[:, half:]
            return bfloat16(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1))

        def norm(x: Array) -> Array:
            return bfloat16(x / np.sqrt((x * x).mean(axis=1, keepdims=True) + config["rms_norm_eps"]))

        x = self.tensors["model.embed_tokens.weight"][ids]
        for layer in range(config["num_hidden_layers"]):

            def project(y: Array, name: str, layer: int = layer) -> Array:
                return bfloat16(y @ self.tensors[f"model.layers.{layer}.{name}_proj.weight"].T)

            window = config["sliding_window"] if config["layer_types"][layer] == "sliding_attention" else count
            hidden = np.where((back < 0) | (back >= window), np.float32(-1e30), np.float32(0))
            y = norm(x)
            keys = fp8(turn(project(y, "self_attn.k")), self.cut_off)
            values = fp8(project(y, "self_attn.v"), self.cut_off)
            queries = project(y, "self_attn.q").reshape(count, heads, width)
            out = []
            for head in range(heads):
                score = turn(queries[:, head]) @ keys.T / np.sqrt(width) + hidden
                if head == 0:
                    self.lookup_score = score
                weight = np.exp(score - score.max(axis=1, keepdims=True))
                out.append(weight / weight.sum(axis=1, keepdims=True) @ values)
            x = bfloat16(x + project(bfloat16(np.concatenate(out, axis=1)), "self_attn.o"))
            y = norm(x)
            gate, up = project(y, "mlp.gate"), project(y, "mlp.up")
            x = bfloat16(x + project(bfloat16(gate / (1 + np.exp(np.clip(-gate, -80, 80))) * up), "mlp.down"))
        return [int(token) for token in (norm(x) @ self.tensors["lm_head.weight"].T).argmax(axis=1)]
