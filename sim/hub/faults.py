"""The faults that the hub plays on request, and the limits on its rate.

A fault set is JSON: {"rules": [...], "access": {...}, "connection_bytes_per_s": n, "total_bytes_per_s": n}. README.md
in this folder describes every key.
"""

from __future__ import annotations

import fnmatch
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


class FaultError(ValueError):
    """A fault set that cannot be used; the message names the rule, what was found and what was wanted."""


@dataclass
class Rule:
    """One fault, played on requests whose URL path matches `path` (shell pattern), from the first that matches on.

    `skip` leaves that many matching requests alone first, `times` ends the rule after that many more (None: never).
    """

    path: str
    method: str | None = None
    skip: int = 0
    times: int | None = None
    status: int | None = None
    retry_after: int | None = None  # seconds
    error_code: str | None = None
    message: str = "played by a fault rule"
    cut_after: int | None = None  # bytes of the response's body, then the connection is reset
    stall_after: int | None = None  # bytes of the response's body, then nothing more comes, the connection stays open
    truncate: int | None = None  # the file ends after that many bytes, and the headers say the same
    flip_byte: int | None = None  # offset in the file of the byte whose bits are inverted
    bytes_per_s: float | None = None
    delay_s: float = 0.0  # before the response begins
    etag: str | None = None
    sha256: str | None = None
    hide: bool = False
    redirect: str | None = None  # scheme://host[:port]
    omit_headers: list[str] = field(default_factory=list)
    seen: int = 0  # matching requests so far

    @property
    def active(self) -> bool:
        """Return whether the next matching request would be affected."""
        return self.seen >= self.skip and (self.times is None or self.seen < self.skip + self.times)

    def matches(self, method: str, path: str) -> bool:
        """Return whether a request is meant by this rule, whatever its counters say."""
        return (self.method is None or self.method == method) and fnmatch.fnmatchcase(path, self.path)


@dataclass(frozen=True)
class Access:
    """Who may read a repository: "gated" shows its metadata to everyone, "private" hides that it exists.

    `token_sha256` are the hashes of the tokens that may read; other tokens are known but have no access.
    """

    kind: str
    token_sha256: frozenset[str] = frozenset()


@dataclass
class FaultSet:
    """All rules and limits in force."""

    rules: list[Rule] = field(default_factory=list)
    access: Mapping[str, Access] = field(default_factory=dict)
    connection_bytes_per_s: float | None = None
    total_bytes_per_s: float | None = None


_RULE_TYPES: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "method": (str,),
    "skip": (int,),
    "times": (int,),
    "status": (int,),
    "retry_after": (int,),
    "error_code": (str,),
    "message": (str,),
    "cut_after": (int,),
    "stall_after": (int,),
    "truncate": (int,),
    "flip_byte": (int,),
    "bytes_per_s": (int, float),
    "delay_s": (int, float),
    "etag": (str,),
    "sha256": (str,),
    "hide": (bool,),
    "redirect": (str,),
    "omit_headers": (list,),
}


def parse(content: Any) -> FaultSet:
    """Return the fault set of decoded JSON; raise FaultError when it has an unknown key or a wrong type."""
    if not isinstance(content, dict):
        raise FaultError(f"fault set: found {type(content).__name__}, wanted an object")
    unknown = set(content) - {entry.name for entry in fields(FaultSet)}
    if unknown:
        raise FaultError(f"fault set: unknown key {', '.join(sorted(unknown))}")
    rules = content.get("rules", [])
    access = content.get("access", {})
    if not isinstance(rules, list) or not isinstance(access, dict):
        raise FaultError("fault set: wanted rules as a list and access as an object")
    return FaultSet(
        rules=[_rule(number, rule) for number, rule in enumerate(rules)],
        access={str(repo): _access(repo, entry) for repo, entry in access.items()},
        connection_bytes_per_s=_rate(content, "connection_bytes_per_s"),
        total_bytes_per_s=_rate(content, "total_bytes_per_s"),
    )


