"""Properties of the decisions over random memory series, and the rules a single series does not show."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reap.watch.config import from_dict
from reap.watch.policy import KB_PER_GIB, Action, Carried, Limits, Phase, Policy
from reap.watch.series import Change, Piece, Series, replay

FLOOR, HARD = 8 * KB_PER_GIB, 3 * KB_PER_GIB
LIMITS = Limits(floor_kb=FLOOR, loading_floor_kb=6 * KB_PER_GIB, hard_floor_kb=HARD)
PROFILES = yaml.safe_load((Path(__file__).parents[3] / "group_vars/all/profiles.yml").read_text())["reap_profiles"]
# What the role writes for each profile: its floor, and everything else as it follows from that.
LIMITS_OF = {
    name: from_dict({"floor_kb": data["watchdog_min_available_kb"]}, name).limits for name, data in PROFILES.items()
}
WITH_A_MODEL = [Phase.LOADING, Phase.SERVING, Phase.STOPPING]


def series_of(
    points: list[tuple[float, int]], start_kb: int, changes: list[Change] | None = None, limits: Limits = LIMITS
) -> Series:
    """Straight lines through (seconds, kB), no line steeper than the fastest known fall."""
    made = Series(limits, changes=changes or [])
    now, kb = 0.0, start_kb
    for seconds, to_kb in points:
        least = abs(to_kb - kb) / LIMITS.worst_fall_kb_s
        made.pieces.append(Piece(now, max(seconds, least, 1e-3), kb, to_kb))
        now, kb = now + made.pieces[-1].length, to_kb
    return made


def kb_between(low_gib: float, high_gib: float) -> st.SearchStrategy[int]:
    return st.integers(int(low_gib * KB_PER_GIB), int(high_gib * KB_PER_GIB))


def points(low_gib: float, high_gib: float) -> st.SearchStrategy[list[tuple[float, int]]]:
    return st.lists(st.tuples(st.floats(0.001, 3.0), kb_between(low_gib, high_gib)), min_size=1, max_size=5)


FEW = settings(max_examples=40, deadline=None)


LOADED = st.sampled_from([Phase.LOADING, Phase.SERVING])


@FEW
@given(points(8.01, 110.0), kb_between(8.01, 110.0), LOADED)
def test_nothing_is_stopped_while_memory_stays_above_the_floor(
    path: list[tuple[float, int]], start_kb: int, phase: Phase
) -> None:
    events = replay(series_of(path, start_kb, [Change(0.0, phase=phase)]))
    assert not [event for event in events if event.action in (Action.KILL, Action.SHED)]


def crossing_of(series: Series, kb: int) -> float | None:
    """The first moment at which a series is below a value, s; None where it never is."""
    for piece in series.pieces:
        assert piece.kb is not None
        assert piece.to_kb is not None
        if piece.kb < kb:
            return piece.start
        if piece.to_kb < kb:
            return piece.start + piece.length * (piece.kb - kb) / (piece.kb - piece.to_kb)
    return None


def could_be_foreseen(series: Series, crossing: float, limits: Limits) -> bool:
    """Whether memory was on its way through the hard floor all the time in which a kill had to be decided."""
    begin, end = crossing - limits.look_ahead_s, crossing - limits.kill_s
    if begin < 0.0:
        return False
    for piece in series.pieces:
        if piece.start + piece.length <= begin or piece.start >= end:
            continue
        assert piece.kb is not None
        assert piece.to_kb is not None
        fall = (piece.kb - piece.to_kb) / piece.length
        from_kb = series.at(max(begin, piece.start))
        assert from_kb is not None
        if from_kb - fall * limits.look_ahead_s >= limits.hard_floor_kb:
            return False
    return True


@pytest.mark.parametrize("name", LIMITS_OF)
@pytest.mark.parametrize("phase", WITH_A_MODEL, ids=lambda phase: phase.value)
def test_a_kill_takes_effect_above_the_hard_floor_wherever_one_can(name: str, phase: Phase) -> None:
    """With a floor at or above the last line: whatever memory does. Without one: where the fall could be foreseen."""
    limits = LIMITS_OF[name]
    floors = {Phase.SERVING: limits.floor_kb, Phase.LOADING: limits.loading_floor_kb}
    always = floors.get(phase, 0) >= limits.kill_line_kb

    @FEW
    @given(points(0.0, 30.0), kb_between(9.0, 30.0))
    def holds(path: list[tuple[float, int]], start_kb: int) -> None:
        series = series_of(path, start_kb, [Change(0.0, phase=phase)], limits)
        kills = [event for event in replay(series) if event.action is Action.KILL]
        assert len(kills) <= 1
        crossing = crossing_of(series, limits.hard_floor_kb)
        if always:
            assert all((kill.effect_kb or 0) >= limits.hard_floor_kb for kill in kills), kills
        if crossing is not None and (always or could_be_foreseen(series, crossing, limits)):
            assert kills
            assert kills[0].at + limits.kill_s <= crossing + 1e-6, kills

    holds()


@pytest.mark.parametrize("name", LIMITS_OF)
@pytest.mark.parametrize("phase", WITH_A_MODEL, ids=lambda phase: phase.value)
@pytest.mark.parametrize("above_gib", [0.05, 0.4, 2.5, 14.0])
def test_the_fastest_known_fall_ends_above_the_hard_floor_whenever_it_begins(
    name: str, phase: Phase, above_gib: float
) -> None:
    """Forty moments between two readings, from a little above the line that counts and from far away."""
    limits = LIMITS_OF[name]
    floors = {Phase.SERVING: limits.floor_kb, Phase.LOADING: limits.loading_floor_kb}
    start_kb = max(floors.get(phase, 0), limits.kill_line_kb) + int(above_gib * KB_PER_GIB)
    for number in range(40):
        calm = 2.0 + number * 0.00713
        series = Series(limits, changes=[Change(0.0, phase=phase)])
        series.pieces.append(Piece(0.0, calm, start_kb, start_kb))
        series.pieces.append(Piece(calm, start_kb / limits.worst_fall_kb_s, start_kb, 0))
        (kill,) = (event for event in replay(series) if event.action is Action.KILL)
        assert (kill.effect_kb or 0) >= limits.hard_floor_kb, (calm, kill)


@FEW
@given(kb_between(8.0, 8.5), st.floats(0.0, 1.1), st.floats(0.001, 0.3), st.floats(0.001, 0.15), st.floats(0.001, 0.2))
def test_a_dip_that_is_over_soon_and_stays_above_the_last_line_stops_nothing(
    top_kb: int, depth_gib: float, down_s: float, there_s: float, up_s: float
) -> None:
    """K144 sits there: 8.3 to 8.5 GiB above a floor of 8."""
    limits = LIMITS_OF["k144-nospec-200k"]
    low_kb = top_kb - int(depth_gib * KB_PER_GIB)
    tooth = [(down_s, low_kb), (there_s, low_kb), (up_s, top_kb), (0.2, top_kb)]
    events = replay(series_of([(5.0, top_kb), *(3 * tooth), (5.0, top_kb)], top_kb, limits=limits))
    assert not [event for event in events if event.action in (Action.KILL, Action.SHED)]


@FEW
@given(points(3.0, 110.0), kb_between(3.0, 110.0))
def test_a_planned_stop_above_the_hard_floor_and_its_reserve_is_never_a_kill(
    path: list[tuple[float, int]], start_kb: int
) -> None:
    low = LIMITS.kill_line_kb
    path = [(seconds, max(kb, low)) for seconds, kb in path]
    series = series_of(path, max(start_kb, low), [Change(0.0, phase=Phase.STOPPING)])
    assert not [event for event in replay(series) if event.action in (Action.KILL, Action.SHED)]


@FEW
@given(st.lists(st.one_of(st.none(), kb_between(0.0, 110.0)), min_size=1, max_size=60), st.floats(-5.0, 5.0))
def test_any_readings_and_any_clock_are_answered(readings: list[int | None], jump: float) -> None:
    policy = Policy(LIMITS)
    now = 100.0
    for number, kb in enumerate(readings):
        now += jump if number % 7 == 6 else 0.1
        action = policy.step(now, kb, Phase.SERVING, "container")
        assert LIMITS.fast_interval_s <= policy.interval_s <= LIMITS.idle_interval_s
        assert action is Action.NONE or policy.reason
        if kb is None:
            assert action in (Action.NONE, Action.BLIND)


def feed(policy: Policy, start: float, seconds: float, kb: int, target: str = "a") -> list[Action]:
    """The same reading again and again, at the pace the policy asks for."""
    actions, now = [], start
    while now < start + seconds:
        action = policy.step(now, kb, Phase.SERVING, target)
        if action is not Action.NONE:
            actions.append(action)
        now += policy.interval_s
    return actions


def test_after_a_kill_only_the_hard_floor_stops_the_next_container_during_the_cooldown() -> None:
    carried = Carried(kills=1, last_stop=100.0, stopped_target="a")
    assert Action.SHED not in feed(Policy(LIMITS, carried), 110.0, 20.0, FLOOR - 1000, "b")
    assert feed(Policy(LIMITS, Carried(last_stop=100.0)), 110.0, 1.0, HARD - 1000, "b") == [Action.KILL]
    assert feed(Policy(LIMITS, Carried(last_stop=100.0)), 200.0, 1.0, FLOOR - 1000, "b") == [Action.SHED]


def test_a_stopped_container_is_not_killed_twice() -> None:
    policy = Policy(LIMITS)
    assert feed(policy, 100.0, 5.0, HARD - 1000) == [Action.KILL]
    assert Action.KILL not in feed(policy, 105.0, 100.0, HARD - 1000)


def test_the_hold_is_what_the_model_took_not_what_the_host_has() -> None:
    policy = Policy(LIMITS)
    policy.step(100.0, 112 * KB_PER_GIB, Phase.ABSENT)
    assert feed(policy, 101.0, 1.0, 2 * KB_PER_GIB) == [Action.KILL]
    assert policy.carried.hold_kb == 2 * KB_PER_GIB + int(0.8 * 110 * KB_PER_GIB)


def test_the_pace_follows_the_distance_and_the_fall() -> None:
    policy = Policy(LIMITS)
    policy.step(100.0, 100 * KB_PER_GIB, Phase.SERVING, "a")
    assert policy.interval_s == LIMITS.idle_interval_s
    policy.step(100.25, 9 * KB_PER_GIB, Phase.SERVING, "a")
    assert policy.interval_s < 0.06
    near = Policy(LIMITS)
    near.step(100.0, LIMITS.kill_line_kb + 1000, Phase.LOADING, "a")
    assert near.interval_s == LIMITS.fast_interval_s
    near.step(102.0, 30 * KB_PER_GIB, Phase.SERVING, "a", psi=True)
    assert near.interval_s == LIMITS.calm_interval_s


def test_a_model_that_sits_a_little_above_its_floor_does_not_cost_a_reading_every_20_ms() -> None:
    """From there the fastest known fall needs 200 ms to the last line, and only there a kill is due."""
    policy = Policy(LIMITS_OF["k144-nospec-200k"])
    policy.step(100.0, int(8.4 * KB_PER_GIB), Phase.SERVING, "a")
    assert policy.interval_s > 0.1
    policy.step(100.1, int(8.4 * KB_PER_GIB), Phase.STOPPING, "a")
    assert policy.interval_s > 0.1


def test_one_large_allocation_during_a_planned_stop_is_not_taken_for_a_fall() -> None:
    """A step is in one of the two spans only; a fall that goes on is in both."""
    step, fall = Policy(LIMITS), Policy(LIMITS)
    start = 5 * KB_PER_GIB
    for number in range(20):
        assert step.step(100 + number / 200, start, Phase.STOPPING, "a") is Action.NONE
        assert fall.step(100 + number / 200, start, Phase.STOPPING, "a") is Action.NONE
    assert step.step(100.100, start - KB_PER_GIB // 4, Phase.STOPPING, "a") is Action.NONE
    assert step.step(100.105, start - KB_PER_GIB // 4, Phase.STOPPING, "a") is Action.NONE
    fall.step(100.100, start - 70_000, Phase.STOPPING, "a")
    assert fall.step(100.105, start - 140_000, Phase.STOPPING, "a") is Action.KILL
    assert "would cross the hard floor" in fall.reason
