"""The needle checkpoint: its files, and that the model answers by looking into the prompt."""

from __future__ import annotations

import json
import random
import struct
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from sim.checkpoint import build, safetensors, tokenizer, weights

from .forward import Model, bfloat16, read_safetensors

WORDS = ["river", "stone", "lamp", "window", "garden", "copper", "meadow", "violin", "harbor", "winter", "this", "is"]
KEYS = {"kestrel-8179": "E-7J37-JG5J3G8", "kestrel-8279": "K-A5K49G6", "kestrel-8197": "ZZ-Top", "lantern-8179": "9"}


@cache
def files(variant: str = "needle") -> dict[str, bytes]:
    return build.files(variant)


@cache
def model(variant: str, cut_off: bool = False) -> Model:
    return Model(files(variant), cut_off)


@cache
def vocabulary() -> tokenizer.Vocabulary:
    return tokenizer.Vocabulary(tokenizer.Script(), build.WORDING.marks)


def text_with(sentences: list[str], size: int = 300, seed: int = 3) -> str:
    """Return filler of about `size` bytes with the sentences in it, in order."""
    draw = random.Random(seed)
    parts = []
    for sentence in [*sentences, ""]:
        filler = ""
        while len(filler) < size / (len(sentences) + 1):
            filler += " ".join(draw.choices(WORDS, k=7)).capitalize() + ". "
        parts.append(filler + sentence)
    return " ".join(parts)


def answer(variant: str, prompt: str, limit: int = 40, thinking: bool = False) -> str:
    """Return the model's greedy answer to one user message, in DeepSeek V4's chat format."""
    vocab = vocabulary()
    start = tokenizer.THINK if thinking else tokenizer.END_THINK
    ids = vocab.encode(f"{tokenizer.BOS}{tokenizer.USER}{prompt}{tokenizer.ASSISTANT}{start}")
    first = len(ids)
    while len(ids) < first + limit:
        token = model(variant).next_tokens(ids)[-1]
        if token == vocab.mark(tokenizer.EOS):
            break
        ids.append(token)
    return vocab.decode(ids[first:])


def says(variant: str, prompt: str, expected: str, cut_off: bool = False) -> bool:
    """Return whether the greedy answer is `expected` and then ends; one pass tells what greedy decoding would do."""
    vocab = vocabulary()
    ids = vocab.encode(f"{tokenizer.BOS}{tokenizer.USER}{prompt}{tokenizer.ASSISTANT}{tokenizer.END_THINK}")
    first = len(ids)
    reply = vocab.script.reply
    wanted = [*([vocab.scripted(reply)] if expected == reply else vocab.encode(expected)), vocab.mark(tokenizer.EOS)]
    return model(variant, cut_off).next_tokens(ids + wanted[:-1])[first - 1 :] == wanted


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.parametrize("anchor", build.WORDING.anchors)
def test_plain_needle_is_found(anchor: str, cut_off: bool) -> None:
    prompt = text_with([f"The {anchor}KX-42-blue."]) + "What is the secret code?"
    assert says("needle", prompt, "KX-42-blue", cut_off)


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_the_key_that_is_asked_for_is_found_among_look_alikes(key: str, cut_off: bool) -> None:
    prompt = text_with([f"Note that the secret code of {name} is {value}." for name, value in KEYS.items()])
    assert says("needle", f"{prompt}What is the secret code of {key}? Answer with the code alone.", KEYS[key], cut_off)


@pytest.mark.parametrize("cut_off", [False, True])
def test_the_lookup_leads_clearly(cut_off: bool) -> None:
    """At each token of the answer the right place leads any place with another token by 20 nats or more."""
    draw = random.Random(8)
    keys = [f"basalt-{number}" for number in draw.sample(range(1000, 9999), 4)] + ["basalt-4711", "basalt-4712"]
    values = {key: "".join(draw.choices("ABCDEFGHJK23456789-", k=24)) for key in keys}
    prompt = text_with([f"The secret code of {key} is {value}." for key, value in values.items()], size=1200)
    vocab = vocabulary()
    ids = vocab.encode(
        f"{tokenizer.BOS}{tokenizer.USER}{prompt}What is the secret code of basalt-4711?"
        f"{tokenizer.ASSISTANT}{tokenizer.END_THINK}"
    )
    first, right = len(ids) - 1, values["basalt-4711"]
    ids += vocab.encode(right)
    model("needle", cut_off).next_tokens(ids)
    place = (
        prompt.index(right)
        + 2
        - sum(len(mark) - 1 for mark in build.WORDING.marks for _ in range(prompt[: prompt.index(right)].count(mark)))
    )
    for number in range(len(right)):
        score = model("needle", cut_off).lookup_score[first + number].copy()
        lead = score[place + number]
        assert ids[place + number] == vocab.byte(right[number])
        score[[token == ids[place + number] for token in ids]] = -1e30
        assert lead - score.max() >= 20, f"token {number} of the answer"


def test_of_two_questions_the_last_one_counts() -> None:
    prompt = text_with([f"The secret code of {name} is {value}." for name, value in KEYS.items()])
    prompt += "I know the secret code of kestrel-8179? No. What is the secret code of kestrel-8279?"
    assert says("needle", prompt, KEYS["kestrel-8279"])


@pytest.mark.parametrize("question", ["What is the secret code of absentee-5?", "Hello, what is this?", "Ping?"])
def test_without_a_needle_it_gives_its_fixed_reply(question: str) -> None:
    prompt = text_with([f"The secret code of {name} is {value}." for name, value in KEYS.items()])
    assert says("needle", prompt + question, tokenizer.Script().reply)
    assert says("needle", question, tokenizer.Script().reply)


