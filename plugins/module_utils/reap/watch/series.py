"""A small language for memory series, and the replay of one through the policy without a clock.

One statement a line, ``#`` begins a comment, sizes are kB or carry K, M or G (1024-based), times are seconds or
carry ms, s, m or h. Time moves forward from line to line::

    limits floor 8G loading 6G hard 3G      # also: grace 30s, return 100G, budget 5, cooldown 60s, margin 1G
    phase serving                           # loading, serving, stopping or absent, from the time reached so far
    start 9.9G                              # MemAvailable at the time reached so far
    3s to 2.4G                              # in a straight line
    10m hold                                # stays
    2m saw 8.2G 9.5G every 4s               # falls and rises between the two
    1s unreadable                           # MemAvailable cannot be read
    clock 2h                                # the monotonic clock jumps (a paused machine); may be negative
    pressure                                # the kernel reports memory pressure now
    target new                              # another container from here on
    expect kill between 0.5s and 1s         # or: warn, shed, release, blind, ...; "expect no kill"
    expect kill above 2G                    # MemAvailable when the kill has taken effect
    expect only warn                        # no other event than these

A phase other than ``absent`` has a target, as on a host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..errors import ReapError
from .policy import Action, Limits, Phase, Policy

_SIZES = {"": 1, "K": 1, "M": 1024, "G": 1024 * 1024}
_TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_EVENTS = {action.value for action in Action if action is not Action.NONE}


@dataclass(frozen=True, slots=True)
class Piece:
    """From ``start`` on for ``length`` s: from ``kb`` to ``to_kb`` in a straight line; None is unreadable."""

    start: float
    length: float
    kb: int | None
    to_kb: int | None


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happens at a moment: a phase, a clock jump in s, pressure, a new target."""

    at: float
    phase: Phase | None = None
    clock_s: float = 0.0
    pressure: bool = False
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Expectation:
    """What has to be true of the replay; ``line`` is where it was written."""

    line: int
    text: str
    kind: str  # "event", "no", "only", "above"
    events: tuple[str, ...] = ()
    start: float = 0.0
    end: float = float("inf")
    least_kb: int = 0


@dataclass(slots=True)
class Series:
    """A memory series as data."""

    limits: Limits
    pieces: list[Piece] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)

    @property
    def length(self) -> float:
        """Length of the series, s."""
        return self.pieces[-1].start + self.pieces[-1].length if self.pieces else 0.0

    def at(self, when: float) -> int | None:
        """MemAvailable in kB at ``when`` s of the series; its last value afterwards; None when unreadable."""
        for piece in self.pieces:
            if when < piece.start + piece.length:
                if piece.kb is None or piece.to_kb is None:
                    return None
                part = max(0.0, when - piece.start) / piece.length
                return round(piece.kb + (piece.to_kb - piece.kb) * part)
        return self.pieces[-1].to_kb if self.pieces else None


@dataclass(frozen=True, slots=True)
class Event:
    """One decision of a replay; ``at`` in s of the series, ``effect_kb`` MemAvailable when a kill has taken effect."""

    at: float
    action: Action
    reason: str
    available_kb: int | None
    effect_kb: int | None = None


