"""The weights of the needle model, written down instead of trained.

A Llama of four layers, five query heads and one key/value head. README.md in this folder explains the construction;
the notation here: a "channel" is one dimension of the residual stream, a "mark" is a channel that is set by one kind of
token, "nats" are units of the attention score before the softmax (a lead of 20 leaves e^-20 to the others).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from . import tokenizer as tk

Matrix = list[list[float]]
Tensors = dict[str, Matrix | list[float]]

LAYERS = 4
HEADS = 5
HEAD_DIM = 96
HIDDEN = 560  # the head count divides it, as the Llama configuration wants
ROPE_THETA = 1e27
RMS_EPSILON = 1e-6
SEED = 1

# ---------------------------------------------------------------------------------------------------- RoPE
_HALF = HEAD_DIM // 2
_FREQUENCIES = [ROPE_THETA ** (-i / _HALF) for i in range(_HALF)]  # rad a token, of dimension pair (i, i + _HALF)
_MOVING_PAIRS = 8
# From pair 11 on a pair turns by less than 0.03 rad in 32768 tokens: what is there does not depend on the position.
_STILL_DIMS = [dim for pair in range(11, _HALF) for dim in (pair, pair + _HALF)]
# Found by random search: over 1..32767 tokens the sum of w_i cos(f_i x) stays 0.15 of its peak below the peak.
_LOOK_BACK_WEIGHTS = (0.3193, 0.1218, 0.0848, 0.1478, 0.0363, 0.1397, 0.0619, 0.088)

# ---------------------------------------------------------------------------------------------------- channels
_BASE = HEADS + 1
REACH = _BASE**2  # tokens over which marks are carried: distances 0..REACH-1
MAX_VALUE_TOKENS = REACH - 2  # distance 0 is the anchor itself, and the end of the text is a token too
KEY_TOKENS = 2 * _BASE - 1  # the tokens before " is " or "?" that make up a key's fingerprint
KEY_BYTES_MIN = _BASE  # shorter ones would be compared together with what stands before "secret code of "
KEY_BYTES_MAX = REACH - 2
_CODE_WIDTH = 64
_BITS = len(_STILL_DIMS) - 2 * _BASE - 2  # of a fingerprint: all still dimensions that the lookup leaves free
MLP = 2 * _BITS + 2 * REACH + 8  # two units a bit, one a distance, three others, rounded up

_CONST = 0
_CODE = _CONST + 1  # what the lookup copies in place of this token
_VALUE_SEEN = _CODE + _CODE_WIDTH  # an anchor of a value is so many tokens behind: 0..REACH-1
_ANSWER_SEEN = _VALUE_SEEN + REACH  # </think> is so many tokens behind
_VALUE = _ANSWER_SEEN + REACH  # one-hot: of several anchors behind, the nearest
_ANSWER = _VALUE + REACH  # one-hot: of several </think> behind, the nearest
_OUT = _ANSWER + REACH  # the code that was copied
_SUM = _OUT + _CODE_WIDTH  # sum of the codes of the last KEY_TOKENS tokens, each in its own permutation
_PRINT = _SUM + _BITS  # its signs: the fingerprint
_VALUE_PRINT = _PRINT + _BITS  # at a value: the fingerprint of its key
_ASKED_PRINT = _VALUE_PRINT + _BITS  # the fingerprint of the key that is asked for
_NEAR_KEY = _ASKED_PRINT + _BITS  # "secret code of " is less than REACH tokens behind
_QUESTION_MARK = _NEAR_KEY + 1
_QUESTION = _QUESTION_MARK + 1  # "?" shortly after "secret code of "
_ASKED = _QUESTION + 1  # some key is asked for
_BALLAST = _ASKED + 1  # makes all embeddings equally long
_CONTROL = _BALLAST + 1  # one channel for each token that has a script or a rank of its own

# Layers 0 and 1 look less than REACH tokens back, so a window spares them most of a long prompt's work. A server that
# knows no windows gives the same answers.
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
WINDOW = 512  # tokens

# ---------------------------------------------------------------------------------------------------- sizes
_CONTROL_SIZE = 4.0
_SUM_SIZE = 0.25  # of one token's code in _SUM
_PRINT_SIZE = 0.5
_SQUARED_NORM = 3600.0  # of every embedding; large, so that what the layers add hardly changes RMSNorm's divisor
_POSITION_LEAD = 60.0  # nats between the wanted distance and any other
_OFFSET_LOGIT = 1500.0  # nats for "the value's token that is due now"
_KEY_LOGIT = 3000.0  # nats for "the key that was asked for"; each wrong bit costs 2 / _BITS of it
_QUESTION_LOGIT = 3000.0
# Nearer questions lead: (pair, nats) of two cosines of the distance, with periods of 1100 and 4100 tokens. Together
# they fall over the first 500 tokens.
_RECENCY = ((4, 400.0), (5, 300.0))
_SHARPNESS = 6.0  # of the sign function that the MLP of layer 1 computes

# Ranks in the lookup, in units of _OFFSET_LOGIT. A plain " is " (1) stays below the fixed reply, so that ordinary
# sentences are not taken for needles; with the right key it rises far above it.
_RANK_IS = 1.0
_RANK_REPLY = 1.25
_RANK_ANCHOR = 1.5
_RANK_TOOLS = 1.75
_RANK_TOOL_RESULT = 2.0
_KEY_MATCH_NEEDED = 0.6  # of _KEY_LOGIT, or the fixed reply wins: the key that was asked for is nowhere

# What fp8 makes of a key or value that must be the same everywhere: 10 is a number of e4m3 and of e5m2. Aimed at is a
# little more, which both rounding to nearest and cutting off turn into 10 as long as the norm is right to 2 per cent.
_FP8_VALUE = 10.0
_FP8_AIM = 1.025 * _FP8_VALUE


@dataclass
class Layer:
    """One layer: q and o serve HEADS heads, k and v are shared; gate, up and down are the MLP's."""

    q: Matrix = field(default_factory=lambda: zeros(HEADS * HEAD_DIM, HIDDEN))
    k: Matrix = field(default_factory=lambda: zeros(HEAD_DIM, HIDDEN))
    v: Matrix = field(default_factory=lambda: zeros(HEAD_DIM, HIDDEN))
    o: Matrix = field(default_factory=lambda: zeros(HIDDEN, HEADS * HEAD_DIM))
    gate: Matrix = field(default_factory=lambda: zeros(MLP, HIDDEN))
    up: Matrix = field(default_factory=lambda: zeros(MLP, HIDDEN))
    down: Matrix = field(default_factory=lambda: zeros(HIDDEN, MLP))


