"""What the watchdog decides, as a state machine without any input or output.

It is fed with (monotonic time, MemAvailable in kB or None, phase, target, memory-pressure event) and answers with
one :class:`Action` and the time until it wants to be fed again. All memory is in kB of 1024 bytes as in
/proc/meminfo, all times in seconds of the monotonic clock, all speeds in kB/s.

Three lines, from high to low:

``floor``      the model has to go when memory stays below: gracefully (SHED) after ``shed_after_s``, at once where a
               steep fall goes on and leaves less than ``urgent_s``. A dip that is over before is nothing: down to the
               last line a kill is quick enough by construction. Its value depends on the phase: ``floor_kb`` while
               serving, ``loading_floor_kb`` while loading, none while stopping, because a planned stop is never a kill.
``last line``  hard floor + what the fastest known fall takes from a reading to the end of a kill: below it a graceful
               stop is not waited for any more.
``hard floor`` holds in every phase; a kill is sent when it is crossed or when the present fall would cross it
               before a kill could take effect.

While a container could be stopped, the pace looks at the last line and not at the floor alone: after a reading above
it the next one comes before the fastest known fall could be there, or within ``calm_interval_s`` of it. With the two
readings that have to agree that is ``look_ahead_s``, and the last line is the hard floor plus that time's fall. So
where a phase has a floor at or above the last line, a kill takes effect above the hard floor whatever memory does.
Where it has none (stopping), that holds for every fall that begins above the last line; one that begins lower is seen
after three readings at ``fast_interval_s``.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field

KB_PER_GIB = 1024 * 1024


class Phase(enum.Enum):
    """What the service says it is doing (``phase`` in service.json)."""

    LOADING = "loading"
    SERVING = "serving"
    STOPPING = "stopping"
    ABSENT = "absent"


class Action(enum.Enum):
    """What is to be done now. Everything except NONE is an event with a reason."""

    NONE = "none"
    WARN = "warn"
    RECOVERED = "recovered"
    SHED = "shed"
    KILL = "kill"
    RELEASE = "release"
    BLIND = "blind"
    SEEING = "seeing"
    STALL = "stall"


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that decide; see docs/watchdog.md for the consequence of each.

    ``worst_fall_kb_s``: fastest fall seen on a DGX Spark, 34.0 to 12.7 GiB in about 1.5 s (14 GiB/s).
    ``kill_s``: time from the decision to the end of the allocation; 0.15 s is the aim the benchmark checks.
    ``urgent_s``: a fall that would reach the hard floor sooner leaves no time for a graceful stop.
    ``shed_after_s``: memory has to stay below the floor for so long before a graceful stop is asked for.
    """

    floor_kb: int
    loading_floor_kb: int
    hard_floor_kb: int
    warn_margin_kb: int = KB_PER_GIB
    warn_horizon_s: float = 600.0
    worst_fall_kb_s: int = 14 * KB_PER_GIB
    kill_s: float = 0.150
    urgent_s: float = 1.5
    shed_after_s: float = 0.75
    shed_grace_s: float = 30.0
    cooldown_s: float = 60.0
    budget: int = 5
    budget_window_s: float = 3600.0
    return_kb: int | None = None
    return_stable_s: float = 3.0
    fast_interval_s: float = 0.005
    calm_interval_s: float = 0.020
    idle_interval_s: float = 0.250

    @property
    def look_ahead_s(self) -> float:
        """Seconds from the last reading before a fall to the end of a kill: its pace, two that agree, the kill."""
        return self.kill_s + self.calm_interval_s + 2 * self.fast_interval_s

    @property
    def reserve_kb(self) -> int:
        """What the fastest known fall takes in that time, in kB."""
        return int(self.worst_fall_kb_s * self.look_ahead_s)

    @property
    def kill_line_kb(self) -> int:
        """From a reading above this, a kill can still take effect above the hard floor whatever follows, in kB."""
        return self.hard_floor_kb + self.reserve_kb

    @property
    def last_line_kb(self) -> int:
        """Below this a graceful stop is not waited for, in kB; never above the floor."""
        return min(self.floor_kb, self.kill_line_kb)


@dataclass(slots=True)
class Carried:
    """What outlives a restart of the watchdog within one boot (monotonic times are comparable only there)."""

    kills: int = 0
    sheds: int = 0
    stops: list[float] = field(default_factory=list)
    hold_kb: int | None = None
    latched: bool = False
    baseline_kb: int | None = None
    stopped_target: str | None = None
    last_stop: float | None = None

    def stops_since(self, when: float) -> int:
        """How many stops count against the budget whose window began at ``when``."""
        return sum(stop > when for stop in self.stops)


