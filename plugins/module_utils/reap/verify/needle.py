"""Long prompts of exactly the wanted number of tokens, with needles hidden in text that does not repeat.

Filler is made of sentences from a small grammar with invented names and numbers, seeded per run. Repeating one
paragraph would be easy prey for the prefix cache and for a compressed or sparse attention; these sentences differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .client import CouldNotRun

Messages = list[dict[str, Any]]
# Number of prompt tokens of these messages, chat template included.
Counter = Callable[[Messages], int]

# Letters and digits that cannot be mistaken for each other.
CODE_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in " ".join(text.split()).split(";")]


_SYLLABLES = _phrases("""
    ka; lo; mi; ren; tas; vel; dor; nim; gal; hes; bru; fen; sil; tor; wen; yar; zul; pex; oro; ist; aum; cer; lin;
    mar; nov; pol; rud; sem; tav; und; bex; cho; dri; ek; fa; gwi; hul; ira; jor; kyn; lud; mop; nef; oth; pra; quo;
    sku; thy; ub; vam; wix; xen; yot; zir; ash; bol; cru; dag; elm; fip; gor; hap""")
_PEOPLE = _phrases("""
    a surveyor; the night guard; our pilot; a retired clerk; the baker's sister; one engineer; an archivist; the diver;
    her cousin; a young botanist; the ferry captain; a watchmaker; the tenant upstairs; an auctioneer; the violinist;
    a beekeeper; the translator; my neighbour; an apprentice; the quarry foreman""")
_VERBS = _phrases("""
    measured; repainted; sold; catalogued; lost; carried; repaired; described; borrowed; weighed; photographed; buried;
    inherited; numbered; polished; misplaced; traded; sketched; inspected; dismantled""")
_THINGS = _phrases("""
    copper kettles; sealed letters; wooden crates; glass lenses; tide tables; iron hinges; wool blankets; charts;
    brass valves; seed packets; clock springs; clay tiles; rope ladders; ledgers; lanterns; oak planks; silk ribbons;
    stone weights; paper kites; tin whistles""")
_PLACES = _phrases("""
    by the canal; near the old mill; on the north pier; under the viaduct; behind the chapel; in the dry dock;
    across the moor; at the market; above the bakery; beside the reservoir; in the lower hall; past the orchard;
    along the ridge; inside the depot; beyond the customs house""")
_TIMES = _phrases("""
    before dawn; last winter; on a Tuesday; after the storm; at low tide; during the fair; late in March; for nine days;
    twice that year; without a word; in thick fog; by candlelight; at noon; when the bells rang""")


def invented_name(rng: random.Random) -> str:
    """A name no model has read, so that each sentence costs attention."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def filler_sentence(rng: random.Random) -> str:
    """One sentence, 15 to 30 words, ending in a full stop."""
    who, verb, things = rng.choice(_PEOPLE), rng.choice(_VERBS), rng.choice(_THINGS)
    name, town = invented_name(rng), invented_name(rng)
    things = f"{invented_name(rng).lower()} {things}"
    count, price, year = rng.randint(11, 9876), rng.randint(2, 980), rng.randint(1612, 1988)
    place, when = rng.choice(_PLACES), rng.choice(_TIMES)
    forms = (
        f"In {year} {who} named {name} {verb} {count} {things} {place}, {when}.",
        f"{who.capitalize()} from {town} {verb} {count} {things} {when} and paid {price} crowns to {name}.",
        f"{name} wrote that {who} {verb} the {things} of {town} {place}; {count} were left in {year}.",
        f"There were {count} {things} {place} when {name} of {town} arrived {when}, {price} fewer than in {year}.",
        f"{when.capitalize()}, {who} {verb} {things} numbered {count} to {count + price} for the town of {town}.",
    )
    return rng.choice(forms)


def new_code(rng: random.Random, groups: int = 3, size: int = 4) -> str:
    """A code that stands nowhere else, for example ``K7QM-93FX-XT4B``: 60 bits of chance at the default size."""
    return "-".join("".join(rng.choice(CODE_ALPHABET) for _ in range(size)) for _ in range(groups))


@dataclass(frozen=True)
class Needle:
    """A sentence to hide and how deep: 0 is the beginning of the filler, 1 its end."""

    sentence: str
    depth: float


@dataclass
class Prompt:
    """A long prompt and how its length was found.

    `exact` is True when the server's tokenizer says it has precisely the wanted number of tokens.
    """

    messages: Messages
    wanted_tokens: int
    tokens: int
    exact: bool
    measured_by: str
    needles: list[Needle] = field(default_factory=list)


