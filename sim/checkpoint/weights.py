"""The weights of the needle model, written down instead of trained.

A Llama of three layers, six query heads, one key/value head; every MLP is zero. Notation: a "channel" is one dimension
of the residual stream.

* Layers 0 and 1 look back by a fixed distance: query and key are constant, and RoPE alone makes the score a function of
  the distance, highest at the head's own one (1..6 in layer 0; 7, 14..42 in layer 1). They carry two marks forward: "an
  anchor was here" and "the answer starts here". After both, each token knows by one-hot channels how many tokens
  (0..48) lie between it and the last anchor, and between it and </think>.
* Layer 2, head 0: token number o of the answer attends to the token that lies o + 1 behind an anchor and copies its
  code. Ranking: result of a tool > tools are offered > needle > beginning of the prompt (the fixed reply).
* The output matrix reads the copied code; scripted tokens follow each other by exact bigrams.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

from . import tokenizer as tk

List2D = list[list[float]]

LAYERS = 3
HEADS = 6
HEAD_DIM = 64
HIDDEN = 288
MLP = 32
ROPE_THETA = 1e18
RMS_EPSILON = 1e-6
SEED = 1

_HALF = HEAD_DIM // 2
_FREQUENCIES = [ROPE_THETA ** (-i / _HALF) for i in range(_HALF)]  # rad a token, of dimension pair (i, i + _HALF)
_MOVING_PAIRS = 8
# From pair 11 on a pair turns by less than 0.03 rad in 32768 tokens: keys there do not depend on the position.
_STILL_DIMS = [dim for pair in range(11, _HALF) for dim in (pair, pair + _HALF)]
# Found by random search: over 1..32767 the score stays 0.15 of its peak below the peak.
_LOOK_BACK_WEIGHTS = (0.3193, 0.1218, 0.0848, 0.1478, 0.0363, 0.1397, 0.0619, 0.088)

_CODE_WIDTH = 64
_DISTANCES = (HEADS + 1) ** 2
_ANSWER_TOKENS = min(_DISTANCES - 1, len(_STILL_DIMS) - 2)
MAX_VALUE_TOKENS = _ANSWER_TOKENS - 2  # the end-of-text token needs one too, and one is spare

# Channels
_CONST = 0
_CODE = 1
_ANCHOR = _CODE + _CODE_WIDTH
_ANSWER = _ANCHOR + _DISTANCES
_OUT = _ANSWER + _DISTANCES
_BALLAST = _OUT + _CODE_WIDTH
_CONTROL = _BALLAST + 1

_MARK = 1.0  # size of an anchor or answer mark
_CONTROL_SIZE = 4.0
_SQUARED_NORM = 100.0  # of every embedding: RMSNorm then divides all tokens by the same number
_RMS = math.sqrt(_SQUARED_NORM / HIDDEN)
_POSITION_GAP = 60.0  # nats between the wanted distance and any other
_LOOKUP_LOGIT = 500.0  # nats of a needle's matching token


@dataclass(frozen=True)
class Layer:
    """Attention matrices of one layer: q and o serve HEADS heads, k and v are shared by all of them."""

    q: List2D
    k: List2D
    v: List2D
    o: List2D


def zeros(rows: int, columns: int) -> List2D:
    """Return a matrix of zeros."""
    return [[0.0] * columns for _ in range(rows)]


def build(vocabulary: tk.Vocabulary, anchors: tuple[str, ...], stops: str, max_length: int,
          retrieves: bool) -> dict[str, List2D | list[float]]:
    """Return all tensors by their Llama names, matrices as [rows][columns].

    `stops` are the one-byte characters that end a value. With `retrieves` false the lookup head does not see answer
    positions, so the model gives its fixed reply whatever the prompt holds.
    """
    rows = padded_size(vocabulary)
    codes = _codes(rows)
    control = _control_channels(vocabulary)
    if _CONTROL + len(control) > HIDDEN:
        raise ValueError(f"{_CONTROL + len(control)} channels needed, HIDDEN is {HIDDEN}")
    layers = [
        _look_back_layer(1, 1, max_length),
        _look_back_layer(HEADS + 1, HEADS + 1, max_length),
        _lookup_layer(vocabulary, control, retrieves),
    ]
    tensors: dict[str, List2D | list[float]] = {
        "model.embed_tokens.weight": _embedding(vocabulary, anchors, stops, codes, control),
        "lm_head.weight": _output(vocabulary, codes, control),
        "model.norm.weight": [1.0] * HIDDEN,
    }
    for number, layer in enumerate(layers):
        prefix = f"model.layers.{number}."
        for name, matrix in (("q", layer.q), ("k", layer.k), ("v", layer.v), ("o", layer.o)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix
        tensors[f"{prefix}mlp.gate_proj.weight"] = zeros(MLP, HIDDEN)
        tensors[f"{prefix}mlp.up_proj.weight"] = zeros(MLP, HIDDEN)
        tensors[f"{prefix}mlp.down_proj.weight"] = zeros(HIDDEN, MLP)
        tensors[f"{prefix}input_layernorm.weight"] = [1.0] * HIDDEN
        tensors[f"{prefix}post_attention_layernorm.weight"] = [1.0] * HIDDEN
    return tensors


def padded_size(vocabulary: tk.Vocabulary) -> int:
    """Return the rows of the embedding: the vocabulary rounded up to 64."""
    return -(-len(vocabulary) // 64) * 64


def _codes(count: int) -> List2D:
    """Return `count` vectors of +1 and -1 whose mutual products are small (the best of ten draws each)."""
    draw = random.Random(SEED)
    codes: list[list[int]] = []
    while len(codes) < count:
        best: tuple[int, list[int]] | None = None
        for _ in range(10):
            code = [draw.choice((-1, 1)) for _ in range(_CODE_WIDTH)]
            worst = max((abs(sum(x * y for x, y in zip(code, other, strict=True))) for other in codes), default=0)
            if best is None or worst < best[0]:
                best = (worst, code)
        assert best is not None
        codes.append(best[1])
    return [[float(x) for x in code] for code in codes]


def _bigrams(vocabulary: tk.Vocabulary) -> list[tuple[int, int]]:
    """Return the pairs (token, next token) that are said word for word."""
    script, mark, said = vocabulary.script, vocabulary.mark, vocabulary.scripted
    chains = (
        [mark(tk.THINK), said(script.reasoning), mark(tk.END_THINK)],
        [said(script.reply), mark(tk.EOS)],
        [mark(tk.TOOL_CALLS), *map(said, script.call_pieces()), mark(tk.END_TOOL_CALLS), mark(tk.EOS)],
    )
    return [pair for chain in chains for pair in pairwise(chain)]


def _control_channels(vocabulary: tk.Vocabulary) -> dict[int, int]:
    """Return the channel of each token that has one of its own."""
    tokens = [first for first, _ in _bigrams(vocabulary)]
    tokens += [vocabulary.mark(tk.BOS), vocabulary.mark(tk.TOOLS_OFFERED)]
    return {token: _CONTROL + number for number, token in enumerate(dict.fromkeys(tokens))}


def _embedding(vocabulary: tk.Vocabulary, anchors: tuple[str, ...], stops: str, codes: List2D,
               control: dict[int, int]) -> List2D:
    mark = vocabulary.mark
    # What is copied in place of a token: a stop character ends the text, the first token of all gives the reply.
    copied_as = {vocabulary.byte(character): mark(tk.EOS) for character in stops}
    copied_as |= {mark(text): mark(tk.EOS) for text in (tk.END_TOOL_RESULT, tk.EOS, tk.USER)}
    copied_as[mark(tk.BOS)] = vocabulary.scripted(vocabulary.script.reply)
    copied_as[mark(tk.TOOLS_OFFERED)] = mark(tk.TOOL_CALLS)
    table = zeros(len(codes), HIDDEN)
    for token, row in enumerate(table):
        row[_CONST] = 1.0
        row[_CODE : _CODE + _CODE_WIDTH] = codes[copied_as.get(token, token)]
    for token, channel in control.items():
        table[token][channel] = _CONTROL_SIZE
    for text in anchors:
        table[mark(text)][_ANCHOR] = _MARK
    table[mark(tk.TOOL_RESULT)][_ANCHOR] = 2 * _MARK  # a tool's result outranks a needle
    table[mark(tk.END_THINK)][_ANSWER] = _MARK
    for row in table:
        row[_BALLAST] = math.sqrt(_SQUARED_NORM - sum(x * x for x in row))
    return table


def _output(vocabulary: tk.Vocabulary, codes: List2D, control: dict[int, int]) -> List2D:
    matrix = zeros(len(codes), HIDDEN)
    never_said = {vocabulary.mark(text) for text in (tk.BOS, tk.PAD, tk.USER, tk.ASSISTANT)}
    for token in range(len(vocabulary)):
        if token not in never_said:
            matrix[token][_OUT : _OUT + _CODE_WIDTH] = [0.5 * x for x in codes[token]]
    for first, following in _bigrams(vocabulary):
        matrix[following][control[first]] = 40.0
    return matrix


def _look_back_peak(max_length: int) -> float:
    """Return the factor of the look-back score that puts _POSITION_GAP nats between its peak and any other distance.

    The score at distance s + x of a head for distance s is the sum of w_i cos(f_i x): RoPE turns query and key of
    pair i by f_i radians a token (Su et al. 2021, RoFormer, section 3.2).
    """
    def score(offset: int) -> float:
        return sum(w * math.cos(f * offset) for w, f in zip(_LOOK_BACK_WEIGHTS, _FREQUENCIES, strict=False))

    behind = max(score(offset) for offset in range(1, max_length))
    ahead = max(score(-offset) for offset in range(1, 64))
    return _POSITION_GAP / (score(0) - max(behind, ahead))


def _look_back_layer(step: int, slots: int, max_length: int) -> Layer:
    """Return a layer whose head h copies the marks of the tokens step * (h + 1) back, from `slots` channels each."""
    layer = Layer(zeros(HEADS * HEAD_DIM, HIDDEN), zeros(HEAD_DIM, HIDDEN), zeros(HEAD_DIM, HIDDEN),
                  zeros(HIDDEN, HEADS * HEAD_DIM))
    size = math.sqrt(_look_back_peak(max_length) * math.sqrt(HEAD_DIM)) * _RMS  # x _RMS undoes the norm
    for pair in range(_MOVING_PAIRS):
        layer.k[pair][_CONST] = size
        for head in range(HEADS):
            angle = step * (head + 1) * _FREQUENCIES[pair]
            first = head * HEAD_DIM + pair
            layer.q[first][_CONST] = size * _LOOK_BACK_WEIGHTS[pair] * math.cos(angle)
            layer.q[first + _HALF][_CONST] = -size * _LOOK_BACK_WEIGHTS[pair] * math.sin(angle)
    for slot in range(slots):
        layer.v[slot][_ANCHOR + slot] = _RMS
        layer.v[slots + slot][_ANSWER + slot] = _RMS
        for head in range(HEADS):
            distance = step * (head + 1) + slot
            layer.o[_ANCHOR + distance][head * HEAD_DIM + slot] = 1.0
            layer.o[_ANSWER + distance][head * HEAD_DIM + slots + slot] = 1.0
    return layer


def _lookup_layer(vocabulary: tk.Vocabulary, control: dict[int, int], retrieves: bool) -> Layer:
    layer = Layer(zeros(HEADS * HEAD_DIM, HIDDEN), zeros(HEAD_DIM, HIDDEN), zeros(HEAD_DIM, HIDDEN),
                  zeros(HIDDEN, HEADS * HEAD_DIM))
    size = math.sqrt(_LOOKUP_LOGIT * math.sqrt(HEAD_DIM)) / _MARK * _RMS
    for token in range(_ANSWER_TOKENS):
        dim = _STILL_DIMS[token]
        if retrieves:
            layer.q[dim][_ANSWER + token] = size * (1 - token / 128)  # the nearest </think> wins in a long talk
        layer.k[dim][_ANCHOR + token + 1] = size
    reply, tools = _STILL_DIMS[_ANSWER_TOKENS], _STILL_DIMS[_ANSWER_TOKENS + 1]
    layer.q[reply][_CONST] = size * _MARK * 0.5
    layer.k[reply][control[vocabulary.mark(tk.BOS)]] = size * _MARK / _CONTROL_SIZE
    layer.q[tools][_ANSWER] = size * 1.5
    layer.k[tools][control[vocabulary.mark(tk.TOOLS_OFFERED)]] = size * _MARK / _CONTROL_SIZE
    for channel in range(_CODE_WIDTH):
        layer.v[channel][_CODE + channel] = _RMS
        layer.o[_OUT + channel][channel] = 1.0
    return layer