# Time over which the fall is measured. Two spans one after the other, each a pace long, have to agree on a fall that
# goes on now: one large allocation is in one of them only. URGENT: a fall has to have lasted before it is a reason to
# kill above the last line, so the dip of a prefill is none; RECENT: and to go on, at half its speed at least, because
# memory is taken in pieces. STEADY is what is told, and what sets the pace.
SHORTEST_SPAN_S = 0.004
RECENT_WINDOW_S = 0.1
URGENT_WINDOW_S = 0.5
STEADY_WINDOW_S = 1.0
# A hole in the readings longer than this says nothing about the fall during it (a paused machine, a stopped process).
GAP_S = 2.0
# Two readings below the line: one alone may be a transient of the kernel's own accounting.
CONFIRM_READINGS = 2
BLIND_AFTER_S = 1.0
WARN_AGAIN_S = 60.0
PRESSURE_S = 2.0
CALM_FALL_KB_S = 64 * 1024
# Part of the time in which the fastest known fall would reach the line: a fall is seen before it is there.
LOOK_BEFORE = 0.75
# The slow trend: one reading every TREND_STEP_S, TREND_POINTS of them (10 minutes).
TREND_STEP_S = 5.0
TREND_POINTS = 120
TREND_LEAST_S = 120.0
# Part of what the model took that must be back before a restart, where no return_kb is set.
RETURN_PART = 0.8
_RING = 512