def _compose(head: str, sentences: Sequence[str], pad: str, needles: Sequence[Needle], question: str) -> Messages:
    """Filler with the needles between its sentences in order of depth, and the padding at its end."""
    parts = list(sentences)
    # From the back, so that a needle does not move the places of those before it.
    for needle in sorted(needles, key=lambda item: item.depth, reverse=True):
        parts.insert(round(needle.depth * len(sentences)), needle.sentence)
    return [{"role": "user", "content": f"{head}\n\n{' '.join(parts)}{pad}\n\n{question}"}]


def build_prompt(
    wanted: int, needles: Sequence[Needle], question: str, count: Counter, rng: random.Random, *, label: str
) -> Prompt:
    """A prompt of exactly `wanted` tokens with these needles, by measuring with the server's tokenizer.

    Args:
        wanted: tokens, chat template included.
        count: tokens of messages as the server counts them.
        label: begins the text; unique per request, so that nothing of it can be in a prefix cache.

    Raises:
        CouldNotRun: `wanted` is smaller than the question alone.
    """
    head = f"[{label}] Read these notes. One question about them follows at the end."
    least = count(_compose(head, [], "", needles, question))
    if least > wanted:
        raise CouldNotRun(f"a prompt of {wanted} tokens is wanted, the question alone has {least}: ask for more tokens")
    sentences: list[str] = []

    def grown(number: int) -> list[str]:
        while len(sentences) < number:
            sentences.append(filler_sentence(rng))
        return sentences[:number]

    def size(number: int, pad: str = "") -> int:
        return count(_compose(head, grown(number), pad, needles, question))

    # The number of sentences, by proportion from the last measurement; a handful of rounds even for 200k tokens.
    low, low_tokens = 0, least
    number = min(64, max(1, (wanted - least) // 24))
    high: int | None = None
    for _ in range(40):
        tokens = size(number)
        if tokens <= wanted:
            low, low_tokens = number, tokens
        else:
            high = number
        if high is not None and high - low <= 1:
            break
        per_sentence = max(1.0, (tokens - least) / number)
        guess = low + max(1, int((wanted - low_tokens) / per_sentence))
        number = guess if high is None else min(max(guess, low + 1), high - 1)
    pad, tokens = _pad_to(wanted, low, low_tokens, size, rng)
    messages = _compose(head, grown(low), pad, needles, question)
    return Prompt(messages, wanted, tokens, tokens == wanted, "tokenizer", list(needles))


# Cheap endings, tried in turn: each costs a token at most in a vocabulary that falls back to bytes, and where one melts
# into what stands before it, the next does not.
_PADDING = (" 7", ".", " x", "!", "7", " -", "q", "?")


def _pad_to(
    wanted: int, number: int, tokens: int, size: Callable[[int, str], int], rng: random.Random
) -> tuple[str, int]:
    """Close the last gap, smaller than a sentence, with words and then with single characters.

    Returns:
        The padding and the number of tokens with it.
    """
    pad = ""
    for _ in range(12):
        gap = wanted - tokens
        if gap < 12:
            break
        # Each of these words is one token to seven, so this many do not overshoot.
        longer = pad + "".join(f" {rng.choice(_THINGS).split()[0]}" for _ in range(max(1, gap // 8)))
        measured = size(number, longer)
        if measured > wanted:
            break
        pad, tokens = longer, measured
    refused = 0
    for turn in range(160):
        if tokens == wanted or refused == len(_PADDING):
            break
        # Several at once while the gap is wide, so that a prompt of 200k tokens is not measured dozens of times.
        several = max(1, (wanted - tokens) // 3)
        piece = "".join(_PADDING[(turn + index) % len(_PADDING)] for index in range(several))
        measured = size(number, pad + piece)
        # One that costs nothing is kept as well: in a vocabulary with merges the next one then does.
        if measured <= wanted:
            pad, tokens, refused = pad + piece, measured, 0
        else:
            refused += 1
    return pad, tokens


def estimate_prompt(
    wanted: int,
    needles: Sequence[Needle],
    question: str,
    tokens_per_character: float,
    template_tokens: int,
    rng: random.Random,
    *,
    label: str,
) -> Prompt:
    """The same without a tokenizer, from the rate a measured request showed: `tokens` is an estimate."""

    def guess(messages: Messages) -> int:
        return template_tokens + round(len(messages[0]["content"]) * tokens_per_character)

    prompt = build_prompt(wanted, needles, question, guess, rng, label=label)
    prompt.exact, prompt.measured_by = False, "estimate"
    return prompt
