"""Tasks that are one prompt and its checkers: the data, and what each checker looks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .checks import Check, fenced, language_share, mojibake, parse_flowchart, refusal, repetition, shorten

# Judges the content of a reply.
Checker = Callable[[str], list[Check]]


@dataclass(frozen=True)
class PromptTask:
    """One prompt. `least_characters` is the shortest content that can be a whole answer; `essay`: a long one is due."""

    name: str
    title: str
    prompt: str
    checkers: tuple[Checker, ...]
    least_characters: int = 1
    essay: bool = False
    language: str = "English"


def prose(task: PromptTask, content: str) -> list[Check]:
    """What every written answer must be: there, long enough, in its language, without refusal, loop or broken text."""
    length = len(content.strip())
    checks = [
        Check("length", length >= task.least_characters, f"{length} characters", f">= {task.least_characters}"),
    ]
    for name, judge, wanted in (
        ("no_refusal", refusal, "an answer"),
        ("no_repetition", repetition, "text that does not loop"),
        ("no_mojibake", mojibake, "whole characters"),
    ):
        found = judge(content)
        checks.append(Check(name, found is None, found or "none", wanted))
    if length:
        share = language_share(content, task.language)
        # Below these shares no text of the language that was tried falls; above them none of another.
        least = 0.12 if task.language in ("English", "German", "French") else 0.5
        checks.append(Check("language", share >= least, f"{share:.0%} {task.language}", f">= {least:.0%}"))
    return checks


def all_of(name: str, *wanted: str) -> Checker:
    """Each of these patterns stands in the content, without regard to case."""

    def judge(content: str) -> list[Check]:
        missing = [pattern for pattern in wanted if not re.search(pattern, content, re.IGNORECASE)]
        found = "all" if not missing else f"missing {', '.join(missing)} in {shorten(content, 200)!r}"
        return [Check(name, not missing, found, f"each of {', '.join(wanted)}")]

    return judge


def ascii_box(content: str) -> list[Check]:
    """A box of ASCII characters: one rectangle, closed, 12 wide and 4 high, the word in it."""
    block = fenced(content, "") or content
    lines = [line.rstrip() for line in block.strip("\n").splitlines() if line.strip()]
    odd = sorted({character for character in block if ord(character) > 126})
    checks = [Check("ascii_only", not odd, "".join(odd) or "ASCII only", "characters from space to tilde")]
    border = "+" + "-" * 10 + "+"
    shape = (
        len(lines) == 4
        and lines[0].strip() == lines[3].strip() == border
        and all(re.fullmatch(r"\|.{10}\|", line.strip()) for line in lines[1:3])
    )
    wanted = f"4 lines of 12 characters, first and last {border}"
    checks.append(Check("box_closed", shape, shorten(block, 240), wanted))
    checks.append(Check("box_text", any("SPARK" in line for line in lines[1:3]), shorten(block, 240), "SPARK inside"))
    return checks


def mermaid_graph(content: str) -> list[Check]:
    """A flowchart that parses, with these nodes and a path through them, and the loop back from the test that fails."""
    source = fenced(content, "mermaid")
    if source is None:
        return [Check("mermaid_block", False, shorten(content, 200), "a fenced block ```mermaid")]
    try:
        chart = parse_flowchart(source)
    except ValueError as error:
        return [Check("mermaid_parses", False, str(error), "a flowchart that parses")]
    names = {node: label.lower() for node, label in chart.nodes.items()}

    def nodes(word: str) -> set[str]:
        return {node for node, label in names.items() if word in label or word in node.lower()}

    checks = [Check("mermaid_parses", True, f"{len(chart.nodes)} nodes, {len(chart.edges)} edges", "a flowchart")]
    missing = [word for word in ("start", "build", "test", "deploy") if not nodes(word)]
    checks.append(Check("mermaid_nodes", not missing, f"missing {missing}" if missing else "all", "the four nodes"))
    pairs = {(a, b) for a, b, _label in chart.edges}
    for a, b in (("start", "build"), ("build", "test"), ("test", "deploy"), ("test", "build")):
        there = any((x, y) in pairs for x in nodes(a) for y in nodes(b))
        checks.append(Check(f"mermaid_edge_{a}_{b}", there, "there" if there else "missing", f"{a} --> {b}"))
    return checks


def names_the_bug(content: str) -> list[Check]:
    """The planted fault is named: the last index, `len(values)`, is one too far."""
    said = re.search(
        r"off[- ]by[- ]one|out of (?:range|bounds)|IndexError|one (?:too (?:many|far)|past)|len\(values\) ?- ?1|"
        r"range\(len\(values\)\)|past the end|\+ ?1\b.{0,60}(?:wrong|extra|should|remove|too)",
        content,
        re.IGNORECASE | re.DOTALL,
    )
    found = said.group() if said else shorten(content, 200)
    checks = [Check("bug_named", said is not None, found, "the off-by-one of range(len(values) + 1)")]
    fixed = re.search(
        r"range\(len\(values\)\)|range\(0, ?len\(values\)\)|in values|enumerate\(values\)|sum\(values\)", content
    )
    checks.append(Check("bug_fixed", fixed is not None, fixed.group() if fixed else "no right loop", "a right loop"))
    return checks


BUGGY = """def mean(values):
    total = 0.0
    for i in range(len(values) + 1):
        total += values[i]
    return total / len(values)"""

PROMPTS: tuple[PromptTask, ...] = (
    PromptTask(
        "ascii",
        "a drawing in ASCII has the size, the border and the word that were asked for",
        "Draw a box in plain ASCII, exactly 12 characters wide and 4 lines high: corners +, horizontal -, vertical |. "
        "Write the word SPARK inside it. Answer with the box in a code block, nothing else.",
        (ascii_box,),
    ),
    PromptTask(
        "mermaid",
        "a Mermaid flowchart parses and has the asked nodes and edges",
        "Write a Mermaid flowchart of a delivery pipeline with the nodes Start, Build, Test and Deploy: Start leads "
        "to Build, Build to Test, Test to Deploy when it passes, and from Test back to Build when it fails. Answer "
        "with one ```mermaid code block.",
        (mermaid_graph,),
    ),
    PromptTask(
        "code_explanation",
        "a planted off-by-one is found, named and mended",
        f"What is wrong with this function? Explain the fault in one or two sentences and give a corrected version.\n\n"
        f"```python\n{BUGGY}\n```",
        (names_the_bug,),
        least_characters=80,
    ),
    PromptTask(
        "philosophy",
        "a question of philosophy is answered, in English, at length",
        "Compare Kant's categorical imperative with utilitarianism on whether one may lie to save a life. Give the "
        "strongest argument of each side in about 200 words.",
        (all_of("on_topic", "Kant", "utilitarian", r"\blie|\blying"),),
        least_characters=600,
        essay=True,
    ),
    PromptTask(
        "religion",
        "a question about religions is answered evenly, in the language it was asked in",
        "Erkläre in etwa 150 Wörtern auf Deutsch, was Fasten im Islam, im Christentum und im Judentum bedeutet.",
        (all_of("on_topic", "Ramadan|Islam", "Christ|Ostern|Passion", "Jud|jüdisch|Jom Kippur"),),
        least_characters=400,
        essay=True,
        language="German",
    ),
    PromptTask(
        "long_decode",
        "a long answer stays coherent to its end",
        "Write a short story of about 700 words, in English, about a lighthouse keeper who finds a letter. It must "
        "have a beginning, a turn and an end, and must end with the line: THE END",
        (all_of("ends_as_asked", r"THE END\W*$"), all_of("on_topic", "lighthouse", "letter")),
        least_characters=2200,
        essay=True,
    ),
)

# What must come back byte for byte: scripts, right-to-left, combining marks, emoji with joiners, a plane beyond the
# first. Each is short enough for a model that copies 40 bytes; none holds a character that ends a copied value. The
# letters with combining marks have no composed form: where there is one, a model may well write it.
UNICODE_SAMPLES: tuple[tuple[str, str], ...] = (
    ("latin", "Grüße-Ærøskøbing-Łódź"),
    ("greek_cyrillic", "Αθήνα-Москва"),
    ("hebrew_arabic", "שלום-سلام"),
    ("cjk", "東京-서울-北京"),
    ("devanagari", "नमस्ते"),
    ("combining", "q\u0303x\u0302g\u0308m\u0302"),
    ("emoji", "👩\u200d🚀🇫🇷👍🏽"),
    ("beyond_first_plane", "𝔘𝔫𝔦-𐍈𐌰𐍂"),
)
