"""Judgements about a reply. Each is a plain function of text that says what is wrong, or nothing."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .client import Reply

# Longest piece of text a report keeps of a request or reply.
KEPT_TEXT = 4000


def shorten(text: str, limit: int = KEPT_TEXT) -> str:
    """Head and tail of a long text, and how much is missing between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


@dataclass
class Check:
    """One judgement: what was found and what was wanted, in words."""

    name: str
    passed: bool
    found: str
    wanted: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "found": self.found, "wanted": self.wanted}


# Rules of the protocol: name of a problem -> what is wanted. Every reply is judged by all of them.
PROTOCOL = {
    "connection": "the connection holds until the reply ends",
    "deadline": "each phase of the reply within its deadline",
    "event_stream": "a stream of server-sent events",
    "event_json": "every event is a JSON object",
    "json_body": "the body is a JSON object with choices",
    "no_error_body": "status 200 means an answer",
    "utf8_intact": "every character arrives whole",
    "tool_index": "tool calls numbered from 0, without a gap",
    "stream_complete": "the stream ends with a finish reason and [DONE]",
    "done_once": "[DONE] exactly once, at the end",
}
FINISH_REASONS = ("stop", "length", "tool_calls")


def protocol_checks(reply: Reply, model: str) -> list[Check]:
    """What every chat reply must be, whatever was asked."""
    problems = dict(reply.problems)
    if reply.status not in (0, 200):
        problems.setdefault("http_status", f"status {reply.status}: {shorten(reply.body, 200)}")
    whole = reply.status == 200 and not problems.keys() & {"event_stream", "no_error_body", "json_body"}
    if whole and not reply.cancelled:
        if reply.streamed and reply.done == 0:
            problems.setdefault("stream_complete", f"no [DONE] after {len(reply.events)} events with text")
        if reply.streamed and reply.done > 1:
            problems.setdefault("done_once", f"[DONE] came {reply.done} times")
        if reply.finish_reason not in FINISH_REASONS:
            problems.setdefault("stream_complete", f"the finish reason is {reply.finish_reason!r}")
        if reply.models - {model}:
            problems.setdefault("model_name", f"the reply says model {', '.join(sorted(reply.models))}")
        if len(reply.ids) > 1:
            problems.setdefault("one_reply", f"events of {len(reply.ids)} replies in one stream")
        if reply.usage is None:
            problems.setdefault("usage_present", "no usage in the reply")
        elif reply.usage.total is not None and reply.usage.total != reply.usage.prompt + reply.usage.completion:
            problems.setdefault(
                "usage_consistent",
                f"{reply.usage.prompt} + {reply.usage.completion} tokens are stated as {reply.usage.total} in all",
            )
        elif len(reply.events) > reply.usage.completion:
            problems.setdefault(
                "usage_consistent",
                f"{len(reply.events)} events with text, but {reply.usage.completion} completion tokens are stated",
            )
    wanted = {
        **PROTOCOL,
        "http_status": "status 200",
        "model_name": f"model {model}",
        "one_reply": "one id in all events",
        "usage_present": "prompt and completion tokens",
        "usage_consistent": "token counts that agree with each other and with the events",
    }
    return [Check(name, False, found, wanted[name]) for name, found in problems.items()] or [
        Check("protocol", True, "clean", "a reply that keeps the protocol's rules")
    ]


def bare(text: str) -> str:
    """A short answer without the quotes, emphasis and full stop a model may put round it."""
    return text.strip().strip("*`\"'“”«» \n\t").rstrip(".").strip("*`\"'“”«» \n\t")


def answer_checks(reply: Reply, code: str, others: Sequence[str] = (), question: str = "") -> list[Check]:
    """Whether the content is this code: not in the reasoning only, not an echo, not another code."""
    content = reply.content
    checks = []
    if code in content:
        checks.append(Check("needle_value", True, code, code))
    elif code in reply.reasoning:
        ended = " and the limit of tokens ended it" if reply.finish_reason == "length" else ""
        found = f"the code stands in the reasoning only{ended}"
        checks.append(Check("answer_in_content", False, found, "the code in the content"))
    else:
        found = f"content {shorten(content, 200)!r}" if content else "empty content"
        checks.append(Check("needle_value", False, found, code))
    wrong = [other for other in others if other in content]
    if wrong:
        checks.append(Check("no_distractor", False, f"it also names {', '.join(wrong)}", f"{code} only"))
    if echoes(content, question) or len(content) > 400 + len(code):
        found = f"{len(content)} characters: {shorten(content, 200)!r}"
        checks.append(Check("not_an_echo", False, found, "an answer, not the prompt again"))
    return checks


