"""One verification from the first request to the report."""

from __future__ import annotations

import http.client
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from .. import __version__
from .client import Client, CouldNotRun, Deadlines
from .evidence import SCHEMA, host_identity, running_image, service_state, subject, utc_stamp
from .measure import spread
from .metrics import RUNNING, WAITING, read_metrics
from .needle import Needle
from .sampler import MemorySampler
from .session import LARGEST_TEMPLATE_OFFSET, Session, TaskResult
from .settings import Settings
from .tasks import NEEDLE_QUESTION, PrefillProgress, Task, chosen_tasks, needle_sentence, user
from .verdict import COULD_NOT_RUN, comparable, compare, judge

# Called with one line for each thing that is done.
Say = Callable[[str], None]
Step = Callable[[int, int | None, str, str], None]


def _nothing(*_args: object) -> None:
    """For a caller that wants no progress."""


def preflight(session: Session) -> None:
    """Everything that makes a verification impossible, in the order in which it can be known.

    Raises:
        CouldNotRun: with one line that says what to do.
    """
    client, settings = session.client, session.settings
    try:
        status, data = client.get_json("/v1/models")
    except (OSError, http.client.HTTPException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise CouldNotRun(
            f"endpoint {client.url} does not answer ({reason}): is the service up? see playbooks/status.yml"
        ) from error
    if status in (401, 403):
        raise CouldNotRun(
            f"endpoint {client.url} refuses the API key (status {status}): check the key file or REAP_API_KEY"
        )
    models = data.get("data") if isinstance(data, Mapping) else None
    if status != 200 or not isinstance(models, list):
        raise CouldNotRun(f"{client.url}/v1/models answers status {status}, wanted an OpenAI-compatible list of models")
    names = [item.get("id") for item in models if isinstance(item, Mapping)]
    served = next((item for item in models if isinstance(item, Mapping) and item.get("id") == client.model), None)
    if served is None:
        raise CouldNotRun(
            f"endpoint {client.url} serves {', '.join(map(str, names)) or 'nothing'}, not {client.model}: "
            "give its name with --model"
        )
    session.served = {key: served.get(key) for key in ("id", "root", "max_model_len", "owned_by")}
    length = served.get("max_model_len")
    if isinstance(length, int):
        session.context = length
    try:
        status, data = client.get_json("/version")
        session.vllm_version = str(data["version"]) if status == 200 and isinstance(data, Mapping) else None
    except (OSError, http.client.HTTPException, KeyError):
        session.vllm_version = None
    if session.context is not None:
        settings.check_context(session.context, "served context")
    session.has_metrics = read_metrics(client) is not None
    if not session.has_metrics:
        if settings.metrics == "required":
            raise CouldNotRun(
                f"{client.url}/metrics has no vLLM metrics, so the prefix cache cannot be proved cold: "
                "--metrics optional measures without that proof"
            )
        session.notes.append(
            "The server has no metrics: the prefix cache was not proved cold, and usage was not compared with counters."
        )
    _await_idle(session)
    _calibrate(session)


def _await_idle(session: Session) -> None:
    """Wait until nobody else is served: counters and times would be theirs, too.

    Raises:
        CouldNotRun: others go on. It gets no report: nothing is wrong with the endpoint.
    """
    patience = session.settings.idle_wait_s
    started = time.monotonic()
    while (now := session.snapshot()) is not None:
        others = (now.get(RUNNING) or 0) + (now.get(WAITING) or 0)
        if not others:
            return
        waited = time.monotonic() - started
        if waited > patience:
            busy = CouldNotRun(
                f"{session.client.url} has {others:.0f} requests of other clients, {patience:.0f} s after the first "
                "look: verify when nobody uses it"
            )
            busy.about_endpoint = False
            raise busy
        session.step(0, None, "tasks", f"waiting for {others:.0f} requests of other clients, {waited:.0f} s so far")
        time.sleep(0.2)


def why_not(session: Session) -> CouldNotRun | None:
    """What `preflight` finds; None when the verification can begin."""
    try:
        preflight(session)
    except CouldNotRun as error:
        return error
    except Exception as error:
        # See `run_task`: what a server can send has no end.
        return CouldNotRun(
            f"{session.client.url} sends what cannot be read ({type(error).__name__}: {error}): "
            "is it an OpenAI-compatible endpoint?"
        )
    return None


def _calibrate(session: Session) -> None:
    """One request that warms the server up, proves that usage is streamed, and ties the tokenizer to the usage."""
    text = "The harbour lists begin here. " * 8
    messages = user(f"[{session.label()}] {text}Say yes.")
    reply = session.client.chat(messages, max_tokens=8)
    if reply.status in (401, 403):
        raise CouldNotRun(
            f"endpoint {session.client.url} refuses the API key (status {reply.status}): "
            "check the key file or REAP_API_KEY"
        )
    if reply.usage is None:
        if reply.done and reply.finish_reason is not None:
            raise CouldNotRun(
                f"{session.client.url} streams no usage (stream_options.include_usage): "
                "without token counts nothing can be measured"
            )
        # A stream that broke is for the tasks to name.
        session.notes.append("The first request brought no usage; see the checks of the tasks.")
    counted = session.tokenize(messages)
    session.has_tokenizer = counted is not None
    if reply.usage is not None:
        session.tokens_per_character = max(0.05, (reply.usage.prompt - 12) / len(messages[0]["content"]))
    if counted is None:
        session.notes.append(
            "The server has no /tokenize: the length of long prompts is an estimate until its own usage states it."
        )
    elif reply.usage is not None and reply.usage.prompt != counted:
        offset = reply.usage.prompt - counted
        if abs(offset) <= LARGEST_TEMPLATE_OFFSET:
            session.template_offset = offset
            session.notes.append(
                f"/tokenize counts {-offset:+d} tokens against the usage of a chat request; corrected by that."
            )


def run_task(session: Session, task: Task, expected: bool) -> TaskResult:
    """Run one task; what goes wrong on the way is a failed check, never a traceback."""
    result = TaskResult(task.name, task.title, expected, ran=True)
    started = time.monotonic()
    try:
        task.work(session, result)
    except CouldNotRun as error:
        result.check("could_run", False, error, "a task that runs to its end")
    except (OSError, http.client.HTTPException) as error:
        result.check("connection", False, str(error) or type(error).__name__, "an endpoint that answers")
    except Exception as error:
        # What a server can send has no end. Something this suite trips over is no proof of anything, and no reason to
        # throw away what an hour of other tasks found.
        found = f"{type(error).__name__}: {error}"
        result.check("could_run", False, found, "a task that runs to its end")
    result.seconds = time.monotonic() - started
    return result


def warm_up(session: Session) -> float:
    """A long prompt before the measured one, so that the measurement holds no compilation. Returns its seconds."""
    settings = session.settings
    if not settings.warmup_tokens:
        return 0.0
    result = TaskResult("warmup", "", False)
    prompt = session.long_prompt(settings.warmup_tokens, [Needle(needle_sentence("WARM-UP"), 0.5)], NEEDLE_QUESTION)
    deadlines = session.client.deadlines.for_prompt(prompt.tokens, settings.slowest_prefill_tok_s)
    with PrefillProgress(session, prompt.tokens) as progress:
        reply = session.ask(result, prompt.messages, 4, deadlines=deadlines, on_token=progress.token, judge=False)
    return reply.end_s


def summary_line(result: TaskResult) -> str:
    """One line for a person."""
    state = "passed" if result.passed else "FAILED" if result.expected else "failed, as the profile expects"
    if result.passed and not result.expected:
        state = "passed, though the profile does not expect it"
    line = f"{result.name:<24} {state}  {result.seconds:.1f} s"
    if result.rates:
        rates = result.rates
        decode = f", decode {rates.decode_tok_s:.1f} tok/s" if rates.decode_tok_s else ""
        prefill = f"TTFT {rates.ttft_s:.2f} s, prefill {rates.prefill_tok_s:.1f} tok/s"
        line += f"  ({rates.prompt_tokens:,} tokens, {prefill}{decode})"
    if not result.passed:
        line += "".join(f"\n    {c.name}: found {c.found}, wanted {c.wanted}" for c in result.failed_checks)
    return line


def verify(
    settings: Settings, say: Say = _nothing, step: Step = _nothing, *, api_key: str | None = None
) -> dict[str, Any]:
    """Run the suite.

    Args:
        say: gets one line for each task.
        step: gets (done, total, unit, detail) while something long runs.
        api_key: where the settings name no file for it.

    Returns:
        The report: docs/report.schema.json says what is in it.

    Raises:
        CouldNotRun: nothing was proved and nothing refuted. Where the endpoint is the reason it has a report.
    """
    deadlines = Deadlines(
        first_token_s=settings.first_token_s, between_tokens_s=settings.between_tokens_s, total_s=settings.total_s
    )
    client = Client(
        settings.endpoint,
        settings.model,
        api_key=api_key or settings.api_key(),
        deadlines=deadlines,
        extra=None if settings.thinking is None else {"chat_template_kwargs": {"thinking": settings.thinking}},
    )
    tasks = chosen_tasks(settings.suite, settings.tasks)
    if settings.expected_tasks is not None:
        chosen_tasks(settings.suite, settings.expected_tasks)
    run_id = secrets.token_hex(4)
    session = Session(settings, client, run_id, step)
    started_unix, started = time.time(), time.monotonic()
    service = service_state(settings)
    results: list[TaskResult] = []
    phases: list[dict[str, Any]] = []
    sample = client.is_local if settings.sample_memory is None else settings.sample_memory
    sampler = MemorySampler(started, settings.memory_hertz)

    def phase(name: str, begun: float) -> None:
        phases.append(
            {"name": name, "start_s": round(begun - started, 3), "end_s": round(time.monotonic() - started, 3)}
        )

    with ExitStack() as stack:
        if sample:
            stack.enter_context(sampler)
        begun = time.monotonic()
        step(0, None, "tasks", "asking the endpoint who it is")
        reason = why_not(session)
        phase("preflight", begun)
        if reason is not None:
            if not reason.about_endpoint:
                raise reason
            seconds = time.monotonic() - started
            reason.report = _report(settings, session, [], phases, None, service, started_unix, seconds, str(reason))
            raise reason
        warmed = False
        for number, task in enumerate(tasks):
            step(number, len(tasks), "tasks", task.name)
            if not warmed and task.name in ("needle", "ladder", "grid") and settings.warmup_tokens:
                warmed, begun = True, time.monotonic()
                try:
                    seconds = warm_up(session)
                    say(f"{'warm-up':<24} {settings.warmup_tokens:,} tokens  {seconds:.1f} s")
                except (CouldNotRun, OSError, http.client.HTTPException) as error:
                    # The task after it meets the same, and says so by a check.
                    session.notes.append(f"The warm-up could not run: {error}")
                    say(f"{'warm-up':<24} could not run: {error}")
                phase("warm-up", begun)
            begun = time.monotonic()
            expected = settings.expected_tasks is None or task.name in settings.expected_tasks
            result = run_task(session, task, expected)
            results.append(result)
            phase(task.name, begun)
            say(summary_line(result))
    memory = sampler.summary(phases, settings.floor_kb) if sample else None
    if not sample:
        session.notes.append("The endpoint is on another machine: its memory was not sampled.")
    return _report(settings, session, results, phases, memory, service, started_unix, time.monotonic() - started)


def _report(
    settings: Settings,
    session: Session,
    results: Sequence[TaskResult],
    phases: list[dict[str, Any]],
    memory: dict[str, Any] | None,
    service: Mapping[str, Any],
    started_unix: float,
    seconds: float,
    could_not_run: str | None = None,
) -> dict[str, Any]:
    needle = next((result for result in results if result.name == "needle"), None)
    measured = [item for item in (needle.data.get("measured", []) if needle else []) if item]
    spreads = {}
    for name in ("ttft_s", "prefill_tok_s", "decode_tok_s"):
        found = spread([item[name] for item in measured if item[name] is not None])
        spreads[name] = found.to_dict() if found else None
    medians = {name: found["median"] if found else None for name, found in spreads.items()}
    prompt_tokens = measured[0]["prompt_tokens"] if measured else None
    not_compared = comparable(prompt_tokens, settings.reference, settings.simulated)
    comparison = (
        [] if not_compared or settings.reference is None
        else compare(medians, settings.reference, settings.slower_below, settings.fail_below)
    )  # fmt: skip
    if could_not_run is None:
        verdict, failures = judge(results, comparison, memory, settings.fail_below)
    else:
        verdict, failures = COULD_NOT_RUN, [could_not_run]
    # Where the endpoint is on another machine, this one's identity would be taken for the subject's.
    on_this_host = session.client.is_local if settings.sample_memory is None else settings.sample_memory
    running = running_image(service) if on_this_host else None
    if running and running["base_validated"] is False:
        session.notes.append(f"The image is made of {running['base']}, which is NOT the validated image.")
    retained = None
    if needle is not None and needle.ran:
        found_all = [item["found"] for item in needle.data.get("needles", [])]
        retained = bool(found_all) and all(found_all)
    return {
        "schema": SCHEMA,
        "reap_version": __version__,
        "subject": subject(settings, service),
        "run_id": session.run_id,
        "stamp": utc_stamp(started_unix),
        "started_unix": round(started_unix, 3),
        "seconds": round(seconds, 3),
        "host": settings.host or socket.gethostname(),
        "hardware": settings.hardware,
        "simulated": settings.simulated,
        "profile": settings.profile,
        "suite": settings.suite,
        "endpoint": session.client.url,
        "model": settings.model,
        "vllm_version": session.vllm_version,
        "identity": {
            "host": host_identity() if on_this_host else None,
            "running": running,
            "served": session.served or None,
            "service": {key: service.get(key) for key in ("generation", "container_id", "started_unix", "boot_id")},
            **settings.identity,
        },
        "verdict": verdict,
        "failures": failures,
        "notes": session.notes,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": measured[0]["completion_tokens"] if measured else None,
        **medians,
        "measurements": spreads,
        "needle_retained": retained,
        "long_prompts": session.long_prompts,
        "tasks": {result.name: result.to_dict() for result in results},
        "phases": phases,
        "memory": memory,
        "mem_available_min_kb": memory["min_kb"] if memory else None,
        "token_times": session.token_times,
        "reference": settings.reference,
        "not_compared": not_compared,
        "comparison": comparison,
        "tolerances": {"slower_below": settings.slower_below, "fail_below": settings.fail_below},
    }