def _rate(content: Mapping[str, Any], key: str) -> float | None:
    value = content.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise FaultError(f"{key}: found {value!r}, wanted bytes per second above 0")
    return float(value)


def _rule(number: int, content: Any) -> Rule:
    if not isinstance(content, dict) or "path" not in content:
        raise FaultError(f"rule {number}: wanted an object with a path")
    for key, value in content.items():
        types = _RULE_TYPES.get(key)
        if types is None:
            raise FaultError(f"rule {number}: unknown key {key}")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise FaultError(f"rule {number}: {key} is {value!r}, wanted {' or '.join(t.__name__ for t in types)}")
        if isinstance(value, int | float) and value < 0:
            raise FaultError(f"rule {number}: {key} is {value!r}, wanted 0 or more")
    _rate(content, "bytes_per_s")
    return Rule(**content)


def _access(repo: str, content: Any) -> Access:
    if not isinstance(content, dict) or content.get("kind") not in ("gated", "private"):
        raise FaultError(f"access of {repo}: wanted an object with kind gated or private")
    tokens = content.get("token_sha256", [])
    if not isinstance(tokens, list) or set(content) - {"kind", "token_sha256"}:
        raise FaultError(f"access of {repo}: wanted kind and token_sha256 (a list of 64 hexadecimal digits each)")
    return Access(content["kind"], frozenset(str(token).lower() for token in tokens))


class RateLimit:
    """A shared limit in bytes per second: whoever wants to send waits for its turn."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def reserve(self, count: int) -> float:
        """Reserve `count` bytes; return the seconds to wait after sending them."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.bytes_per_s
            return self._free_at - now


class Faults:
    """The fault set in force, from a file that is read again when it changes, or set by a control request."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._set = FaultSet()
        self._total: RateLimit | None = None
        self.source: Any = {}
        self.error: str | None = None

    def replace(self, content: Any) -> None:
        """Put a fault set in force; raise FaultError and keep the old one when it is wrong."""
        parsed = parse(content)
        with self._lock:
            self._put(content, parsed)

    def current(self) -> FaultSet:
        """Return the set in force, after a look at the file. A wrong file keeps the old set and sets `error`."""
        with self._lock:
            if self._file is not None:
                self._look(self._file)
            return self._set

    def take(self, method: str, path: str) -> list[Rule]:
        """Count a request against all rules that match it and return those that affect it."""
        found = self.current()
        with self._lock:
            affected = []
            for rule in found.rules:
                if rule.matches(method, path):
                    if rule.active:
                        affected.append(rule)
                    rule.seen += 1
            return affected

    def lies(self, path: str) -> list[Rule]:
        """Return the rules in force for a file's resolve path, without counting (for listings)."""
        return [rule for rule in self.current().rules if rule.active and rule.matches("GET", path)]

    def limits(self, rules: list[Rule]) -> list[RateLimit]:
        """Return the rate limits that hold for a response."""
        own = [rule.bytes_per_s for rule in rules if rule.bytes_per_s]
        if self._set.connection_bytes_per_s:
            own.append(self._set.connection_bytes_per_s)
        limits = [RateLimit(min(own))] if own else []
        return limits + ([self._total] if self._total else [])

    def report(self) -> dict[str, object]:
        """Return the set in force, how many requests each rule has seen, and what is wrong with the file."""
        found = self.current()
        return {"faults": self.source, "seen": [rule.seen for rule in found.rules], "error": self.error}

    def _put(self, content: Any, parsed: FaultSet) -> None:
        self.source, self._set, self.error = content, parsed, None
        self._total = RateLimit(parsed.total_bytes_per_s) if parsed.total_bytes_per_s else None

    def _look(self, file: Path) -> None:
        try:
            status = file.stat()
        except FileNotFoundError:
            if self._stamp is not None:
                self._stamp = None
                self._put({}, FaultSet())
            return
        stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            content = json.loads(file.read_text())
            self._put(content, parse(content))
        except (OSError, ValueError) as error:
            self.error = f"{file}: {error}; the faults before it stay in force"