def echoes(content: str, prompt: str, width: int = 48) -> bool:
    """Whether a piece of the prompt of this many characters stands in the content."""
    if len(prompt) < width:
        return bool(prompt) and prompt in content
    return any(prompt[i : i + width] in content for i in range(0, len(prompt) - width + 1, width // 2))


def repetition(text: str, words: int = 6, limit: float = 0.15) -> str | None:
    """Collapse into a loop: what share of the runs of so many words are repeats. None when it is below the limit."""
    tokens = text.split()
    if len(tokens) < 40:
        # Without spaces between words: runs of characters instead.
        tokens, words = list(text), 16
        if len(tokens) < 200:
            return None
    runs = Counter(tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1))
    total = sum(runs.values())
    share = (total - len(runs)) / total
    if share <= limit:
        return None
    common = " ".join(runs.most_common(1)[0][0])
    return f"{share:.0%} of it repeats, for example {common!r}"


# What UTF-8 read as Latin-1 or Windows-1252 looks like: a lead byte's letter followed by a continuation byte's.
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf]|\u00e2[\u0080-\u00bf\u20ac\u2122]|\u00f0\u0178|\u00ef\u00bf\u00bd"
)


def mojibake(text: str) -> str | None:
    """Text decoded with the wrong character set, unassigned or control characters; None when there is none."""
    if "\ufffd" in text:
        return "it holds U+FFFD, the mark of a broken character"
    match = _MOJIBAKE.search(text)
    if match:
        return f"it holds {match.group()!r}, UTF-8 read as another character set"
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cc", "Cs", "Cn") and character not in "\n\r\t":
            return f"it holds U+{ord(character):04X}, which is no text"
    return None


_REFUSALS = re.compile(
    r"\b(?:I (?:cannot|can't|can not|won't|will not|am unable to|'m unable to)"
    r" (?:help|assist|answer|discuss|comply|provide|engage)|as an AI(?: language model)?,? I (?:cannot|can't))",
    re.IGNORECASE,
)


def refusal(text: str) -> str | None:
    """The words of a refusal at the beginning of a reply; None when there are none."""
    match = _REFUSALS.search(text[:400].replace("’", "'"))
    return f"a refusal: {match.group()!r}" if match else None


# The most frequent short words of a language. Enough to tell an answer in it from one in another.
_COMMON = {
    "English": frozenset(re.findall(r"\w+", "the of and to in is that it as for are with be not on or")),
    "German": frozenset(re.findall(r"\w+", "der die das und ist nicht ein eine zu den von mit sich auf für im")),
    "French": frozenset(re.findall(r"\w+", "le la les de des et est une un que en dans pour qui pas du")),
}
_SCRIPTS = {"Arabic": "ARABIC", "Chinese": "CJK", "Greek": "GREEK", "Hebrew": "HEBREW", "Hindi": "DEVANAGARI",
            "Japanese": "CJK|HIRAGANA|KATAKANA", "Russian": "CYRILLIC"}  # fmt: skip


def language_share(text: str, language: str) -> float:
    """How much of a text speaks for a language: its frequent words per word, or letters of its script per letter."""
    if language in _SCRIPTS:
        letters = [character for character in text if character.isalpha()]
        names = re.compile(_SCRIPTS[language])
        return sum(bool(names.match(unicodedata.name(c, ""))) for c in letters) / len(letters) if letters else 0.0
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in _COMMON[language] for word in words) / len(words) if words else 0.0


# ------------------------------------------------------------------------------------------------- Mermaid

_NAME = re.compile(r"[A-Za-z0-9_]+(?:-(?!-|\.)[A-Za-z0-9_]+)*")
_SHAPE = re.compile(
    r"""\s*(\(\[.*?\]\)|\[\[.*?\]\]|\[\(.*?\)\]|\(\(.*?\)\)|\{\{.*?\}\}|"""
    r"""\["[^"]*"\]|\("[^"]*"\)|\{"[^"]*"\}|\[[^\]]*\]|\([^)]*\)|\{[^}]*\})(?::::\w+)?"""
)
_EDGE_AT = re.compile(
    r"\s*(?:--\s*(?P<mid>[^->|]+?)\s*--?>|-\.\s*(?P<dotmid>[^->|]+?)\s*\.->|==\s*(?P<thickmid>[^=>|]+?)\s*==>|"
    r"<?(?:-{2,}|={2,}|-\.+-)[>xo]?)\s*(?:\|(?P<label>[^|]*)\|)?\s*"
)


@dataclass
class Flowchart:
    """Nodes with their labels, and edges (from, to, label)."""

    direction: str
    nodes: dict[str, str]
    edges: list[tuple[str, str, str]]