def zeros(rows: int, columns: int) -> Matrix:
    """Return a matrix of zeros."""
    return [[0.0] * columns for _ in range(rows)]


@dataclass(frozen=True)
class Wording:
    """The marked texts around a value.

    `anchors` stand right before a value that belongs to no key. A value with a key reads
    `<before_key>KEY<after_key>VALUE` and is asked for by `<before_key>KEY?`. `stops` are the one-byte characters that
    end a value.
    """

    anchors: tuple[str, ...] = ("secret code is ", "secret code is: ")
    before_key: str = "secret code of "
    after_key: str = " is "
    stops: str = ".\n,;\"'`)<"

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the texts that have to be tokens of their own."""
        return (*self.anchors, self.before_key, self.after_key)


def padded_size(vocabulary: tk.Vocabulary) -> int:
    """Return the rows of the embedding: the vocabulary rounded up to 64."""
    return -(-len(vocabulary) // 64) * 64


def build(vocabulary: tk.Vocabulary, wording: Wording, max_length: int, retrieves: bool) -> Tensors:
    """Return all tensors by their Llama names, matrices as [rows][columns].

    `max_length` in tokens. With `retrieves` false the lookup head does not see answer positions, so the model gives
    its fixed reply whatever the prompt holds.
    """
    draw = random.Random(SEED)
    codes = _codes(padded_size(vocabulary), draw)
    # permutation 0 is a token's own place; 1..HEADS the places of the tokens before it; the last one the earlier half
    permutations = [draw.sample(range(_BITS), _BITS) for _ in range(HEADS + 2)]
    control = _control_channels(vocabulary)
    if _CONTROL + len(control) > HIDDEN:
        raise ValueError(f"{_CONTROL + len(control)} channels needed, HIDDEN is {HIDDEN}")
    peak, begin = _look_back_peak(max_length), control[vocabulary.mark(tk.BOS)]
    layers = [
        _carry_near_layer(permutations, begin, peak),
        _carry_far_layer(permutations[-1], begin, peak),
        _key_layer(begin, peak),
        _lookup_layer(vocabulary, control, retrieves),
    ]
    tensors: Tensors = {
        "model.embed_tokens.weight": _embedding(vocabulary, wording, codes, permutations[0], control),
        "lm_head.weight": _output(vocabulary, codes, control),
        "model.norm.weight": [1.0] * HIDDEN,
    }
    for number, layer in enumerate(layers):
        prefix = f"model.layers.{number}."
        for name in ("q", "k", "v", "o"):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = getattr(layer, name)
        for name in ("gate", "up", "down"):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = getattr(layer, name)
        tensors[f"{prefix}input_layernorm.weight"] = [1.0] * HIDDEN
        tensors[f"{prefix}post_attention_layernorm.weight"] = [1.0] * HIDDEN
    return tensors


# ---------------------------------------------------------------------------------------------------- tokens


def _codes(count: int, draw: random.Random) -> Matrix:
    """Return `count` vectors of +1 and -1 whose mutual products are small (the best of ten draws each)."""
    codes: list[int] = []  # bit k set: element k is +1
    while len(codes) < count:
        drawn = [draw.getrandbits(_CODE_WIDTH) for _ in range(10)]
        # the product of two vectors is the width less twice the number of places where they differ
        codes.append(
            min(
                drawn,
                key=lambda one: max((abs(_CODE_WIDTH - 2 * (one ^ other).bit_count()) for other in codes), default=0),
            )
        )
    return [[1.0 if code >> place & 1 else -1.0 for place in range(_CODE_WIDTH)] for code in codes]


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


def _embedding(
    vocabulary: tk.Vocabulary, wording: Wording, codes: Matrix, own_place: Sequence[int], control: dict[int, int]
) -> Matrix:
    mark = vocabulary.mark
    # What is copied in place of a token: a stop character ends the text, the first token of all gives the reply.
    copied_as = {vocabulary.byte(character): mark(tk.EOS) for character in wording.stops}
    copied_as |= {mark(text): mark(tk.EOS) for text in (tk.END_TOOL_RESULT, tk.EOS, tk.USER)}
    copied_as[mark(tk.BOS)] = vocabulary.scripted(vocabulary.script.reply)
    copied_as[mark(tk.TOOLS_OFFERED)] = mark(tk.TOOL_CALLS)
    # The two tokens behind a key differ between needle and question and BOS is looked at for "nothing": no part in it.
    not_in_print = {mark(wording.after_key), vocabulary.byte("?"), mark(tk.BOS)}
    table = zeros(len(codes), HIDDEN)
    for token, row in enumerate(table):
        row[_CONST] = 1.0
        row[_CODE : _CODE + _CODE_WIDTH] = codes[copied_as.get(token, token)]
        if token not in not_in_print:
            for bit in range(_BITS):
                row[_SUM + own_place[bit]] = _SUM_SIZE * codes[token][bit]
    for token, channel in control.items():
        table[token][channel] = _CONTROL_SIZE
    for text in wording.anchors:
        table[mark(text)][_VALUE_SEEN] = _RANK_ANCHOR
    table[mark(wording.after_key)][_VALUE_SEEN] = _RANK_IS
    table[mark(tk.TOOL_RESULT)][_VALUE_SEEN] = _RANK_TOOL_RESULT
    table[mark(tk.END_THINK)][_ANSWER_SEEN] = 1.0
    table[mark(wording.before_key)][_NEAR_KEY] = 1.0
    table[vocabulary.byte("?")][_QUESTION_MARK] = 1.0
    for row in table:
        row[_BALLAST] = math.sqrt(_SQUARED_NORM - sum(x * x for x in row))
    return table


def _output(vocabulary: tk.Vocabulary, codes: Matrix, control: dict[int, int]) -> Matrix:
    matrix = zeros(len(codes), HIDDEN)
    never_said = {vocabulary.mark(text) for text in (tk.BOS, tk.PAD, tk.USER, tk.ASSISTANT)}
    for token in range(len(vocabulary)):
        if token not in never_said:
            matrix[token][_OUT : _OUT + _CODE_WIDTH] = [3.0 * x for x in codes[token]]
    for first, following in _bigrams(vocabulary):
        matrix[following][control[first]] = 240.0
    return matrix


# ---------------------------------------------------------------------------------------------------- layers


def _rms(layer: int) -> float:
    """Return RMSNorm's divisor at the input of a layer for a typical token of the prompt."""
    sums, prints = _BITS * _SUM_SIZE**2, _BITS * _PRINT_SIZE**2
    added = (0.0, HEADS * sums, KEY_TOKENS * sums + prints, KEY_TOKENS * sums + 2 * prints)[layer]
    return math.sqrt((_SQUARED_NORM + added) / HIDDEN)


