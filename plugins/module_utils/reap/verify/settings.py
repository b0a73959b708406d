"""What is to be verified, and where: from a JSON file or from the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .client import CouldNotRun

SUITES = ("quick", "standard", "full", "grid")
# The longest is the published prompt before the last one, tokens.
LADDER = (8000, 32000, 64000, 136534)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a file has the type that an annotation says. A whole number is a float as well."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


@dataclass
class Settings:
    """Settings of one verification; keys of /etc/reap/verify.json have the same names.

    Attributes:
        endpoint: base URL; a trailing /v1 is ignored.
        model: the served name.
        profile: name for the report; None for an endpoint that has none.
        hardware: `spark` or `sim`. Figures of any other hardware than `spark` are not compared with the reference.
        host: name for the report; empty: this machine's.
        suite: quick (a few short requests), standard (every task and one needle), full (and the ladder, repeated
            measurements), grid (and every depth at every length).
        tasks: names of the tasks to run; None: all of the suite.
        expected_tasks: names of the tasks that must pass; None: all that run. A task that is not expected runs, is
            reported and does not decide.
        max_model_len: context length the server must state; None: whatever it states.
        model_path: path the server must state as the root of the model; None: not checked.
        model_dir: folder of the checkpoint on this machine; the special tokens of its tokenizer.json must be the
            server's. None, or no such file: not checked.
        thinking: whether the chat template is asked to think; None: the server's default is not known.
        needle_tokens: length of the long needle prompt, in tokens, chat template included.
        needle_depth: where in the prompt it stands, 0 to 1.
        needle_max_tokens, answer_max_tokens, essay_max_tokens: limits of reasoning and content together, tokens. Of
            the last two never more than half of the context.
        lengths: lengths of the ladder and the grid, tokens; None: those of LADDER below `needle_tokens`, and that.
        depths: depths of the grid.
        block_size: tokens a block of the KV cache; None: what the server states.
        prefill_piece: tokens of a prompt that are read at once.
        repeats: how often the measured request is repeated.
        warmup_tokens: length of the request before the first long one; 0: none. Kernels are compiled at a first
            long prompt.
        slowest_prefill_tok_s: a slower prefill than this is not waited for.
        first_token_s, between_tokens_s, total_s: deadlines of a short request, seconds. A reply that is not streamed
            has the last one only.
        idle_wait_s: how long other clients' requests are waited for before the first task, seconds.
        cancel_wait_s: how long a cancelled request may go on, seconds.
        metrics: `required` (no metrics: could not run) or `optional` (the report says that the cache was not proved
            cold).
        sample_memory: whether MemAvailable of this machine is the server's; None: when the endpoint is on loopback.
        memory_hertz: samples a second.
        floor_kb: the watchdog's floor, kB.
        reference: published figures of the profile, or None.
        slower_below, fail_below: shares of a published rate below which a run counts as slower, or as failed.
        identity: what the recipe knows of the subject (image, patch set, model, settings); goes into the report.
        service_file: state file of the service; its generation and start time identify the subject.
        generations_file: the service's record of the generations that served; None: there is none to go back to.
        api_key_file: file that holds the API key; None, or no such file: none is sent.
        evidence_dir: the folder that gets one folder per run.
    """

    endpoint: str = "http://127.0.0.1:8000"
    model: str = ""
    profile: str | None = None
    hardware: str | None = None
    host: str = ""
    suite: str = "standard"
    tasks: list[str] | None = None
    expected_tasks: list[str] | None = None
    max_model_len: int | None = None
    model_path: str | None = None
    model_dir: str | None = None
    thinking: bool | None = None
    needle_tokens: int = 8000
    needle_depth: float = 0.5
    needle_max_tokens: int = 1536
    answer_max_tokens: int = 3072
    essay_max_tokens: int = 6144
    lengths: list[int] | None = None
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    block_size: int | None = None
    prefill_piece: int = 8192
    repeats: int = 1
    warmup_tokens: int = 0
    slowest_prefill_tok_s: float = 50.0
    first_token_s: float = 120.0
    between_tokens_s: float = 60.0
    total_s: float = 900.0
    idle_wait_s: float = 60.0
    cancel_wait_s: float = 10.0
    metrics: str = "required"
    sample_memory: bool | None = None
    memory_hertz: float = 2.0
    floor_kb: int | None = None
    reference: dict[str, Any] | None = None
    slower_below: float = 0.9
    fail_below: float = 0.5
    identity: dict[str, Any] = field(default_factory=dict)
    service_file: str | None = None
    generations_file: str | None = None
    api_key_file: str | None = None
    evidence_dir: str = "/var/lib/reap/evidence"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if not _fits(getattr(self, name), hint):
                wanted = getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
                raise CouldNotRun(f"{name} is {getattr(self, name)!r}, wanted {wanted}")
        if not self.model:
            raise CouldNotRun("no model is named: give the name under which it is served")
        if self.suite not in SUITES:
            raise CouldNotRun(f"suite is {self.suite!r}, wanted one of {', '.join(SUITES)}")
        if self.metrics not in ("required", "optional"):
            raise CouldNotRun(f"metrics is {self.metrics!r}, wanted required or optional")
        least = {"needle_tokens": 64, "repeats": 1, "warmup_tokens": 0}
        least |= dict.fromkeys(("needle_max_tokens", "answer_max_tokens", "essay_max_tokens"), 1)
        for name, low in least.items():
            value = getattr(self, name)
            if value < low:
                raise CouldNotRun(f"{name} is {value!r}, wanted a whole number of at least {low}")
        for name in ("slowest_prefill_tok_s", "first_token_s", "between_tokens_s", "total_s", "memory_hertz"):
            if getattr(self, name) <= 0:
                raise CouldNotRun(f"{name} is {getattr(self, name)!r}, wanted more than 0")
        for length in self.lengths or ():
            if length < 64:
                raise CouldNotRun(f"a length is {length!r}, wanted a whole number of at least 64 tokens")
        for depth in (self.needle_depth, *self.depths):
            if not 0 <= depth <= 1:
                raise CouldNotRun(f"a depth is {depth!r}, wanted a number from 0 to 1")
        if self.max_model_len is not None:
            self.check_context(self.max_model_len, "context")

    def check_context(self, context: int, name: str) -> None:
        """Refuse a prompt that is longer than the context.

        Args:
            context: tokens.
            name: what it is, for the error.

        Raises:
            CouldNotRun: with the longest prompt that there is room for.
        """
        longest = max(self.needle_tokens, *self.ladder())
        if longest + self.needle_max_tokens > context:
            raise CouldNotRun(
                f"needle of {longest} tokens and answer of {self.needle_max_tokens} do not fit the {name} of "
                f"{context}: ask for at most {context - self.needle_max_tokens}"
            )

    def ladder(self) -> list[int]:
        """Lengths of the long suites in the order in which they are tried, tokens."""
        if self.lengths:
            return sorted(self.lengths)
        return [*(length for length in LADDER if length < self.needle_tokens), self.needle_tokens]

    def added_tokens(self, limit: int = 24) -> dict[str, int]:
        """Text -> id of the first and last special tokens of the checkpoint's own tokenizer; empty where unknown."""
        if self.model_dir is None:
            return {}
        try:
            data = json.loads((Path(self.model_dir) / "tokenizer.json").read_text(encoding="utf-8"))
            tokens = [(str(item["content"]), int(item["id"])) for item in data["added_tokens"]]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        half = limit // 2
        return dict(tokens if len(tokens) <= limit else tokens[:half] + tokens[-half:])

    @property
    def simulated(self) -> bool:
        """Whether figures say nothing about a Spark. True for anything that does not say it is one."""
        return self.hardware != "spark"

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str) -> Settings:
        """Settings from a parsed file.

        Raises:
            CouldNotRun: an unknown key or a value of the wrong type.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise CouldNotRun(
                f"{where} has {', '.join(unknown)}, which is no setting; known: {', '.join(sorted(known))}"
            )
        return cls(**data)

    @classmethod
    def from_file(cls, path: Path, **changes: Any) -> Settings:
        """Settings from a JSON file, with single ones replaced."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CouldNotRun(f"{path} cannot be read ({error.strerror}): run playbooks/provision.yml first") from error
        except ValueError as error:
            raise CouldNotRun(f"{path} is no JSON ({error}): run playbooks/provision.yml again") from error
        if not isinstance(data, dict):
            raise CouldNotRun(f"{path} holds no JSON object: run playbooks/provision.yml again")
        return cls.from_mapping({**data, **changes}, str(path))

    def api_key(self) -> str | None:
        """The API key, or None.

        Raises:
            CouldNotRun: the file is there and cannot be read.
        """
        if not self.api_key_file:
            return None
        try:
            return Path(self.api_key_file).read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CouldNotRun(f"API key file {self.api_key_file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            # Not the error itself: it holds a part of the key.
            raise CouldNotRun(f"API key file {self.api_key_file} is no text: write the key alone into it") from error
