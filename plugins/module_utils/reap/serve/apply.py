"""What a provision, and a person, do to reap.service: bring up what the configuration asks for, or go back.

Run on the host. It looks at what is, not at what a playbook just changed: a run that was cut off between writing a
file and restarting is finished by the next one, and nothing that already serves is restarted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..watch.lift import lift
from .config import ServiceConfig
from .docker import Docker, DockerDown
from .failure import Failure
from .generations import Generations
from .host import key_mtime_ns, port_taken, require_parts
from .state import alive, read_json, write_text
from .supervisor import UNIT
from .watchdog import UNIT as WATCHDOG_UNIT
from .watchdog import differs, give_back, missing

_JOURNAL_LINES = 25
# It says READY=1 a moment before its first state is written.
_GUARD_S = 5.0


@dataclass
class Outcome:
    """What was done. ``error`` is None when the wanted generation serves."""

    changed: bool
    generation: str
    endpoint: str
    msg: str
    error: str | None = None

    def to_mapping(self) -> dict[str, Any]:
        """As the last line of the command's output has it."""
        return {key: value for key, value in vars(self).items() if value is not None}


def apply(config_path: Path, *, check: bool = False) -> Outcome:
    """Make the unit serve what the file asks for, and wait until it has answered.

    Args:
        config_path: /etc/reap/service.json.
        check: only say what would be done.

    Returns:
        ``changed`` false when it already served. ``error`` set when the wanted generation does not serve: it then
        names why, and which previous generation serves instead.

    Raises:
        ReapError: the file or the unit is missing or wrong.
    """
    wanted = ServiceConfig.read(config_path)
    unit = _unit()
    state = read_json(Path(wanted.run_dir) / "service.json") or {}
    reasons = _reasons(wanted, unit, state)
    if not reasons:
        return Outcome(False, wanted.generation, wanted.endpoint, f"{wanted.generation} serves on {wanted.endpoint}")
    problem = _problem(wanted, state) or (None if check else _unguarded(wanted))
    if problem:
        # What serves now is left alone, and the file says it again: a boot would serve what the file says.
        generations = Generations(Path(wanted.state_dir))
        serving = generations.config(str(state.get("generation"))) if alive(state) else None
        if serving is not None and serving.generation != wanted.generation and not check:
            _write_back(config_path, serving)
            _give_back_the_watchdog(serving, generations)
        return Outcome(False, wanted.generation, wanted.endpoint, "; ".join(reasons), f"nothing was changed: {problem}")
    if check:
        return Outcome(True, wanted.generation, wanted.endpoint, "; ".join(reasons))
    if unit["NeedDaemonReload"] == "yes" or unit["LoadState"] != "loaded":
        _systemctl("daemon-reload")
        unit = _unit()
        if unit["LoadState"] != "loaded":
            raise ReapError(f"{UNIT} is {unit['LoadState']}, wanted a unit file; provision this host")
    if unit["UnitFileState"] != "enabled":
        _systemctl("enable", UNIT)
    started = time.time()
    reasons = _reasons(wanted, unit, state)
    if reasons:
        # A provision is a person's word: what failed or latched before is tried again.
        generations = Generations(Path(wanted.state_dir))
        generations.forgive(wanted.generation)
        # One that is not what served last has to prove itself, even where it once did: it may not come up any more,
        # and then the one that served last is the one to go back to.
        if _other_image(wanted, state) or generations.good[:1] != [wanted.generation]:
            generations.doubt(wanted.generation)
        watchdog = Path(wanted.run_dir) / "watchdog.json"
        # A hold without a latch stays: it waits for memory, which no word of a person brings back.
        if (read_json(watchdog) or {}).get("latched"):
            lift(watchdog)
        _systemctl("reset-failed", UNIT, may_fail=True)
        loading = unit["ActiveState"] == "activating" and alive(state) and state.get("phase") == "loading"
        attach = loading and _same(wanted, state)
        _systemctl("start" if attach else "restart", UNIT, may_fail=True)
    return _result(wanted, "; ".join(reasons) or "enabled", started)


def rollback(config_path: Path, *, forget: bool = False) -> Outcome:
    """Go back to the generation that served before the one that was asked for last.

    The file is replaced by that generation's; the next provision asks for its own again.

    Args:
        forget: the generation that is left served, but is none to go back to: it failed its verification.

    Raises:
        ReapError: no other generation ever served on this host, or the file is missing or wrong.
    """
    wanted = ServiceConfig.read(config_path)
    state = read_json(Path(wanted.run_dir) / "service.json") or {}
    # Where the wanted one failed, the previous one may be serving already: going back then only makes it official.
    leaving = wanted.generation if state.get("replaced") else state.get("generation") or wanted.generation
    generations = Generations(Path(wanted.state_dir))
    target = generations.previous(leaving)
    if target is None:
        known = ", ".join(generations.good) or "none"
        raise ReapError(f"no generation to go back to from {leaving}: those that served on this host: {known}")
    problem = _problem(target, state)
    if problem:
        text = f"nothing was changed: going back from {leaving} to {target.generation} cannot work: {problem}"
        return Outcome(False, target.generation, target.endpoint, "", text)
    _write_back(config_path, target)
    if differs(target, generations.watchdog_settings(target.generation)):
        if state.get("generation") != target.generation:
            # Under the floor of the target the one that serves now might be taken for one that eats the host's memory.
            _systemctl("stop", UNIT, may_fail=True)
        _give_back_the_watchdog(target, generations)
    outcome = apply(config_path)
    if forget and not outcome.error:
        generations.doubt(leaving)
    outcome.changed = True
    outcome.msg = f"went back from {leaving} to {target.generation}: {outcome.msg}"
    return outcome


