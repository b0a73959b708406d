"""The tasks, as data: what each proves, in which suites it runs, and the function that can find it wrong."""

from __future__ import annotations

import http.client
import itertools
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .checks import Check, answer_checks, bare, tool_call_checks
from .client import CouldNotRun, Reply
from .metrics import GENERATED, KV_USAGE, RUNNING
from .needle import Needle, new_code
from .prompts import PROMPTS, UNICODE_SAMPLES, PromptTask, prose
from .session import Session, TaskResult

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
LONG = ("full", "grid")


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
    """The model under the name is the one of the profile: context length, path, tokenizer.

    That it is served under the name at all was found before: without that nothing runs.
    """
    settings, served = session.settings, session.served
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
    else:
        result.note = "no folder of the model is known here: its tokenizer was not compared with the server's"
    # Another prompt than the one of the calibration: what its count was corrected by must be the template's.
    session.ask(result, user("Say yes."), 8)


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
    if session.settings.thinking is True:
        found = f"{len(reply.reasoning)} characters of reasoning"
        result.check("reasoning_apart", reply.reasoning != "", found, "reasoning, apart from the content")


def streaming(session: Session, result: TaskResult) -> None:
    """Tokens come as they are made, not in one piece at the end."""
    code = new_code(session.rng, groups=5, size=6)
    reply = session.ask(result, repeat_prompt(session, code), session.settings.answer_max_tokens)
    result.checks.extend(answer_checks(reply, code))
    # The code is a dozen tokens or more in any vocabulary. With speculation up to three of them share an event.
    events = [event for event in reply.events if event.kind == "content"]
    reads = len({event.read for event in events})
    result.check("incremental_events", len(events) >= 4, f"the content came in {len(events)} events", "4 or more")
    result.check("incremental_reads", reads >= 3, f"{len(events)} events in {reads} arrivals", "3 arrivals or more")


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
) -> list[Check]:
    """Hide one needle and ask for it. Returns what was wrong about the reply, the answer itself first."""
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
    answered = answer_checks(reply, code, question=NEEDLE_QUESTION)
    result.checks.extend(answered)
    failed = result.failed_checks[before:]
    measured = session.measured(result, reply)
    record = {
        "tokens": reply.usage.prompt if reply.usage else prompt.tokens,
        "wanted_tokens": tokens,
        "exact": prompt.exact,
        "measured_by": prompt.measured_by,
        "depth": depth,
        "code": code,
        "answer": bare(reply.content)[:200],
        "found": all(check.passed for check in answered),
        "failed": [check.name for check in failed],
        "rates": measured.to_dict() if measured else None,
    }
    session.long_prompts.append(record)
    result.data.setdefault("needles", []).append(record)
    if measure:
        result.data.setdefault("measured", []).append(record["rates"])
        if number == 0:
            session.token_times = [[round(event.at, 4), index + 1] for index, event in enumerate(reply.events)]
    # The answer first: whoever asks why it ended wants to know whether the needle was lost.
    return sorted(failed, key=lambda check: check not in answered)


class TokenProgress:
    """Says how many tokens of a long answer have come."""

    period = 1.0

    def __init__(self, session: Session, limit: int) -> None:
        self.session, self.limit = session, limit
        self._said = 0.0

    def token(self, reply: Reply) -> bool | None:
        """To be called for each token that comes."""
        now = time.monotonic()
        if now - self._said >= self.period:
            self._said = now
            self.session.step(len(reply.events), self.limit, "tokens", "answering, up to the limit")
        return None