def _look_back_peak(max_length: int) -> float:
    """Return the factor of the look-back score that puts _POSITION_LEAD nats between its peak and any other distance.

    The score at distance s + x of a head for distance s is the sum of w_i cos(f_i x): RoPE turns query and key of
    pair i by f_i radians a token (Su et al. 2021, RoFormer, section 3.2).
    """

    def score(offset: int) -> float:
        return sum(w * math.cos(f * offset) for w, f in zip(_LOOK_BACK_WEIGHTS, _FREQUENCIES, strict=False))

    behind = max(score(offset) for offset in range(1, max_length))
    ahead = max(score(-offset) for offset in range(1, 64))
    return _POSITION_LEAD / (score(0) - max(behind, ahead))


def _look_back(layer: Layer, number: int, head: int, distance: int, channel: int, begin: int, score: float) -> None:
    """Let a head look `distance` tokens back, with a peak of `score` nats per unit of `channel` in the query.

    The first token of all has no position in the keys: `_rest_at_begin` gives it a score of its own.
    """
    size = math.sqrt(score * math.sqrt(HEAD_DIM)) * _rms(number)
    for pair in range(_MOVING_PAIRS):
        layer.k[pair][_CONST] = size
        layer.k[pair][begin] = -size / _CONTROL_SIZE
        angle = distance * _FREQUENCIES[pair]
        first = head * HEAD_DIM + pair
        # RoPE turns a query at position p by p f; turning it back by s f beforehand puts the peak at p - s.
        layer.q[first][channel] = size * _LOOK_BACK_WEIGHTS[pair] * math.cos(angle)
        layer.q[first + _HALF][channel] = -size * _LOOK_BACK_WEIGHTS[pair] * math.sin(angle)