class Policy:
    """The state machine. ``step`` is called once for each reading; the attributes below describe its last answer.

    Attributes:
        interval_s: time until the next reading is wanted, s.
        reason: one line that says why, set with every action except NONE.
        fall_kb_s: fall over the last second, kB/s, 0 when memory does not fall.
        fast_fall_kb_s: fall on which the last two spans agree (the smaller of both), kB/s.
        near: the reading is within the warning margin of the floor.
        carried: counters, hold and budget, to be saved and handed to the next instance.
    """

    __slots__ = (
        "_below",
        "_below_since",
        "_blind_said",
        "_blind_since",
        "_count",
        "_deadline",
        "_good_since",
        "_head",
        "_kb",
        "_kill_line_kb",
        "_last",
        "_last_trend",
        "_last_warn",
        "_look_ahead_s",
        "_phase",
        "_pressure_until",
        "_recent_tail",
        "_shed_target",
        "_steady_tail",
        "_t",
        "_target",
        "_trend_kb",
        "_trend_n",
        "_trend_t",
        "_urgent_tail",
        "_warned",
        "blind_s",
        "carried",
        "fall_kb_s",
        "fast_fall_kb_s",
        "interval_s",
        "limits",
        "near",
        "reason",
        "recent_fall_kb_s",
        "urgent_fall_kb_s",
    )

    def __init__(self, limits: Limits, carried: Carried | None = None) -> None:
        self.limits = limits
        self.carried = carried if carried is not None else Carried()
        self.interval_s = limits.fast_interval_s
        self.reason = ""
        self.near = False
        self.fall_kb_s = 0
        self.fast_fall_kb_s = 0
        self.urgent_fall_kb_s = self.recent_fall_kb_s = 0
        self._kill_line_kb = limits.kill_line_kb
        self._look_ahead_s = limits.look_ahead_s
        self.blind_s = 0.0
        self._t = array("d", bytes(8 * _RING))
        self._kb = array("q", bytes(8 * _RING))
        self._trend_t = array("d", bytes(8 * TREND_POINTS))
        self._trend_kb = array("q", bytes(8 * TREND_POINTS))
        self._trend_n = 0
        self._last_trend = float("-inf")
        self._head = -1
        self._count = 0
        self._recent_tail = self._urgent_tail = self._steady_tail = 0
        self._last: float | None = None
        self._below = 0
        self._below_since: float | None = None
        self._blind_since: float | None = None
        self._blind_said = False
        self._deadline: float | None = None
        self._shed_target: str | None = None
        self._good_since: float | None = None
        self._last_warn = float("-inf")
        self._warned = False
        self._pressure_until = float("-inf")
        self._phase = Phase.ABSENT
        self._target: str | None = None

    # -- one reading ---------------------------------------------------------------------------------------------

    def step(
        self, now: float, available_kb: int | None, phase: Phase, target: str | None = None, psi: bool = False
    ) -> Action:
        """Take one reading and answer.

        Args:
            now: monotonic time, s. A step backwards or a long hole restarts the measurement of the fall.
            available_kb: MemAvailable, kB; None when it could not be read.
            phase: what the service says it is doing.
            target: identity of the container that could be stopped; None when there is none.
            psi: the kernel reported memory pressure since the last call.
        """
        limits = self.limits
        if psi:
            self._pressure_until = now + PRESSURE_S
        stalled = self._take_time(now)
        if target != self._target or phase is not self._phase:
            self._take_phase(phase, target)
        if available_kb is None:
            return self._step_blind(now)
        if self._blind_since is not None:
            self._restart_fall()
            self._blind_since, self.blind_s = None, 0.0
        self._measure(now, available_kb)
        if target is None or phase is Phase.ABSENT:
            self._take_baseline(available_kb)
        line_kb = self._floor_of(phase) if target is not None else None
        if line_kb is None:
            line_kb = limits.floor_kb
        self.near = available_kb < line_kb + limits.warn_margin_kb
        action = self._guard(now, available_kb, phase, target)
        self.interval_s = self._next_interval(now, available_kb, phase, target)
        if action is not Action.NONE:
            return action
        if stalled > 0.0:
            self.reason = f"no reading for {stalled:.1f} s (paused or stopped); the fall is measured anew"
            return Action.STALL
        if self._blind_said:
            # Said even where something else had to be said first.
            self._blind_said = False
            self.reason = f"MemAvailable can be read again: {_size(available_kb)}"
            return Action.SEEING
        action = self._follow_return(now, available_kb)
        if action is not Action.NONE:
            return action
        return self._watch_trend(now, available_kb, phase, target)

    def no_graceful_stop(self, now: float, available_kb: int) -> Action:
        """After SHED, when there is nobody to ask for a graceful stop: the same target is killed instead."""
        if self._shed_target is None:
            return Action.NONE
        floor_kb = self._floor_of(self._phase) or self.limits.floor_kb
        why = f"is below the floor of {_size(floor_kb)}, and no supervisor can be asked for a graceful stop"
        return self._kill(now, available_kb, self._shed_target, why)

    def lift(self) -> None:
        """Forget hold, latch and spent budget: a person, or a new provision, says that a start is wanted."""
        self.carried.hold_kb = None
        self.carried.latched = False
        self.carried.stops.clear()

    # -- time, phase, fall ---------------------------------------------------------------------------------------

    def _take_time(self, now: float) -> float:
        """Return the length of the hole before this reading, s, or 0; moves the deadlines by it."""
        last, self._last = self._last, now
        if last is None:
            return 0.0
        hole = now - last
        if 0.0 <= hole <= GAP_S:
            return 0.0
        self._restart_fall()
        self._trend_n = 0
        self._last_trend = float("-inf")
        if self._deadline is not None:
            self._deadline += hole
        self._last_warn = min(self._last_warn, now)
        self._good_since = None
        if hole < 0.0:
            self._pressure_until = min(self._pressure_until, now + PRESSURE_S)
        return abs(hole)

    def _take_phase(self, phase: Phase, target: str | None) -> None:
        if target != self._shed_target:
            self._deadline, self._shed_target = None, None
        if target != self._target:
            self._below = 0
        self._below_since = None
        self._trend_n = 0
        self._last_trend = float("-inf")
        self._warned = False
        self._phase, self._target = phase, target

    def _restart_fall(self) -> None:
        self._head, self._count = -1, 0
        self._recent_tail = self._urgent_tail = self._steady_tail = 0
        self._below = 0
        self._below_since = None
        self.fall_kb_s = self.fast_fall_kb_s = self.urgent_fall_kb_s = self.recent_fall_kb_s = 0

    def _measure(self, now: float, available_kb: int) -> None:
        head = (self._head + 1) % _RING
        self._t[head], self._kb[head], self._head = now, available_kb, head
        if self._count == 0:
            self._recent_tail = self._urgent_tail = self._steady_tail = head
        self._count += 1
        if self._count > 1:
            # A full ring overwrites its oldest reading: a tail that stood there moves on.
            if head == self._steady_tail:
                self._steady_tail = (head + 1) % _RING
            if head == self._urgent_tail:
                self._urgent_tail = (head + 1) % _RING
            if head == self._recent_tail:
                self._recent_tail = (head + 1) % _RING
        self._recent_tail = self._advance(self._recent_tail, now - RECENT_WINDOW_S)
        self._urgent_tail = self._advance(self._urgent_tail, now - URGENT_WINDOW_S)
        self._steady_tail = self._advance(self._steady_tail, now - STEADY_WINDOW_S)
        self.recent_fall_kb_s = self._fall_between(self._recent_tail, head)
        # Readings far apart: what was lost since the one before the window may all have been lost within it.
        self.urgent_fall_kb_s = self._fall_between(self._urgent_tail, head, URGENT_WINDOW_S)
        self.fall_kb_s = self._fall_between(self._steady_tail, head)
        middle = self._before(head)
        first = self._before(middle)
        self.fast_fall_kb_s = min(self._fall_between(first, middle), self._fall_between(middle, head))

    def _advance(self, tail: int, until: float) -> int:
        times, head = self._t, self._head
        following = (tail + 1) % _RING
        while tail != head and times[following] <= until:
            tail, following = following, (following + 1) % _RING
        return tail

    def _before(self, index: int) -> int:
        """The newest reading at least SHORTEST_SPAN_S before another, or the oldest there is."""
        until, oldest = self._t[index] - SHORTEST_SPAN_S, self._steady_tail
        while index != oldest and self._t[index] > until:
            index = (index - 1) % _RING
        return index

    def _fall_between(self, first: int, last: int, most_s: float = STEADY_WINDOW_S) -> int:
        span = self._t[last] - self._t[first]
        if span < SHORTEST_SPAN_S:
            return 0
        fall = (self._kb[first] - self._kb[last]) / min(span, most_s)
        return max(0, min(int(fall), self.limits.worst_fall_kb_s))

    # -- decisions -----------------------------------------------------------------------------------------------

    def _step_blind(self, now: float) -> Action:
        if self._blind_since is None:
            self._blind_since = now
        self.blind_s = max(0.0, now - self._blind_since)
        self.interval_s = self.limits.calm_interval_s
        if self.blind_s >= BLIND_AFTER_S and not self._blind_said:
            self._blind_said = True
            self.reason = f"MemAvailable could not be read for {self.blind_s:.1f} s; nothing is stopped on that ground"
            return Action.BLIND
        return Action.NONE

    def _floor_of(self, phase: Phase) -> int | None:
        if phase is Phase.SERVING:
            return self.limits.floor_kb
        if phase is Phase.LOADING:
            return self.limits.loading_floor_kb
        return None

    def _guard(self, now: float, available_kb: int, phase: Phase, target: str | None) -> Action:
        limits = self.limits
        if target is None or target == self.carried.stopped_target:
            self._below, self._below_since = 0, None
            return Action.NONE
        if available_kb < limits.hard_floor_kb:
            self._below += 1
            if self._below < CONFIRM_READINGS:
                return Action.NONE
            why = f"is below the hard floor of {_size(limits.hard_floor_kb)} ({phase.value})"
            return self._kill(now, available_kb, target, why)
        fast = self.fast_fall_kb_s
        if available_kb - int(fast * self._look_ahead_s) < limits.hard_floor_kb:
            why = (
                f"falls {_size(fast)}/s ({phase.value}) and would cross the hard floor of"
                f" {_size(limits.hard_floor_kb)} before a kill of {limits.kill_s * 1000:.0f} ms took effect"
            )
            return self._kill(now, available_kb, target, why)
        shed_runs = self._deadline is not None and self._shed_target == target
        floor_kb = limits.floor_kb if shed_runs else self._floor_of(phase)
        if floor_kb is None or available_kb >= floor_kb:
            self._below, self._below_since = 0, None
            return Action.NONE
        if self._below_since is None:
            self._below_since = now
        return self._below_floor(now, available_kb, phase, target, floor_kb, shed_runs)

    def _below_floor(
        self, now: float, available_kb: int, phase: Phase, target: str, floor_kb: int, shed_runs: bool
    ) -> Action:
        limits, carried = self.limits, self.carried
        # A machine whose floor is lower than that has no last line: a graceful stop would never be tried there.
        below_last_line = available_kb < self._kill_line_kb <= floor_kb
        self._below = self._below + 1 if below_last_line else 0
        if carried.last_stop is not None and 0.0 <= now - carried.last_stop < limits.cooldown_s and not shed_runs:
            # The memory of the one that was stopped may still be coming back; the hard floor above still holds.
            return Action.NONE
        if below_last_line:
            if self._below < CONFIRM_READINGS:
                return Action.NONE
            why = f"is below the last line of {_size(self._kill_line_kb)}, from where only a kill is quick enough"
            return self._kill(now, available_kb, target, f"{why} ({phase.value}, floor {_size(floor_kb)})")
        below = f"is below the floor of {_size(floor_kb)} ({phase.value})"
        if shed_runs and self._deadline is not None and now >= self._deadline:
            why = f"{below}: the graceful stop asked for {limits.shed_grace_s:.0f} s ago did not bring memory back"
            return self._kill(now, available_kb, target, why)
        if self._below_since is None or now <= self._below_since:
            return Action.NONE
        # It has lasted, and it goes on now.
        fall = self.urgent_fall_kb_s
        goes_on = 2 * self.recent_fall_kb_s >= fall
        if goes_on and (available_kb - limits.hard_floor_kb) <= fall * limits.urgent_s:
            left_s = (available_kb - limits.hard_floor_kb) / fall
            why = (
                f"{below}, falls {_size(fall)}/s: {left_s:.1f} s to the hard floor of {_size(limits.hard_floor_kb)},"
                f" too short for a graceful stop"
            )
            return self._kill(now, available_kb, target, why)
        if shed_runs or now - self._below_since < limits.shed_after_s:
            return Action.NONE
        self._deadline, self._shed_target = now + limits.shed_grace_s, target
        carried.sheds += 1
        left_s = (available_kb - limits.hard_floor_kb) / self.fall_kb_s if self.fall_kb_s > 0 else float("inf")
        left = "does not fall" if left_s > limits.warn_horizon_s else f"{left_s:.0f} s left to the hard floor"
        lasted = f"for {now - self._below_since:.1f} s"
        self.reason = f"graceful stop: MemAvailable {_size(available_kb)} {below} {lasted}; {left}"
        self._note_stop(now, available_kb, None)
        return Action.SHED

    def _kill(self, now: float, available_kb: int, target: str, why: str) -> Action:
        self.carried.kills += 1
        if self._shed_target == target and self.carried.stops:
            # The graceful stop that did not suffice and this kill are one stop in the budget.
            self.carried.stops.pop()
        self._deadline, self._shed_target = None, None
        self.reason = f"kill: MemAvailable {_size(available_kb)} {why}"
        self._note_stop(now, available_kb, target)
        self._below = 0
        return Action.KILL

    def _note_stop(self, now: float, available_kb: int, killed: str | None) -> None:
        limits, carried = self.limits, self.carried
        if killed is not None:
            carried.stopped_target = killed
            carried.last_stop = now
        carried.stops = [t for t in carried.stops if 0.0 <= now - t < limits.budget_window_s]
        carried.stops.append(now)
        if limits.return_kb is not None:
            carried.hold_kb = limits.return_kb
        else:
            base = carried.baseline_kb if carried.baseline_kb is not None else limits.floor_kb + limits.warn_margin_kb
            carried.hold_kb = available_kb + int(RETURN_PART * max(0, base - available_kb))
        if len(carried.stops) > limits.budget:
            carried.latched = True
            self.reason += (
                f"; {len(carried.stops)} stops within {limits.budget_window_s / 60:.0f} min are more than the budget of"
                f" {limits.budget}: no start until a person lifts it (reap watch --lift)"
            )
        self._good_since = None

    # -- afterwards and beforehand -------------------------------------------------------------------------------

    def _take_baseline(self, available_kb: int) -> None:
        carried = self.carried
        if carried.hold_kb is None:
            # The state right before a load is what has to come back, so the newest reading replaces the older.
            carried.baseline_kb = available_kb

    def _follow_return(self, now: float, available_kb: int) -> Action:
        carried = self.carried
        if carried.hold_kb is None or carried.latched:
            return Action.NONE
        if available_kb < carried.hold_kb:
            self._good_since = None
            return Action.NONE
        if self._good_since is None:
            self._good_since = now
        if now - self._good_since < self.limits.return_stable_s:
            return Action.NONE
        self.reason = f"memory is back: {_size(available_kb)}, wanted {_size(carried.hold_kb)}; a start is allowed"
        carried.hold_kb = None
        self._good_since = None
        return Action.RELEASE

    def _watch_trend(self, now: float, available_kb: int, phase: Phase, target: str | None) -> Action:
        limits = self.limits
        if now - self._last_trend >= TREND_STEP_S:
            self._last_trend = now
            self._add_trend(now, available_kb)
        floor_kb = self._floor_of(phase) if target is not None else None
        if floor_kb is None or target == self.carried.stopped_target or self._deadline is not None:
            return Action.NONE
        if available_kb < floor_kb:
            return Action.NONE
        if available_kb < floor_kb + limits.warn_margin_kb:
            if not self._warned and now - self._last_warn >= WARN_AGAIN_S:
                self._warned, self._last_warn = True, now
                self.reason = (
                    f"MemAvailable {_size(available_kb)} is within {_size(limits.warn_margin_kb)} of the floor of"
                    f" {_size(floor_kb)} ({phase.value})"
                )
                return Action.WARN
            return Action.NONE
        if self._warned and available_kb >= floor_kb + 2 * limits.warn_margin_kb:
            self._warned = False
            self.reason = f"MemAvailable is {_size(available_kb)} again, floor {_size(floor_kb)} ({phase.value})"
            return Action.RECOVERED
        if now == self._last_trend and phase is Phase.SERVING and now - self._last_warn >= limits.warn_horizon_s:
            fall = self._trend_fall()
            if fall > 0.0 and (available_kb - floor_kb) / fall < limits.warn_horizon_s:
                self._last_warn = now
                self.reason = (
                    f"at the trend of the last minutes ({_size(int(fall * 60))}/min) the floor of {_size(floor_kb)}"
                    f" is reached in {(available_kb - floor_kb) / fall / 60:.0f} min; now {_size(available_kb)}"
                )
                return Action.WARN
        return Action.NONE

    def _add_trend(self, now: float, available_kb: int) -> None:
        if self._trend_n == TREND_POINTS:
            self._trend_t[:-1] = self._trend_t[1:]
            self._trend_kb[:-1] = self._trend_kb[1:]
            self._trend_n -= 1
        self._trend_t[self._trend_n] = now
        self._trend_kb[self._trend_n] = available_kb
        self._trend_n += 1

    def _trend_fall(self) -> float:
        """Least-squares fall over the trend readings, kB/s; 0 when they are too few or memory rises."""
        n = self._trend_n
        if n < 3 or self._trend_t[n - 1] - self._trend_t[0] < TREND_LEAST_S:
            return 0.0
        t0, kb0 = self._trend_t[0], self._trend_kb[0]
        st = sk = stt = stk = 0.0
        for i in range(n):
            t, kb = self._trend_t[i] - t0, float(self._trend_kb[i] - kb0)
            st += t
            sk += kb
            stt += t * t
            stk += t * kb
        spread = n * stt - st * st
        return max(0.0, -(n * stk - st * sk) / spread) if spread > 0.0 else 0.0

    def _next_interval(self, now: float, available_kb: int, phase: Phase, target: str | None) -> float:
        """A part of the time the fastest known fall needs to the next line below, within the three set intervals.

        At rest that line is the last line. The floor above it counts once memory falls: nothing has to be decided there
        within milliseconds, and a model that sits a little above its floor would cost a reading every 20 ms for ever.
        """
        limits = self.limits
        if target is None or target == self.carried.stopped_target:
            return limits.idle_interval_s
        if self._below > 0 or self._below_since is not None:
            return limits.fast_interval_s
        floor_kb = self._floor_of(phase)
        falls = self.fall_kb_s > CALM_FALL_KB_S
        line_kb = self._kill_line_kb
        if falls and floor_kb is not None and line_kb < floor_kb <= available_kb:
            line_kb = floor_kb
        # Without a floor at or above the last line only the fall itself tells, and has to be seen from its beginning.
        at_rest = not falls and floor_kb is not None and available_kb >= self._kill_line_kb
        least = limits.calm_interval_s if at_rest else limits.fast_interval_s
        most = limits.calm_interval_s if now < self._pressure_until else limits.idle_interval_s
        return max(least, min(most, LOOK_BEFORE * (available_kb - line_kb) / limits.worst_fall_kb_s))


def _size(kb: int) -> str:
    """A number of kB for a person: GiB with two decimals, MiB below one GiB."""
    if abs(kb) >= KB_PER_GIB:
        return f"{kb / KB_PER_GIB:.2f} GiB"
    return f"{kb / 1024:.0f} MiB"