class PrefillProgress:
    """Says how far a long prompt has come while nothing is streamed yet: from the fill of the KV cache.

    DeepSeek V4 keeps several kinds of cache. Those of its windows are full after the first piece of a prompt; from
    then on one block of the others is taken for `block_size` tokens. A server may state the smallest size of all kinds
    (4 for V4, vLLM issue 51163). So where it states another than the profile's, or where the first piece takes far
    more than its tokens, the position is that piece and what is taken after it.
    """

    # Seconds between two looks.
    period = 1.0

    def __init__(self, session: Session, tokens: int) -> None:
        self.session, self.tokens = session, tokens
        self.piece = min(tokens, session.settings.prefill_piece)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="prefill-progress", daemon=True)
        self._answered = 0.0

    def _watch(self) -> None:
        first = self.session.snapshot()
        size = self.session.settings.block_size
        stated, capacity = (first.kv_tokens(), first.kv_tokens(size)) if first else (None, None)
        base = (first.get(KV_USAGE) or 0.0) if first else 0.0
        begun, offset = False, 0
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
            if not begun and usage > base:
                begun = True
                if size and (stated != capacity or (usage - base) * capacity > 1.5 * self.piece):
                    offset, base = self.piece, usage
            position = max(0, min(self.tokens, offset + round((usage - base) * capacity)))
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


# ------------------------------------------------------------------------------------------------- streams


def accounting(session: Session, result: TaskResult) -> None:
    """The usage that is stated is what the server's own counters counted."""
    if not session.has_metrics:
        result.note = "the server has no metrics to compare with"
    code = new_code(session.rng)
    session.ask(result, repeat_prompt(session, code), session.settings.answer_max_tokens, accounting=True)


def stream_equals_whole(session: Session, result: TaskResult) -> None:
    """At temperature 0 a streamed answer and one in a piece are the same.

    The question has one right answer, so the answers must agree. The thoughts before them need not: a GPU adds in no
    fixed order, and vLLM does not promise the same bits twice (its documentation, "Reproducibility").
    """
    code = new_code(session.rng, groups=5, size=6)
    messages = repeat_prompt(session, code)
    limit = session.settings.answer_max_tokens
    streamed = session.ask(result, messages, limit)
    whole = session.ask(result, messages, limit, stream=False)
    for name, one, other in (
        ("content", bare(streamed.content), bare(whole.content)),
        ("finish_reason", streamed.finish_reason, whole.finish_reason),
    ):
        found = "the same" if one == other else f"streamed {str(one)[:120]!r}, whole {str(other)[:120]!r}"
        result.check(f"same_{name}", one == other, found, "the same")
    lengths = [len(reply.reasoning) for reply in (streamed, whole)]
    found = f"streamed {lengths[0]} characters of it, whole {lengths[1]}"
    result.check("reasoning_in_both", (lengths[0] > 0) == (lengths[1] > 0), found, "reasoning in both or in none")
    if streamed.reasoning != whole.reasoning:
        result.note = "the two were thought out in different words, which vLLM allows"
    elif streamed.content == whole.content and streamed.usage and whole.usage:
        counts = streamed.usage.completion, whole.usage.completion
        result.check("same_usage", counts[0] == counts[1], "{} and {} completion tokens".format(*counts), "the same")


# Characters that two answers at temperature 0 share at the least, about 30 tokens. Sampling at a temperature of 1 keeps
# two texts together for a few tokens, the noise of a GPU's sums parts them at a tie now and then.
LEAST_ALIKE = 120


def temperature_zero(session: Session, result: TaskResult) -> None:
    """Temperature 0 is obeyed: of three answers two begin alike, at a length that sampling does not reach.

    Not all of their text: see `stream_equals_whole`. Three, because at a tie of two tokens two of three agree.
    """
    messages = user(f"[{session.label()}] Invent a name for a small planet and describe it in one sentence.")
    replies = [session.ask(result, messages, 96) for _ in range(3)]
    texts = [reply.reasoning + reply.content for reply in replies]
    alike = 0
    for one, other in itertools.combinations(texts, 2):
        shortest = min(len(one), len(other))
        shared = next((i for i in range(shortest) if one[i] != other[i]), shortest)
        alike = max(alike, LEAST_ALIKE if one == other else shared)
    found = f"two of three answers share {alike} characters" if alike < LEAST_ALIKE else "two of three begin alike"
    result.check("alike_at_0", alike >= LEAST_ALIKE, found, f"{LEAST_ALIKE} characters, or all")