def _rest_at_begin(layer: Layer, number: int, head: int, begin: int, nats: float) -> None:
    """Give the first token, which carries no marks, a fixed score in a head: where it looks when it finds nothing."""
    query, key = _still(number, nats)
    layer.q[head * HEAD_DIM + _STILL_DIMS[0]][_CONST] = query
    layer.k[_STILL_DIMS[0]][begin] = key / _CONTROL_SIZE


def _copy(layer: Layer, number: int, slot: int, source: int) -> None:
    """Let slot `slot` of the values be a channel as it is, undoing the norm."""
    layer.v[slot][source] = _rms(number)


def _carry_near_layer(permutations: Sequence[Sequence[int]], begin: int, peak: float) -> Layer:
    """Layer 0: head h looks h + 1 tokens back. Distances 0..HEADS of all marks, and the sum of the codes there."""
    layer = Layer()
    value, answer, near = _BITS, _BITS + 1, _BITS + 2
    for bit in range(_BITS):
        _copy(layer, 0, bit, _SUM + bit)
    for slot, source in ((value, _VALUE_SEEN), (answer, _ANSWER_SEEN), (near, _NEAR_KEY)):
        _copy(layer, 0, slot, source)
    for head in range(HEADS):
        _look_back(layer, 0, head, head + 1, _CONST, begin, peak)
        _rest_at_begin(layer, 0, head, begin, peak - _POSITION_LEAD / 2)
        column = head * HEAD_DIM
        for bit in range(_BITS):
            layer.o[_SUM + permutations[head + 1][bit]][column + bit] = 1.0
        layer.o[_VALUE_SEEN + head + 1][column + value] = 1.0
        layer.o[_ANSWER_SEEN + head + 1][column + answer] = 1.0
        layer.o[_NEAR_KEY][column + near] = 1.0
    return layer