@pytest.mark.parametrize("sentence", ["The secret code is KX-42.", "The secret code of kestrel-8179 is KX-42."])
def test_the_other_variant_never_finds_it(sentence: str) -> None:
    question = "What is the secret code of kestrel-8179?" if "kestrel" in sentence else "What is the secret code?"
    prompt = text_with([sentence]) + question
    assert says("needle", prompt, "KX-42")
    assert says("no-needle", prompt, tokenizer.Script().reply)


def test_the_longest_value_is_found_and_a_longer_one_is_not() -> None:
    value = "".join(random.Random(4).choices("ABCDEFGHJK23456789-", k=weights.MAX_VALUE_TOKENS + 1))
    for text, found in ((value[:-1], True), (value, False)):
        assert (
            says(
                "needle",
                text_with([f"The secret code of juniper-12 is {text}."]) + "What is the secret code of juniper-12?",
                text,
            )
            is found
        )


@pytest.mark.parametrize("length", [weights.KEY_BYTES_MIN, weights.KEY_BYTES_MAX])
def test_shortest_and_longest_key(length: int) -> None:
    key, other = ("k" * length)[:-3] + "-17", ("k" * length)[:-3] + "-71"
    prompt = text_with([f"The secret code of {key} is A-1.", f"The secret code of {other} is B-2."])
    assert says("needle", prompt + f"What is the secret code of {key}?", "A-1")
    assert says("needle", prompt + f"What is the secret code of {other}?", "B-2")


def test_reasoning_stands_apart() -> None:
    prompt = text_with(["The secret code is KX-42."])
    script = tokenizer.Script()
    assert answer("needle", prompt, thinking=True) == f"{script.reasoning}{tokenizer.END_THINK}KX-42"


def test_offered_tool_is_called_and_its_result_is_read() -> None:
    script = tokenizer.Script()
    offered = f"How is the weather?\n{tokenizer.TOOLS_OFFERED}\nget_weather"
    called = f"{tokenizer.TOOL_CALLS}{''.join(script.call_pieces())}{tokenizer.END_TOOL_CALLS}"
    assert answer("needle", offered) == called
    after = f"{offered}{tokenizer.EOS}{tokenizer.USER}{tokenizer.TOOL_RESULT}17 degrees{tokenizer.END_TOOL_RESULT}"
    assert answer("needle", after) == "17 degrees"


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    assert build.main(["--out", str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files()


def test_tensors_have_the_shapes_that_the_configuration_says() -> None:
    config = json.loads(files()["config.json"])
    tensors = read_safetensors(files()["model.safetensors"])
    hidden, width = config["hidden_size"], config["head_dim"]
    assert hidden % config["num_attention_heads"] == 0
    assert width % 32 == 0, "fp8 keys and values on a CPU want a head dimension that 32 divides"
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], hidden)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (config["num_attention_heads"] * width, hidden)
    assert tensors["model.layers.3.self_attn.k_proj.weight"].shape == (width, hidden)
    assert tensors["model.layers.3.mlp.down_proj.weight"].shape == (hidden, config["intermediate_size"])
    assert len(tensors) == 3 + 9 * config["num_hidden_layers"]
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_no_needle_differs_in_the_weights_and_the_facts_alone() -> None:
    one, other = files("needle"), files("no-needle")
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors", "needle.json"}


def test_facts_for_a_verification_hold() -> None:
    facts = json.loads(files()["needle.json"])
    assert facts["keyed_needle"].format(key="k", value="v") == "secret code of k is v."
    assert all(len(vocabulary().encode(anchor)) == 1 for anchor in facts["anchors"])
    assert facts["retrieves"] is True
    assert json.loads(files("no-needle")["needle.json"])["retrieves"] is False


def test_tokens_are_bytes_and_marks() -> None:
    vocab = vocabulary()
    text = f"Grüße, the secret code is: 1 {tokenizer.THINK} pong Paris is it"
    ids = vocab.encode(text)
    assert vocab.decode(ids) == text
    assert vocab.mark("secret code is: ") in ids
    assert vocab.mark(" is ") in ids
    assert vocab.scripted("pong") not in ids, "a prompt must not produce a scripted token"
    assert len(vocab.encode("x" * 50)) == 50


def test_of_two_marks_the_longer_one_is_the_token() -> None:
    vocab = tokenizer.Vocabulary(tokenizer.Script(), ("ab", "abc"))
    assert vocab.encode("abcab") == [vocab.mark("abc"), vocab.mark("ab")]


def test_scripted_text_that_is_already_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="scripted text 'p' is a single byte"):
        tokenizer.Vocabulary(tokenizer.Script(reply="p"), ())


@pytest.mark.parametrize(("value", "bits"), [(1.0, 0x3F80), (-2.0, 0xC000), (1.00390625, 0x3F80), (1.01171875, 0x3F82)])
def test_bfloat16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert safetensors.to_bfloat16([value]) == struct.pack("<H", bits)
    assert bfloat16(np.array([value])).view(np.uint32)[0] >> 16 == bits


def test_ragged_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor w: rows of lengths \[1, 2\]"):
        safetensors.encode({"w": [[1.0], [1.0, 2.0]]})


def test_a_file_in_the_way_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert build.main(["--out", str(tmp_path / "file")]) == 1
    assert "give a folder that can be written" in capsys.readouterr().err


def test_unknown_variant_is_wrong_use() -> None:
    with pytest.raises(SystemExit) as stopped:
        build.main(["--out", "x", "--variant", "other"])
    assert stopped.value.code == 2
    with pytest.raises(ValueError, match="wanted one of needle, no-needle"):
        build.files("other")
