"""The tasks, as data: what each proves, in which suites it runs, and the function that can find it wrong."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .checks import answer_checks, bare
from .client import CouldNotRun, Reply
from .metrics import KV_USAGE
from .needle import Needle, new_code
from .session import LARGEST_TEMPLATE_OFFSET, Session, TaskResult

Work = Callable[[Session, TaskResult], None]


@dataclass(frozen=True)
class Task:
    """One thing to prove. `suites` are those in which it runs."""

    name: str
    title: str
    suites: tuple[str, ...]
    work: Work


ALL = ("quick", "standard", "full", "grid")
STANDARD = ("standard", "full", "grid")


def user(text: str) -> list[dict[str, Any]]:
    """One user message."""
    return [{"role": "user", "content": text}]


def repeat_prompt(session: Session, code: str) -> list[dict[str, Any]]:
    """A short request with one right answer, unlike any other in the run."""
    return user(f"[{session.label()}] The secret code is {code}.\nRepeat the code exactly, and nothing else.")


# ------------------------------------------------------------------------------------------------- the subject


def health(session: Session, result: TaskResult) -> None:
    """The server says that it is well. Green while the engine hangs, so nothing rests on it alone."""
    status, _body = session.client.exchange("GET", "/health")
    result.check("health", status == 200, f"status {status}", "status 200")


def identity(session: Session, result: TaskResult) -> None:
    """The model under the name is the one of the profile: context length, path, tokenizer."""
    settings, client = session.settings, session.client
    status, data = client.get_json("/v1/models")
    models = data.get("data") if isinstance(data, Mapping) else None
    names = [str(item.get("id")) for item in models or [] if isinstance(item, Mapping)]
    found = ", ".join(names) or f"status {status}"
    if not result.check("model_name", client.model in names, found, client.model):
        return
    served = next(item for item in models or [] if item.get("id") == client.model)
    session.served = dict(served)
    length = served.get("max_model_len")
    if settings.max_model_len is not None:
        wanted = settings.max_model_len
        result.check("context_length", length == wanted, f"{length} tokens", f"{wanted} tokens")
    if settings.model_path is not None:
        root = served.get("root")
        result.check("model_path", root == settings.model_path, root, settings.model_path)
    added = settings.added_tokens()
    if added:
        _tokenizer_fingerprint(session, result, added)
    elif settings.model_dir is not None:
        result.note = f"{settings.model_dir} has no tokenizer.json: the tokenizer was not compared"
    probe = session.ask(result, user("Say yes."), 8, count_tokens=False)
    if probe.usage is not None and session.has_tokenizer:
        offset = session.template_offset
        result.check("template_offset", abs(offset) <= LARGEST_TEMPLATE_OFFSET, offset, "a constant of the template")


def _tokenizer_fingerprint(session: Session, result: TaskResult, added: Mapping[str, int]) -> None:
    """Special tokens have the ids that the model's own tokenizer.json gives them."""
    wrong = []
    for text, wanted in added.items():
        body = {"model": session.client.model, "prompt": text, "add_special_tokens": False}
        try:
            status, data = session.client.get_json("/tokenize", body)
        except (OSError, http.client.HTTPException):
            status, data = 0, None
        tokens = data.get("tokens") if status == 200 and isinstance(data, Mapping) else None
        if tokens is None:
            result.note = "the server has no /tokenize: its tokenizer was not compared with the model's"
            return
        if tokens != [wanted]:
            wrong.append(f"{text} is {tokens}, wanted [{wanted}]")
    result.check(
        "tokenizer", not wrong, "; ".join(wrong) or f"{len(added)} special tokens agree", "the model's own ids"
    )


# ------------------------------------------------------------------------------------------------- short requests


def smoke(session: Session, result: TaskResult) -> None:
    """A short request gets exactly the text it asks for, in the content."""
    code = new_code(session.rng)
    reply = session.ask(result, repeat_prompt(session, code), session.settings.answer_max_tokens)
    result.checks.extend(answer_checks(reply, code))
    result.check("exact_text", bare(reply.content) == code, repr(reply.content[:120]), repr(code))
    if session.settings.thinking is True and reply.reasoning == "":
        result.note = "the profile thinks, but no reasoning came apart from the content"