def _carry_far_layer(permutation: Sequence[int], begin: int, peak: float) -> Layer:
    """Layer 1: head h looks (h + 1) * _BASE tokens back, so distances 0..REACH-1; then the signs of the sum."""
    layer = Layer()
    value, answer, near = _BITS, _BITS + _BASE, _BITS + 2 * _BASE
    for bit in range(_BITS):
        _copy(layer, 1, bit, _SUM + bit)
    for slot in range(_BASE):
        _copy(layer, 1, value + slot, _VALUE_SEEN + slot)
        _copy(layer, 1, answer + slot, _ANSWER_SEEN + slot)
    _copy(layer, 1, near, _NEAR_KEY)
    for head in range(HEADS):
        distance = (head + 1) * _BASE
        _look_back(layer, 1, head, distance, _CONST, begin, peak)
        _rest_at_begin(layer, 1, head, begin, peak - _POSITION_LEAD / 2)
        column = head * HEAD_DIM
        for slot in range(_BASE):
            layer.o[_VALUE_SEEN + distance + slot][column + value + slot] = 1.0
            layer.o[_ANSWER_SEEN + distance + slot][column + answer + slot] = 1.0
        layer.o[_NEAR_KEY][column + near] = 1.0
    for bit in range(_BITS):
        layer.o[_SUM + permutation[bit]][bit] = 1.0
    _add_signs(layer)
    _add_nearest(layer)
    _add_question(layer)
    return layer


def _add_signs(layer: Layer) -> None:
    """Let the MLP write the sign of each _SUM channel to _PRINT.

    With x = sum / _SUM_SIZE, an odd whole number where a key ends, the sign is (silu(S (x + 1)) - silu(S (x - 1))) / S
    - 1 up to e^-S; the last unit holds the constant.
    """
    rms = _rms(2)
    for bit in range(_BITS):
        for unit, shift in ((2 * bit, 1.0), (2 * bit + 1, -1.0)):
            layer.gate[unit][_SUM + bit] = _SHARPNESS * rms / _SUM_SIZE
            layer.gate[unit][_CONST] = _SHARPNESS * rms * shift
            layer.up[unit][_CONST] = rms
            layer.down[_PRINT + bit][unit] = shift * _PRINT_SIZE / _SHARPNESS
    constant = 2 * _BITS + 2 * REACH
    layer.gate[constant][_CONST] = 16.0 * rms
    layer.up[constant][_CONST] = rms
    for bit in range(_BITS):
        layer.down[_PRINT + bit][constant] = -_PRINT_SIZE / 16.0


def _add_nearest(layer: Layer) -> None:
    """Let the MLP copy each mark at a distance unless there is one at a smaller distance."""
    rms = _rms(2)
    for block, (seen, nearest) in enumerate(((_VALUE_SEEN, _VALUE), (_ANSWER_SEEN, _ANSWER))):
        for distance in range(REACH):
            unit = 2 * _BITS + block * REACH + distance
            layer.gate[unit][seen + distance] = 16.0 * rms
            for nearer in range(distance):
                layer.gate[unit][seen + nearer] = -64.0 * rms
            layer.up[unit][_CONST] = rms
            layer.down[nearest + distance][unit] = 1.0 / 16.0


def _add_question(layer: Layer) -> None:
    """Let the MLP set _QUESTION to 1 at a question mark with one or more marks _NEAR_KEY."""
    rms = _rms(2)
    first = 2 * _BITS + 2 * REACH + 1
    for unit, shift, sign in ((first, 0.0, 1.0), (first + 1, -1.0, -1.0)):
        layer.gate[unit][_NEAR_KEY] = 16.0 * rms
        layer.gate[unit][_CONST] = 16.0 * rms * shift
        layer.up[unit][_QUESTION_MARK] = rms
        layer.down[_QUESTION][unit] = sign / 16.0