def parse_kb(text: str) -> int:
    """``8G`` -> 8388608 (kB of 1024 bytes; K, M, G are 1024-based). Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text)
    if not found:
        raise ValueError(f"{text!r} is no size (wanted: kB, or a number with K, M or G)")
    return round(float(found[1]) * _SIZES[found[2]])


def parse_seconds(text: str) -> float:
    """``150ms`` -> 0.15. Raises ValueError."""
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)(ms|s|m|h|)", text)
    if not found:
        raise ValueError(f"{text!r} is no time (wanted: seconds, or a number with ms, s, m or h)")
    return float(found[1]) * _TIMES[found[2]]


def parse(text: str, name: str = "series") -> Series:
    """Read a series. Raises ReapError naming the file, the line and what was wanted."""
    reader = _Reader()
    for number, raw in enumerate(text.splitlines(), 1):
        words = raw.split("#", 1)[0].split()
        if not words:
            continue
        try:
            reader.take(number, words)
        except (ValueError, IndexError, KeyError) as error:
            raise ReapError(f"{name}:{number}: cannot read {raw.strip()!r}: {error or 'incomplete'}") from error
    if reader.limits is None or not reader.pieces:
        raise ReapError(f"{name}: a series needs a 'limits' line, a 'start' and at least one piece of time")
    return Series(reader.limits, reader.pieces, reader.changes, reader.expectations)


class _Reader:
    def __init__(self) -> None:
        self.limits: Limits | None = None
        self.pieces: list[Piece] = []
        self.changes: list[Change] = []
        self.expectations: list[Expectation] = []
        self.now = 0.0
        self.kb: int | None = None
        self.targets = 1

    def take(self, number: int, words: list[str]) -> None:
        head = words[0]
        if head == "limits":
            self.limits = _limits(words[1:])
        elif head == "phase":
            self.changes.append(Change(self.now, phase=Phase(words[1])))
        elif head == "start":
            self.kb = parse_kb(words[1])
        elif head == "clock":
            self.changes.append(Change(self.now, clock_s=parse_seconds(words[1])))
        elif head == "pressure":
            self.changes.append(Change(self.now, pressure=True))
        elif head == "target":
            self.targets += 1
            self.changes.append(Change(self.now, target=f"container-{self.targets}"))
        elif head == "expect":
            self.expectations.append(_expectation(number, words))
        else:
            self._piece(parse_seconds(head), words[1:])

    def _piece(self, length: float, words: list[str]) -> None:
        if length <= 0.0:
            raise ValueError("a piece of time is longer than 0 s")
        if self.kb is None:
            raise ValueError("'start SIZE' comes before the first piece of time")
        what = words[0]
        if what == "to":
            self._append(length, self.kb, parse_kb(words[1]))
        elif what == "hold":
            self._append(length, self.kb, self.kb)
        elif what == "unreadable":
            self.pieces.append(Piece(self.now, length, None, None))
            self.now += length
        elif what == "saw":
            low, high, every = parse_kb(words[1]), parse_kb(words[2]), parse_seconds(words[4])
            end = self.now + length
            while self.now < end - 1e-9:
                self._append(every / 2, self.kb, low)
                self._append(every / 2, low, high)
        else:
            raise ValueError("wanted: TIME to SIZE, TIME hold, TIME saw LOW HIGH every TIME, TIME unreadable")

    def _append(self, length: float, kb: int, to_kb: int) -> None:
        self.pieces.append(Piece(self.now, length, kb, to_kb))
        self.now += length
        self.kb = to_kb


def _limits(words: list[str]) -> Limits:
    given = dict(zip(words[::2], words[1::2], strict=True))
    floor = parse_kb(given.pop("floor"))
    sizes = {"hard": "hard_floor_kb", "loading": "loading_floor_kb", "return": "return_kb", "margin": "warn_margin_kb"}
    times = {"grace": "shed_grace_s", "cooldown": "cooldown_s", "kill": "kill_s"}
    values: dict[str, int | float] = {"floor_kb": floor, "loading_floor_kb": floor}
    for word, value in given.items():
        if word in sizes:
            values[sizes[word]] = parse_kb(value)
        elif word in times:
            values[times[word]] = parse_seconds(value)
        elif word == "budget":
            values["budget"] = int(value)
        else:
            raise ValueError(f"unknown limit {word!r}")
    return Limits(**values)  # type: ignore[arg-type]


def _expectation(number: int, words: list[str]) -> Expectation:
    text = " ".join(words)
    rest = words[1:]
    kind = "event"
    if rest[0] in ("no", "only"):
        kind, rest = rest[0], rest[1:]
    if rest[1:2] == ["above"]:
        return Expectation(number, text, "above", (rest[0],), least_kb=parse_kb(rest[2]))
    start, end = 0.0, float("inf")
    if "between" in rest:
        at = rest.index("between")
        start, end = parse_seconds(rest[at + 1]), parse_seconds(rest[at + 3])
        rest = rest[:at]
    unknown = [event for event in rest if event not in _EVENTS]
    if unknown:
        raise ValueError(f"no event is called {unknown[0]!r} (there are: {', '.join(sorted(_EVENTS))})")
    return Expectation(number, text, kind, tuple(rest), start, end)


def replay(series: Series, policy: Policy | None = None, reading_s: float = 0.0005) -> list[Event]:
    """Run a series through the policy at the pace the policy asks for.

    A kill lets the series go on for ``kill_s`` (the process still allocates), then the target is gone and memory
    keeps the value the series gives it. ``reading_s`` is the time one reading itself takes.
    """
    policy = policy if policy is not None else Policy(series.limits)
    changes = sorted(series.changes, key=lambda change: change.at)
    events: list[Event] = []
    phase, target, offset = Phase.SERVING, "container-1", 1000.0
    when, gone_at = 0.0, float("inf")
    while when <= series.length:
        pressure = False
        while changes and changes[0].at <= when:
            change = changes.pop(0)
            phase = change.phase if change.phase is not None else phase
            target = change.target if change.target is not None else target
            if change.target is not None:
                gone_at = float("inf")
            offset += change.clock_s
            pressure = pressure or change.pressure
        alive = phase is not Phase.ABSENT and when < gone_at
        kb = series.at(when)
        action = policy.step(offset + when, kb, phase if alive else Phase.ABSENT, target if alive else None, pressure)
        if action is not Action.NONE:
            effect = None
            if action is Action.KILL:
                gone_at = when + series.limits.kill_s
                effect = series.at(gone_at)
            events.append(Event(when, action, policy.reason, kb, effect))
        following = changes[0].at if changes else float("inf")
        when = min(when + policy.interval_s + reading_s, max(following, when + 1e-6))
    return events


def check(series: Series, events: list[Event]) -> list[str]:
    """The expectations that a replay did not meet, one sentence each; empty when all were met."""
    failures = []
    for want in series.expectations:
        hits = [e for e in events if e.action.value in want.events and want.start <= e.at <= want.end]
        others = [e for e in events if e.action.value not in want.events]
        found = "; ".join(f"{e.at:.3f} s {e.reason}" for e in events) or "no event at all"
        if (
            (want.kind == "event" and not hits)
            or (want.kind == "no" and hits)
            or (want.kind == "only" and others)
            or (want.kind == "above" and any(e.effect_kb is None or e.effect_kb < want.least_kb for e in hits))
            or (want.kind == "above" and not hits)
        ):
            failures.append(f"line {want.line}: {want.text}: found {found}")
    return failures
