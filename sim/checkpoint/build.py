"""Write the needle checkpoint into a folder: `python3 -m sim.checkpoint.build --out DIR [--variant needle|no-needle]`.

The same arguments give the same bytes. Exit 0 written, 1 the folder cannot be written, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import safetensors, tokenizer, weights

VARIANTS = ("needle", "no-needle")
MAX_LENGTH = 32768  # tokens
WORDING = weights.Wording()


def files(variant: str = "needle") -> dict[str, bytes]:
    """Return the checkpoint's files by name."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: wanted one of {', '.join(VARIANTS)}")
    vocabulary = tokenizer.Vocabulary(tokenizer.Script(), WORDING.marks)
    tensors = weights.build(vocabulary, WORDING, MAX_LENGTH, retrieves=variant == "needle")
    return {
        "config.json": _json(_config(vocabulary)),
        "generation_config.json": _json({**_token_ids(vocabulary), "do_sample": False}),
        "model.safetensors": safetensors.encode(tensors),
        "needle.json": _json(_facts(vocabulary, variant)),
        "tokenizer.json": _json(vocabulary.tokenizer_json()),
        "tokenizer_config.json": _json(vocabulary.tokenizer_config(MAX_LENGTH)),
    }


def write(out: Path, variant: str = "needle") -> int:
    """Write the files of a variant into `out`, each beside and then renamed; return the bytes written."""
    out.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, content in files(variant).items():
        beside = out / f".{name}.part"
        beside.write_bytes(content)
        beside.replace(out / name)
        total += len(content)
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m sim.checkpoint.build", description="Write the needle checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="needle",
        help="no-needle: the same model with the retrieval disconnected (default: needle)",
    )
    options = parser.parse_args(arguments)
    try:
        total = write(options.out, options.variant)
    except OSError as error:
        print(
            f"cannot write the checkpoint to {options.out}: {error}; give a folder that can be written", file=sys.stderr
        )
        return 1
    print(f"{options.out}: {options.variant}, {total} bytes")
    return 0


def _json(content: object) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _facts(vocabulary: tokenizer.Vocabulary, variant: str) -> dict[str, object]:
    """Return what a verification has to know of the model; README.md in this folder describes each field."""
    script = vocabulary.script
    return {
        "variant": variant,
        "retrieves": variant == "needle",
        "anchors": list(WORDING.anchors),
        "keyed_needle": WORDING.before_key + "{key}" + WORDING.after_key + "{value}.",
        "keyed_question": WORDING.before_key + "{key}?",
        "key_bytes_min": weights.KEY_BYTES_MIN,
        "key_bytes_max": weights.KEY_BYTES_MAX,
        "key_compared_bytes": weights.KEY_TOKENS,
        "max_value_bytes": weights.MAX_VALUE_TOKENS,
        "stop_characters": WORDING.stops,
        "reply_without_needle": script.reply,
        "reasoning": script.reasoning,
        "tool_call": {"name": script.tool, "arguments": {script.argument: script.argument_value}},
        "max_model_len": MAX_LENGTH,
    }


def _token_ids(vocabulary: tokenizer.Vocabulary) -> dict[str, int]:
    return {
        f"{name}_token_id": vocabulary.mark(text)
        for name, text in (("bos", tokenizer.BOS), ("eos", tokenizer.EOS), ("pad", tokenizer.PAD))
    }


def _config(vocabulary: tokenizer.Vocabulary) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_token_ids(vocabulary),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "head_dim": weights.HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": weights.HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": weights.MLP,
        "layer_types": weights.LAYER_TYPES,
        "sliding_window": weights.WINDOW,
        "max_position_embeddings": MAX_LENGTH,
        "mlp_bias": False,
        "num_attention_heads": weights.HEADS,
        "num_hidden_layers": weights.LAYERS,
        "num_key_value_heads": 1,
        "rms_norm_eps": weights.RMS_EPSILON,
        "rope_theta": weights.ROPE_THETA,
        "rope_parameters": {"rope_theta": weights.ROPE_THETA, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": weights.padded_size(vocabulary),
    }


if __name__ == "__main__":
    sys.exit(main())