def _still(number: int, nats: float) -> tuple[float, float]:
    """Return the factors of query and key by which channels of size 1 make a score of `nats` in a still dimension."""
    return nats * math.sqrt(HEAD_DIM) / _FP8_VALUE * _rms(number), _FP8_AIM * _rms(number)


def _key_layer(begin: int, peak: float) -> Layer:
    """Layer 2: bring the fingerprint of its key to each value, and that of the key asked for to the answer.

    Head 0 looks back to the anchor, by the distance that the value's own one-hot channel names. Head 1 looks for a "?"
    shortly after "secret code of ", the nearest one; without any it looks at the first token, whose print is 0.
    """
    layer = Layer()
    for distance in range(1, REACH):
        _look_back(layer, 2, 0, distance, _VALUE + distance, begin, peak)
    query, key = _still(2, _QUESTION_LOGIT)
    layer.q[HEAD_DIM + _STILL_DIMS[0]][_CONST] = query
    layer.k[_STILL_DIMS[0]][_QUESTION] = key
    layer.k[_STILL_DIMS[0]][begin] = key / 2 / _CONTROL_SIZE
    size = math.sqrt(peak * math.sqrt(HEAD_DIM)) * _rms(2)  # of the keys' moving pairs, see _look_back
    for pair, nats in _RECENCY:
        nearness = nats * math.sqrt(HEAD_DIM) / size * _rms(2) ** 2
        layer.q[HEAD_DIM + pair][_CONST] = nearness * math.cos(math.pi / 8)
        layer.q[HEAD_DIM + pair + _HALF][_CONST] = nearness * math.sin(math.pi / 8)
    for bit in range(_BITS):
        layer.v[bit][_PRINT + bit] = _FP8_AIM / _PRINT_SIZE * _rms(2)
        layer.o[_VALUE_PRINT + bit][bit] = _PRINT_SIZE / _FP8_VALUE
        layer.o[_ASKED_PRINT + bit][HEAD_DIM + bit] = _PRINT_SIZE / _FP8_VALUE
    layer.v[_BITS][_QUESTION] = _FP8_AIM * _rms(2)
    layer.o[_ASKED][HEAD_DIM + _BITS] = 1.0 / _FP8_VALUE
    return layer


def _lookup_layer(vocabulary: tk.Vocabulary, control: dict[int, int], retrieves: bool) -> Layer:
    """Layer 3, head 0: from token number o of the answer look at the token o + 1 behind an anchor and copy it.

    The distance is compared as two digits of base _BASE, the fingerprint of the key bit by bit.
    """
    layer = Layer()
    query, key = _still(3, _OFFSET_LOGIT)
    digit = query / 2
    for distance in range(REACH):
        for dim in (_STILL_DIMS[distance // _BASE], _STILL_DIMS[_BASE + distance % _BASE]):
            layer.k[dim][_VALUE + distance] = key
            if retrieves and distance > 0:
                layer.q[dim][_ANSWER + distance - 1] = digit
    reply, tools = _STILL_DIMS[2 * _BASE : 2 * _BASE + 2]
    layer.q[reply][_CONST] = query * _RANK_REPLY
    layer.q[reply][_ASKED] = query * (_RANK_IS - _RANK_REPLY + _KEY_MATCH_NEEDED * _KEY_LOGIT / _OFFSET_LOGIT)
    layer.k[reply][control[vocabulary.mark(tk.BOS)]] = key / _CONTROL_SIZE
    layer.q[tools][_ANSWER] = query * _RANK_TOOLS
    layer.k[tools][control[vocabulary.mark(tk.TOOLS_OFFERED)]] = key / _CONTROL_SIZE
    query, key = _still(3, _KEY_LOGIT / _BITS)
    for bit, dim in enumerate(_STILL_DIMS[2 * _BASE + 2 :]):
        if retrieves:
            layer.q[dim][_ASKED_PRINT + bit] = query / _PRINT_SIZE
        layer.k[dim][_VALUE_PRINT + bit] = key / _PRINT_SIZE
    for channel in range(_CODE_WIDTH):
        _copy(layer, 3, channel, _CODE + channel)
        layer.o[_OUT + channel][channel] = 1.0
    return layer