def temperature_high(session: Session, result: TaskResult) -> None:
    """A high temperature is obeyed: of several replies not all are the same."""
    messages = user(f"[{session.label()}] Invent a name for a small planet. Answer with the name only.")
    texts = set()
    for seed in (11, 22, 33, 44):
        # A few tokens are enough to differ in. So hot a text may hold half a character that was sampled, not broken.
        reply = session.ask(result, messages, 48, temperature=1.5, extra={"seed": seed}, tolerated=("utf8_intact",))
        texts.add(reply.reasoning + reply.content)
    result.check("diverse_at_1_5", len(texts) > 1, f"{len(texts)} different of 4 replies", "more than one")


def unicode_exact(session: Session, result: TaskResult) -> None:
    """Text in many scripts survives the way through the stream byte for byte."""
    for name, sample in UNICODE_SAMPLES:
        reply = session.ask(result, repeat_prompt(session, sample), session.settings.answer_max_tokens)
        answer = bare(reply.content)
        exact = answer.encode() == sample.encode()
        found = answer[:80]
        if not exact and unicodedata.normalize("NFC", answer) == unicodedata.normalize("NFC", sample):
            found += " (another normal form: the marks were composed or taken apart)"
        result.check(f"exact_{name}", exact, repr(found), repr(sample))


def prompt_work(task: PromptTask) -> Work:
    """The function of a task that is one prompt and its checkers."""

    def work(session: Session, result: TaskResult) -> None:
        settings = session.settings
        limit = session.limit(settings.essay_max_tokens if task.essay else settings.answer_max_tokens)
        # The label keeps the prompt out of every cache; it stands last, away from the question.
        messages = user(f"{task.prompt}\n\n(Reference {session.label()}; do not repeat it.)")
        reply = session.ask(result, messages, limit, on_token=TokenProgress(session, limit).token)
        if reply.finish_reason == "length":
            where = "in the content" if reply.content else "in the reasoning"
            result.check("finished", False, f"the limit of {limit} tokens ended it {where}", "an answer that ends")
        result.checks.extend(prose(task, reply.content) if task.least_characters > 1 else [])
        for checker in task.checkers:
            result.checks.extend(checker(reply.content))

    return work


# ------------------------------------------------------------------------------------------------- tools

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
WEATHER_QUESTION = "What is the weather in Paris right now? Use the tool."


def _ask_weather(session: Session, result: TaskResult, *, stream: bool) -> Reply:
    messages = user(f"{WEATHER_QUESTION} (Reference {session.label()}.)")
    reply = session.ask(result, messages, session.settings.answer_max_tokens, stream=stream, extra={"tools": [WEATHER]})
    schema = WEATHER["function"]["parameters"]
    result.checks.extend(tool_call_checks(reply, "get_weather", schema, {"city": "Paris"}))
    return reply


def tool_call(session: Session, result: TaskResult) -> None:
    """A tool is called with arguments that are JSON, keep the schema and are right; streamed and in one piece."""
    for stream in (True, False):
        _ask_weather(session, result, stream=stream)


def tool_round_trip(session: Session, result: TaskResult) -> None:
    """The result of a tool reaches the answer."""
    reply = _ask_weather(session, result, stream=True)
    if not reply.tool_calls:
        return
    call = reply.tool_calls[0]
    # Two digits: a single one stands in many a text by chance. No sign: there are many ways to say one.
    degrees = f"{session.rng.randint(11, 39)}"
    messages: list[dict[str, Any]] = [
        *user(WEATHER_QUESTION),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": call["id"] or "call-1",
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call["id"] or "call-1", "content": f"{degrees} degrees and hail"},
    ]
    answer = session.ask(result, messages, session.settings.answer_max_tokens, extra={"tools": [WEATHER]})
    found = repr(answer.content[:200])
    said = re.search(rf"(?<![\d.,]){degrees}(?!\d)", answer.content) is not None
    result.check("tool_result_used", said, found, f"{degrees} degrees in the content")
    result.check("no_second_call", not answer.tool_calls, f"{len(answer.tool_calls)} calls", "an answer, no call")


