"""``reap verify``: run the suite against an endpoint, say one line a task, write the evidence."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from ..fetch.progress import Progress
from ..verify import CouldNotRun, Settings, verify
from ..verify.evidence import (
    another_generation,
    check_writable,
    generation_passed,
    keep_report,
    service_state,
    subject,
    verified_before,
)
from ..verify.settings import SUITES
from ..verify.verdict import PASSING, headline

HELP = "prove that an endpoint does what its profile says"
# Where the API key may come from when there is no file for it; never from the command line.
KEY_VARIABLES = ("REAP_API_KEY", "OPENAI_API_KEY")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``reap verify``."""
    parser.epilog = (
        "Exit: 0 passed (or passed but slower), 1 failed, 2 could not run. The API key is read from the configured "
        f"file or from the environment: {' or '.join(KEY_VARIABLES)}."
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings as JSON, for example /etc/reap/verify.json"
    )
    parser.add_argument("--endpoint", metavar="URL", help="base URL of an OpenAI-compatible endpoint")
    parser.add_argument("--model", metavar="NAME", help="served name of the model")
    parser.add_argument("--suite", choices=SUITES, help="quick, standard (default), full or grid")
    parser.add_argument("--tasks", metavar="A,B", help="only these tasks")
    parser.add_argument("--expect", metavar="A,B", help="the tasks that must pass (default: all that run)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="context length the server must state, tokens")
    parser.add_argument("--needle-tokens", type=int, metavar="N", help="length of the long prompt, tokens")
    parser.add_argument("--needle-depth", type=float, metavar="X", help="where the needle stands in it, 0 to 1")
    parser.add_argument("--lengths", metavar="N,N", help="lengths of the suites full and grid, tokens")
    parser.add_argument("--repeats", type=int, metavar="N", help="how often the long prompt is measured")
    parser.add_argument("--warmup-tokens", type=int, metavar="N", help="length of the request before the first long "
                        "one, so that kernels are compiled; 0: none")  # fmt: skip
    parser.add_argument("--metrics", choices=("required", "optional"), help="whether vLLM's metrics must be there")
    parser.add_argument("--thinking", choices=("true", "false"), help="what the chat template is asked to do")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder that gets one folder per run")
    parser.add_argument("--unless-verified", action="store_true", help="nothing to do where this very start of this "
                        "service passed with these settings before")  # fmt: skip
    parser.add_argument("--progress", type=Path, metavar="FILE", help="write how far it is to this file")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON for a program")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _lengths(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise CouldNotRun(f"--lengths is {text!r}, wanted whole numbers of tokens with commas between them") from None


def settings_from(args: argparse.Namespace) -> Settings:
    """Settings from the file, the command line over it.

    Raises:
        CouldNotRun: neither a file nor an endpoint and a model.
    """
    given: dict[str, Any] = {
        "endpoint": args.endpoint,
        "model": args.model,
        "suite": args.suite,
        "tasks": _names(args.tasks),
        "expected_tasks": _names(args.expect),
        "max_model_len": args.max_model_len,
        "needle_tokens": args.needle_tokens,
        "needle_depth": args.needle_depth,
        "lengths": _lengths(args.lengths),
        "repeats": args.repeats,
        "warmup_tokens": args.warmup_tokens,
        "metrics": args.metrics,
        "thinking": None if args.thinking is None else args.thinking == "true",
        "evidence_dir": str(args.out) if args.out else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.config:
        return Settings.from_file(args.config, **given)
    if not args.endpoint or not args.model:
        raise CouldNotRun("give --config FILE, or --endpoint URL and --model NAME")
    given.setdefault("evidence_dir", "evidence")
    return Settings.from_mapping(given, "the command line")


def outcome(report: dict[str, Any], path: str, settings: Settings, *, skipped: bool) -> dict[str, Any]:
    """What a program reads from the last line.

    `go_back_to` names the generation that served here before when this run did not pass, or could not even begin, and
    its own generation never passed one: then that one is the better one. A generation that passed once and fails now
    has met something else.
    """
    generation = report["identity"]["service"]["generation"]
    proved = report["verdict"] in PASSING or generation_passed(Path(path).parents[1], generation)
    return {
        "go_back_to": None if proved else another_generation(settings, generation),
        "changed": not skipped,
        "skipped": skipped,
        "report": path,
        "folder": str(Path(path).parent),
        "verdict": report["verdict"],
        "headline": headline(report["verdict"], report["comparison"]),
        "failures": report["failures"],
    }


class TerminalLine:
    """One line on a terminal that says how far it is, gone when something is printed; nothing where there is none."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = False

    def show(self, text: str) -> None:
        if self._stream.isatty():
            width = shutil.get_terminal_size((100, 24)).columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=self._stream, flush=True)
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._shown = False


def run(args: argparse.Namespace) -> int:
    """Returns 0 passed, 1 failed; 2 (could not run) is raised as CouldNotRun."""
    progress = Progress(args.progress, "verify", unit="tasks") if args.progress else None
    line = TerminalLine(sys.stderr)

    def say(text: str) -> None:
        line.clear()
        print(text, flush=True)

    task = ""

    def step(done: int, total: int | None, unit: str, detail: str) -> None:
        nonlocal task
        if unit == "tasks":
            task = f"{detail}, task {done + 1} of {total}" if total else detail
        position = f", {done:,} of {total:,} {unit}" if total and done and unit != "tasks" else ""
        line.show(task if unit == "tasks" else f"{task}: {detail}{position}")
        if progress is None:
            return
        if unit == "tasks":
            # No rate: the last tasks take most of the time.
            progress.state.update(done=0, total=None, rate=None, eta_s=None)
            progress.update(detail=task)
        else:
            progress.state["unit"] = unit
            progress.update(done, total=total, detail=f"{task}: {detail}")

    try:
        settings = settings_from(args)
        parent = Path(settings.evidence_dir)
        check_writable(parent)
        if not settings.api_key_file:
            key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        else:
            key = settings.api_key()
        service = service_state(settings)
        # Without the service's own word on when it started, nothing says that it is the one of before.
        if args.unless_verified and service:
            before = verified_before(parent, subject(settings, service))
            if before is not None:
                say(f"verified before, {before['verdict']}: {before['path']}")
                if progress is not None:
                    progress.done("verified before")
                if args.json:
                    print(json.dumps(outcome(before, before["path"], settings, skipped=True)))
                return 0
        name = settings.profile or settings.model
        try:
            report = verify(settings, say, step, api_key=key)
        except CouldNotRun as error:
            # A service of this recipe that cannot be verified is not a verified one: that is evidence too.
            if error.report is not None and settings.service_file is not None:
                path = keep_report(parent, name, error.report)
                if args.json:
                    print(json.dumps(outcome(error.report, str(path), settings, skipped=False), ensure_ascii=False))
            raise
        path = keep_report(parent, name, report)
    except (KeyboardInterrupt, CouldNotRun) as stopped:
        line.clear()
        reason = stopped
        if not isinstance(reason, CouldNotRun):
            reason = CouldNotRun("interrupted: nothing was proved, and nothing is kept")
        if progress is not None:
            progress.failed(str(reason))
        raise reason from None
    line.clear()
    for failure in report["failures"]:
        print(f"FAILED {failure}", file=sys.stderr)
    for note in report["notes"]:
        say(f"note: {note}")
    if report["not_compared"]:
        say(f"not compared with published figures: {report['not_compared']}")
    took = time.strftime("%H:%M:%S", time.gmtime(report["seconds"]))
    say(f"{headline(report['verdict'], report['comparison'])} after {took}: {path}")
    failed = report["verdict"] == "failed"
    if progress is not None:
        if failed:
            progress.failed("; ".join(report["failures"]))
        else:
            progress.done(report["verdict"])
    if args.json:
        print(json.dumps(outcome(report, str(path), settings, skipped=False), ensure_ascii=False))
    return 1 if failed else 0
