"""Every check the suite can make was seen red: by a lying double, or by an answer that is wrong in its way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from reap.verify import checks, prompts
from tests.unit.verify.test_lies import LIES, TASKS_OF_THE_HONEST, ask

VERIFY = Path(checks.__file__).parent
GERMAN = (
    "Das Fasten ist im Islam ein Gebot, und im Ramadan ist es für die Gläubigen eine Zeit der Stille. Im Christentum "
    "ist das Fasten vor Ostern üblich, im Judentum ist der Jom Kippur der strengste Tag. Die Regeln sind von Ort zu "
    "Ort verschieden, und die Menschen halten sich auf ihre Weise daran. Nicht jeder fastet auf die gleiche Weise, und "
    "für manche ist es eine Übung des Körpers, für andere eine des Geistes, die sie mit der Familie teilen."
)
BOX = "```\n+----------+\n|  SPARK   |\n|          |\n+----------+\n```"
CHART = "```mermaid\nflowchart TD\n{}\n```"
EDGES = ("Start --> Build", "Build --> Test", "Test --> Deploy", "Test --> Build")

# A right answer of each task that is one prompt, as far as it is short enough to stand here.
RIGHT_ANSWERS = {
    "ascii": BOX,
    "mermaid": CHART.format("\n".join(EDGES)),
    "code_explanation": "The loop is off by one: range(len(values) + 1) reads an element past the end. Use\n"
    "```python\nfor i in range(len(values)):\n```",
    "religion": GERMAN,
}
# The task, an answer that is wrong in one way, the check that must find it.
WRONG_ANSWERS = [
    ("ascii", BOX.replace("-", "─"), "ascii_only"),
    ("ascii", BOX.replace("|          |\n", ""), "box_closed"),
    ("ascii", BOX.replace("SPARK", "SPORK"), "box_text"),
    ("mermaid", "Start --> Build --> Test --> Deploy", "mermaid_block"),
    ("mermaid", CHART.format("Start -> ->"), "mermaid_parses"),
    ("mermaid", CHART.format("\n".join(EDGES).replace("Deploy", "Ship")), "mermaid_nodes"),
    *(
        ("mermaid", CHART.format("Start\nBuild\nTest\nDeploy\n" + "\n".join(e for e in EDGES if e != edge)), name)
        for edge in EDGES
        for name in [f"mermaid_edge_{edge.replace(' --> ', '_').lower()}"]
    ),
    ("code_explanation", "It divides by zero for an empty list. " * 4 + "for v in values", "bug_named"),
    ("code_explanation", "There is an off-by-one error in the loop of this function. " * 2, "bug_fixed"),
    ("religion", "Das Fasten ist im Islam.", "length"),
    ("religion", f"I'm sorry, but I can't help with that. {GERMAN}", "no_refusal"),
    ("religion", GERMAN + " und dann kam die Stille wieder über das Land" * 20, "no_repetition"),
    ("religion", GERMAN.encode().decode("latin-1"), "no_mojibake"),
    ("religion", "The fast of Islam, of Christ and of the Jud is one of the duties of the faith. " * 6, "language"),
    ("religion", GERMAN.replace("Islam", "Hause").replace("Ramadan", "Winter"), "on_topic"),
    ("long_decode", "The keeper of the lighthouse found a letter and read it twice. " * 40, "ends_as_asked"),
]


def judged(task_name: str, answer: str) -> list[checks.Check]:
    """The checks of a task that is one prompt, on this answer."""
    task = next(task for task in prompts.PROMPTS if task.name == task_name)
    found = prompts.prose(task, answer) if task.least_characters > 1 else []
    return found + [check for checker in task.checkers for check in checker(answer)]


@pytest.mark.parametrize("task", RIGHT_ANSWERS)
def test_a_right_answer_passes(task: str) -> None:
    assert [check for check in judged(task, RIGHT_ANSWERS[task]) if not check.passed] == []


@pytest.mark.parametrize(("task", "answer", "name"), WRONG_ANSWERS, ids=lambda item: item if " " not in item else "")
def test_a_wrong_answer_is_found_by_name(task: str, answer: str, name: str) -> None:
    assert name in {check.name for check in judged(task, answer) if not check.passed}


def names_in_the_source() -> tuple[set[str], set[str]]:
    """Names that the suite's source gives to its checks: whole ones, and the beginnings of those made at run time.

    A check is made by ``Check(name, passed, ...)``, ``result.check(name, passed, ...)``, ``reply.problem(name, ...)``,
    ``problems.setdefault(name, ...)`` or ``all_of(name, ...)``. One that is only ever made as passed cannot fail and
    is left out.
    """
    whole, begun = set(), set()
    makers = {"Check", "check", "problem", "setdefault", "all_of", "_unproved"}
    for path in VERIFY.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            maker = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            # The dictionary of a task's data has defaults as well.
            if maker not in makers or (maker == "setdefault" and "problems" not in ast.unparse(node.func)):
                continue
            name, *rest = node.args[1:] if maker == "_unproved" else node.args
            if rest and isinstance(rest[0], ast.Constant) and rest[0].value is True:
                continue
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and re.fullmatch(r"\w+", name.value):
                whole.add(name.value)
            elif isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
                begun.add(str(name.values[0].value))
    return whole, begun


def test_every_check_was_seen_red(tmp_path: Path) -> None:
    red = {name for _double, _task, name in LIES} | {name for _task, _answer, name in WRONG_ANSWERS}
    whole, begun = names_in_the_source()
    # So that a change of how checks are made does not leave this test looking at nothing.
    assert len(whole) > 50
    assert begun == {"same_", "exact_", "mermaid_edge_"}
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"content": "<think>", "id": 1}]}', encoding="utf-8")
    report = ask(LIES[0][0].__mro__[1], tmp_path, TASKS_OF_THE_HONEST, thinking=True)
    made = {check["name"] for task in report["tasks"].values() for check in task["checks"]} - {"protocol"}
    made |= {check.name for task, answer in RIGHT_ANSWERS.items() for check in judged(task, answer)}
    for beginning in begun:
        assert any(name.startswith(beginning) for name in made)
    unseen = (whole | made) - red
    assert unseen == set()
    # Nor is there a row about a check that is no more.
    assert red - whole - made == set()
