"""Properties of the decisions over random memory series, and the rules a single series does not show."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from reap.watch.policy import KB_PER_GIB, Action, Carried, Limits, Phase, Policy
from reap.watch.series import Change, Piece, Series, replay

FLOOR, HARD = 8 * KB_PER_GIB, 3 * KB_PER_GIB
LIMITS = Limits(floor_kb=FLOOR, loading_floor_kb=6 * KB_PER_GIB, hard_floor_kb=HARD)


def series_of(points: list[tuple[float, int]], start_kb: int, changes: list[Change] | None = None) -> Series:
    """Straight lines through (seconds, kB), no line steeper than the fastest known fall."""
    made = Series(LIMITS, changes=changes or [])
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


@FEW
@given(points(0.0, 30.0), kb_between(9.0, 30.0), LOADED)
def test_whatever_memory_does_a_kill_takes_effect_above_the_hard_floor(
    path: list[tuple[float, int]], start_kb: int, phase: Phase
) -> None:
    """The reserve between the last line and the hard floor is what the fastest known fall takes during a kill."""
    series = series_of(path, start_kb, [Change(0.0, phase=phase)])
    events = replay(series)
    kills = [event for event in events if event.action is Action.KILL]
    assert len(kills) <= 1
    for kill in kills:
        assert kill.effect_kb is not None
        assert kill.effect_kb >= HARD, kill
    went_under = next((at / 100 for at in range(int(series.length * 100)) if (series.at(at / 100) or 0) < HARD), None)
    if went_under is not None:
        assert kills
        assert kills[0].at + LIMITS.kill_s <= went_under + 0.01


@FEW
@given(points(3.0, 110.0), kb_between(3.0, 110.0))
def test_a_planned_stop_above_the_hard_floor_and_its_reserve_is_never_a_kill(
    path: list[tuple[float, int]], start_kb: int
) -> None:
    low = HARD + LIMITS.reserve_kb
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
    near.step(100.0, FLOOR + 1000, Phase.SERVING, "a")
    assert near.interval_s == LIMITS.calm_interval_s
    near.step(102.0, 30 * KB_PER_GIB, Phase.SERVING, "a", psi=True)
    assert near.interval_s == LIMITS.calm_interval_s