def tool_not_due(session: Session, result: TaskResult) -> None:
    """No tool is called when none is of use."""
    messages = user(f"What is 7 times 6? Answer with the number only. (Reference {session.label()}.)")
    reply = session.ask(result, messages, session.settings.answer_max_tokens, extra={"tools": [WEATHER]})
    names = ", ".join(call["name"] for call in reply.tool_calls) or "no call"
    result.check("no_tool_called", not reply.tool_calls, names, "no call")
    result.check("answer", "42" in reply.content, repr(reply.content[:120]), "42")


# ------------------------------------------------------------------------------------------------- limits


def over_context(session: Session, result: TaskResult) -> None:
    """A prompt longer than the context is refused with a clean 400, and the server goes on."""
    context = session.context
    if context is None:
        result.check("context_known", False, "the server states no context length", "max_model_len in /v1/models")
        return
    # Five-letter groups with digits: no tokenizer needs fewer than one token for each.
    words = (f"{session.rng.randint(10000, 99999)}" for _ in range(context + 64))
    reply = session.ask(result, user(" ".join(words)), 16, judge=False)
    result.exchanges[-1]["sent"] = f"{context + 64} random numbers"
    result.check("status_400", reply.status == 400, f"status {reply.status}", "status 400")
    found = (reply.error or reply.body)[:200]
    result.check("error_message", reply.error is not None, found, "error.message in a JSON body")
    code = new_code(session.rng)
    after = session.ask(result, repeat_prompt(session, code), session.settings.answer_max_tokens)
    result.checks.extend(answer_checks(after, code))