def streaming(session: Session, result: TaskResult) -> None:
    """Tokens come as they are made, not in one piece at the end."""
    code = new_code(session.rng, groups=5, size=6)
    reply = session.ask(result, repeat_prompt(session, code), session.settings.answer_max_tokens)
    result.checks.extend(answer_checks(reply, code))
    tokens = reply.usage.completion if reply.usage else 0
    # A token or two may share an event (speculative decoding) or a read; a whole answer may not.
    wanted = max(2, tokens // 8)
    result.check("incremental_events", len(reply.events) >= wanted, f"{len(reply.events)} events", f">= {wanted}")
    result.check(
        "incremental_reads",
        reply.reads >= wanted,
        f"{len(reply.events)} events in {reply.reads} arrivals for {tokens} tokens",
        f"at least {wanted} arrivals",
    )


# ------------------------------------------------------------------------------------------------- needles

NEEDLE_QUESTION = "What is the secret code in the notes above? Answer with the code only."


def needle_sentence(code: str) -> str:
    """The sentence to hide."""
    return f"The secret code is {code}."


def needle(session: Session, result: TaskResult) -> None:
    """One needle at the profile's length and depth is found, and the request is measured."""
    settings = session.settings
    for number in range(settings.repeats):
        ask_needle(session, result, settings.needle_tokens, settings.needle_depth, measure=True, number=number)
        if result.failed_checks:
            break


def ask_needle(
    session: Session, result: TaskResult, tokens: int, depth: float, *, measure: bool = False, number: int = 0
) -> bool:
    """Hide one needle and ask for it. Returns whether it was found and everything about the reply was right."""
    settings = session.settings
    code = new_code(session.rng)
    session.step(0, tokens, "tokens", f"writing a prompt of {tokens:,} tokens")
    prompt = session.long_prompt(tokens, [Needle(needle_sentence(code), depth)], NEEDLE_QUESTION)
    if session.has_tokenizer:
        result.check("prompt_length", prompt.exact, f"{prompt.tokens} tokens", f"{tokens} tokens")
    before = len(result.failed_checks)
    with PrefillProgress(session, prompt.tokens) as progress:
        reply = session.ask(
            result,
            prompt.messages,
            settings.needle_max_tokens,
            wanted_tokens=prompt.tokens if session.has_tokenizer else None,
            accounting=True,
            cold=True,
            deadlines=session.client.deadlines.for_prompt(prompt.tokens, settings.slowest_prefill_tok_s),
            on_token=progress.token,
        )
    result.checks.extend(answer_checks(reply, code, question=NEEDLE_QUESTION))
    found = len(result.failed_checks) == before
    measured = session.measured(result, reply)
    record = {
        "tokens": reply.usage.prompt if reply.usage else prompt.tokens,
        "wanted_tokens": tokens,
        "exact": prompt.exact,
        "measured_by": prompt.measured_by,
        "depth": depth,
        "code": code,
        "answer": bare(reply.content)[:200],
        "found": code in reply.content,
        "rates": measured.to_dict() if measured else None,
    }
    session.long_prompts.append(record)
    result.data.setdefault("needles", []).append(record)
    if measure:
        result.data.setdefault("measured", []).append(record["rates"])
        if number == 0:
            session.token_times = [[round(event.at, 4), index + 1] for index, event in enumerate(reply.events)]
    return found


class PrefillProgress:
    """Says how far a long prompt has come while nothing is streamed yet: from the fill of the KV cache."""

    def __init__(self, session: Session, tokens: int, period: float = 1.0) -> None:
        self.session, self.tokens, self.period = session, tokens, period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="prefill-progress", daemon=True)
        self._answered = 0.0

    def _watch(self) -> None:
        first = self.session.snapshot()
        capacity = first.kv_tokens() if first else None
        base = (first.get(KV_USAGE) or 0.0) if first else 0.0
        started = time.monotonic()
        while not self._stop.wait(self.period):
            now = self.session.snapshot()
            usage = now.get(KV_USAGE) if now else None
            waited = time.monotonic() - started
            if self._answered:
                return
            if capacity is None or usage is None:
                self.session.step(0, self.tokens, "tokens", f"reading the prompt, {waited:.0f} s so far")
                continue
            position = max(0, min(self.tokens, round((usage - base) * capacity)))
            self.session.step(position, self.tokens, "tokens", f"reading the prompt, {waited:.0f} s so far")

    def token(self, reply: Reply) -> bool | None:
        """To be called for each token that comes."""
        now = time.monotonic()
        if now - self._answered >= self.period:
            self._answered = now
            self.session.step(self.tokens, self.tokens, "tokens", f"answering, {len(reply.events)} tokens so far")
        return None

    def __enter__(self) -> PrefillProgress:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=15)


TASKS: tuple[Task, ...] = (
    Task("health", "the server says that it is well", ALL, health),
    Task("identity", "the served model is the profile's: name, context length, path, tokenizer", ALL, identity),
    Task("smoke", "a short request gets exactly the text it asks for", ALL, smoke),
    Task("streaming", "tokens come as they are made", ALL, streaming),
    Task("needle", "a needle in a prompt of the profile's length is found; the rates are measured", ALL, needle),
)


def chosen_tasks(suite: str, names: list[str] | None) -> list[Task]:
    """The tasks of a suite, or exactly the named ones.

    Raises:
        CouldNotRun: a name that is no task.
    """
    if names is None:
        return [task for task in TASKS if suite in task.suites]
    known = {task.name: task for task in TASKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CouldNotRun(f"no task is called {', '.join(unknown)}; known: {', '.join(known)}")
    return [task for task in TASKS if task.name in names]