def fenced(text: str, language: str) -> str | None:
    """The first fenced block of this language."""
    match = re.search(rf"```[ \t]*{language}[^\n]*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    return match[1] if match else None


def parse_flowchart(source: str) -> Flowchart:
    """Parse a Mermaid flowchart: header, nodes with the usual shapes, chains of edges with labels, subgraphs, styles.

    Raises:
        ValueError: a line that is none of these; says which.
    """
    lines = [line.split("%%")[0].strip().rstrip(";") for line in source.strip().splitlines()]
    lines = [line for line in lines if line]
    header = re.match(r"(?:flowchart|graph)\s+(TB|TD|BT|RL|LR)\s*$", lines[0]) if lines else None
    if not header:
        raise ValueError(f"the first line is {lines[0] if lines else ''!r}, wanted 'flowchart TD' or another direction")
    chart = Flowchart(header[1], {}, [])
    depth = 0
    for line in lines[1:]:
        word = line.split()[0]
        if word in ("style", "classDef", "class", "linkStyle", "click", "direction"):
            continue
        if word == "subgraph":
            depth += 1
        elif line == "end":
            depth -= 1
            if depth < 0:
                raise ValueError("an 'end' without a subgraph")
        else:
            _parse_chain(line, chart)
    if depth:
        raise ValueError("a subgraph has no 'end'")
    return chart


def _parse_chain(line: str, chart: Flowchart) -> None:
    """One line: nodes joined by edges, or a node alone."""
    position, label = 0, ""
    previous: str | None = None
    while True:
        name = _NAME.match(line, position)
        if not name:
            raise ValueError(f"no node at column {position + 1} of {line!r}")
        shape = _SHAPE.match(line, name.end())
        position = shape.end() if shape else name.end()
        text = re.sub(r'^[\[\]{}()"]+|[\[\]{}()"]+$', "", shape[1]) if shape else ""
        if text or name[0] not in chart.nodes:
            chart.nodes[name[0]] = text or name[0]
        if previous is not None:
            chart.edges.append((previous, name[0], label))
        if not line[position:].strip():
            return
        edge = _EDGE_AT.match(line, position)
        if not edge or not edge.group().strip():
            raise ValueError(f"neither an edge nor the end at column {position + 1} of {line!r}")
        label = (edge["mid"] or edge["dotmid"] or edge["thickmid"] or edge["label"] or "").strip()
        previous, position = name[0], edge.end()


# ------------------------------------------------------------------------------------------------- tool calls

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "object": (dict,),
    "array": (list,), "null": (type(None),),
}  # fmt: skip


def schema_problem(value: Any, schema: Mapping[str, Any], where: str = "arguments") -> str | None:
    """What breaks a JSON Schema of the kind tools use.

    Known: type, properties, required, enum, items, additionalProperties.
    """
    kind = schema.get("type")
    if kind is not None:
        right = isinstance(value, _JSON_TYPES[kind]) and not (isinstance(value, bool) and kind in ("integer", "number"))
        if not right:
            return f"{where} is {value!r}, wanted {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {value!r}, wanted one of {schema['enum']}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{where} has no {name!r}"
        for name, item in value.items():
            if name in properties:
                problem = schema_problem(item, properties[name], f"{where}.{name}")
                if problem:
                    return problem
            elif schema.get("additionalProperties") is False:
                return f"{where} has {name!r}, which the schema does not know"
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            problem = schema_problem(item, schema["items"], f"{where}[{number}]")
            if problem:
                return problem
    return None


def tool_call_checks(reply: Reply, name: str, schema: Mapping[str, Any], wanted: Mapping[str, str]) -> list[Check]:
    """Whether the reply calls this tool once, with arguments that are JSON, keep the schema and hold these values.

    `wanted` values match without regard to case, anywhere in the argument ("Paris" in "Paris, France").
    """
    if not reply.tool_calls:
        found = f"no call; content {shorten(reply.content, 160)!r}"
        return [Check("tool_called", False, found, f"a call of {name}")]
    names = [call["name"] for call in reply.tool_calls]
    checks = [Check("tool_called", names == [name], ", ".join(names), f"one call of {name}")]
    raw = reply.tool_calls[0]["arguments"]
    try:
        arguments = json.loads(raw)
    except (ValueError, TypeError):
        return [*checks, Check("tool_arguments_json", False, shorten(str(raw), 200), "arguments that are JSON")]
    problem = schema_problem(arguments, schema)
    checks.append(Check("tool_arguments_schema", problem is None, problem or raw, "arguments that keep the schema"))
    if problem is None:
        for key, value in wanted.items():
            got = str(arguments.get(key))
            checks.append(Check("tool_arguments_value", value.lower() in got.lower(), f"{key}={got}", f"{key}={value}"))
    reason = reply.finish_reason
    checks.append(Check("tool_finish_reason", reason == "tool_calls", str(reason), "finish reason tool_calls"))
    return checks