def cancellation(session: Session, result: TaskResult) -> None:
    """Closing the connection ends the work: the server is free for the next request at once."""
    messages = user(f"[{session.label()}] Count from 1 to 5000, separated by spaces, and leave out nothing.")
    limit = min(4096, (session.context or 8192) // 2)
    reply = session.ask(
        result, messages, limit, extra={"ignore_eos": True}, on_token=lambda seen: len(seen.events) < 4, judge=False
    )
    result.check(
        "was_running", reply.cancelled, f"{len(reply.events)} events, cancelled: {reply.cancelled}", "cancelled"
    )
    if session.has_metrics:
        waited, patience = time.monotonic(), session.settings.cancel_wait_s
        running: float | None = None
        while time.monotonic() - waited < patience:
            now = session.snapshot()
            running = now.get(RUNNING) if now else None
            if running == 0:
                break
            time.sleep(0.1)
        result.check("nothing_runs", running == 0, f"{running} requests run {patience:g} s later", "0 requests")
        if running == 0:
            first = session.snapshot()
            time.sleep(1.0)
            second = session.snapshot()
            grown = second.growth(first, GENERATED) if first and second else None
            result.check("no_more_tokens", not grown, f"{grown} tokens in the next second", "0 tokens")
    else:
        result.note = "the server has no metrics: only that the next request is answered was seen"
    code = new_code(session.rng)
    after = session.ask(result, repeat_prompt(session, code), session.settings.answer_max_tokens)
    result.checks.extend(answer_checks(after, code))


# ------------------------------------------------------------------------------------------------- more needles

CITIES = ("Rotterdam", "Valparaiso", "Nairobi", "Trondheim", "Osaka", "Winnipeg")


def needle_among_distractors(session: Session, result: TaskResult) -> None:
    """Of several needles that look alike, the one that was asked for is given, and no other."""
    codes = {city: new_code(session.rng) for city in session.rng.sample(CITIES, 4)}
    asked = session.rng.choice(sorted(codes))
    needles = [
        Needle(f"Note that the secret code of the vault in {city} is {code}.", (index + 0.5) / len(codes))
        for index, (city, code) in enumerate(codes.items())
    ]
    question = f"What is the secret code of the vault in {asked}? Answer with the code only."
    room = (session.context or 8192) - session.settings.needle_max_tokens
    prompt = session.long_prompt(min(8000, session.settings.needle_tokens, room), needles, question)
    reply = session.ask(
        result,
        prompt.messages,
        session.settings.needle_max_tokens,
        wanted_tokens=prompt.tokens if session.has_tokenizer else None,
        deadlines=session.client.deadlines.for_prompt(prompt.tokens, session.settings.slowest_prefill_tok_s),
    )
    others = [code for city, code in codes.items() if city != asked]
    result.checks.extend(answer_checks(reply, codes[asked], others, question))


def after_needle(session: Session, result: TaskResult) -> None:
    """After the long prompt a short request is answered as before."""
    smoke(session, result)


# Near the beginning: what a server drops without a word it drops there first, and the measured needle stands deeper.
LADDER_DEPTH = 0.05


def ladder(session: Session, result: TaskResult) -> None:
    """Needles near the beginning of longer and longer prompts.

    Ends at the first loss, and at anything else that is wrong with a reply.
    """
    for tokens in session.settings.ladder():
        failed = ask_needle(session, result, tokens, LADDER_DEPTH)
        if failed:
            check, lost = failed[0], not result.data["needles"][-1]["found"]
            result.data["stopped"] = {"tokens": tokens, "lost": lost, **check.to_dict()}
            result.note = (
                f"{'lost' if lost else 'found, but ended'} at {tokens:,} tokens: {check.name}: found {check.found}, "
                f"wanted {check.wanted}; longer ones were not tried"
            )
            return


def grid(session: Session, result: TaskResult) -> None:
    """Needles at every depth of every length; all are tried, whatever is lost."""
    for tokens in session.settings.ladder():
        for depth in session.settings.depths:
            ask_needle(session, result, tokens, depth)


TASKS: tuple[Task, ...] = (
    Task("health", "the server says that it is well", ALL, health),
    Task("identity", "the served model is the profile's: name, context length, path, tokenizer", ALL, identity),
    Task("smoke", "a short request gets exactly the text it asks for", ALL, smoke),
    Task("streaming", "tokens come as they are made", ALL, streaming),
    Task("accounting", "the stated usage is what the server's counters counted", ALL, accounting),
    Task("stream_equals_whole", "streamed and whole answers are the same", STANDARD, stream_equals_whole),
    Task("temperature_zero", "temperature 0 gives the same text again", STANDARD, temperature_zero),
    Task("temperature_high", "temperature 1.5 gives different texts", STANDARD, temperature_high),
    Task("unicode", "text in many scripts comes back byte for byte", STANDARD, unicode_exact),
    *(Task(task.name, task.title, STANDARD, prompt_work(task)) for task in PROMPTS),
    Task("tool_call", "a tool is called with the right arguments", STANDARD, tool_call),
    Task("tool_round_trip", "a tool's result reaches the answer", STANDARD, tool_round_trip),
    Task("tool_not_due", "no tool is called when none is of use", STANDARD, tool_not_due),
    Task("over_context", "a prompt over the context gets a clean 400", STANDARD, over_context),
    Task("cancellation", "closing the connection frees the server", STANDARD, cancellation),
    Task(
        "needle_among_distractors",
        "of several needles that look alike, the one that was asked for is given",
        STANDARD,
        needle_among_distractors,
    ),
    Task("ladder", "needles in longer and longer prompts are found", LONG, ladder),
    Task("grid", "needles at every depth of every length are found", ("grid",), grid),
    Task("needle", "a needle in a prompt of the profile's length is found; the rates are measured", STANDARD, needle),
    Task("after_needle", "a short request after the long one is answered as before", STANDARD, after_needle),
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