def _write_back(config_path: Path, config: ServiceConfig) -> None:
    """Write the file in the form in which a provision does: one that asks for the same finds nothing to change."""
    write_text(config_path, json.dumps(config.to_mapping(), indent=2, sort_keys=True) + "\n", 0o644)


def _give_back_the_watchdog(config: ServiceConfig, generations: Generations) -> None:
    settings = generations.watchdog_settings(config.generation)
    if settings is not None and differs(config, settings):
        give_back(config, settings)


def _unguarded(wanted: ServiceConfig) -> str | None:
    """Why no load may begin for want of a watchdog; one that is only stopped is started."""
    if missing(wanted):
        _systemctl("start", WATCHDOG_UNIT, may_fail=True)
        end = time.monotonic() + _GUARD_S
        while missing(wanted) and time.monotonic() < end:
            time.sleep(0.1)
    return missing(wanted)


def _reasons(wanted: ServiceConfig, unit: dict[str, str], state: dict[str, Any]) -> list[str]:
    """Why something has to be done; empty when the wanted generation serves."""
    reasons = []
    if unit["LoadState"] != "loaded":
        reasons.append("the unit is new")
    elif unit["UnitFileState"] != "enabled":
        reasons.append("the unit is not enabled")
    if unit["ActiveState"] != "active" or not alive(state) or state.get("phase") != "serving":
        return [*reasons, f"the service is {unit['ActiveState']}"]
    if state.get("generation") != wanted.generation:
        reasons.append(f"{state.get('generation')} serves, wanted {wanted.generation}")
    if not _same_key(wanted, state):
        reasons.append("the API key changed")
    if _other_image(wanted, state):
        reasons.append(f"image {wanted.image} was made anew")
    fragment = Path(unit["FragmentPath"] or "/nonexistent")
    if fragment.exists() and fragment.stat().st_mtime > float(state.get("started_unix") or 0):
        reasons.append("the unit file changed")
    return reasons


def _problem(wanted: ServiceConfig, state: dict[str, Any]) -> str | None:
    """What the host lacks for the wanted generation, asked before anything is stopped."""
    try:
        require_parts(wanted, Docker())
    except (Failure, DockerDown) as failure:
        return str(failure)
    ours = alive(state) and state.get("phase") != "absent" and state.get("endpoint") == wanted.endpoint
    return None if ours else port_taken(wanted.host, wanted.port)


def _same(wanted: ServiceConfig, state: dict[str, Any]) -> bool:
    same = state.get("generation") == wanted.generation and _same_key(wanted, state)
    return same and not _other_image(wanted, state)


def _other_image(wanted: ServiceConfig, state: dict[str, Any]) -> bool:
    """Whether the image's name means another image than at the start of the same generation."""
    if state.get("generation") != wanted.generation or not state.get("image_id"):
        return False
    try:
        return bool(Docker().image_id(wanted.image) != state["image_id"])
    except DockerDown:
        return False


def _same_key(wanted: ServiceConfig, state: dict[str, Any]) -> bool:
    return bool(key_mtime_ns(wanted) == state.get("key_mtime_ns"))


def _result(wanted: ServiceConfig, msg: str, started_unix: float) -> Outcome:
    state = read_json(Path(wanted.run_dir) / "service.json") or {}
    unit = _unit()
    serving = unit["ActiveState"] == "active" and alive(state) and state.get("phase") == "serving"
    outcome = Outcome(True, wanted.generation, wanted.endpoint, msg)
    if serving and state.get("generation") == wanted.generation:
        return outcome
    detail = state.get("detail") or f"{UNIT} is {unit['ActiveState']} ({unit['Result']})"
    replaced = state.get("replaced")
    if serving and replaced:
        outcome.error = (
            f"generation {replaced['generation']} did not serve: {replaced['reason']}. "
            f"The previous one, {state['generation']}, serves again on {state['endpoint']}; "
            f"nothing answered for {state['since_unix'] - started_unix:.0f} s"
        )
    else:
        outcome.error = f"generation {wanted.generation} does not serve: {detail}"
    print(f"The last lines of {UNIT}'s journal:\n{_journal(started_unix)}", file=sys.stderr)
    return outcome


def _unit() -> dict[str, str]:
    names = "LoadState,ActiveState,UnitFileState,NeedDaemonReload,FragmentPath,Result"
    lines = _systemctl("show", UNIT, f"--property={names}").splitlines()
    return dict.fromkeys(names.split(","), "") | dict(line.split("=", 1) for line in lines if "=" in line)


def _systemctl(*arguments: str, may_fail: bool = False) -> str:
    try:
        done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ReapError("systemctl is not there: this host does not run systemd, which reap.service needs") from error
    if done.returncode and not may_fail:
        raise ReapError(f"systemctl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _journal(since_unix: float) -> str:
    # journalctl, for a person: what the failed start said.
    command = ["journalctl", f"--unit={UNIT}", f"--since=@{since_unix:.0f}", f"--lines={_JOURNAL_LINES}"]
    done = subprocess.run(
        [*command, "--output=cat", "--no-pager", "--quiet"], capture_output=True, text=True, check=False
    )
    return done.stdout.rstrip() or done.stderr.rstrip()
