"""What must hold for every input, not only for the known ones."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from reap.memory import FitRequest, HostMemory, advised_fit, memory_fit
from reap.memory.config import flash
from reap.memory.kv import accounting_of
from reap.memory.types import TERM_NAMES
from reap.memory.weights import predict
from reap.sizes import GIB

# A busy machine is slow, and how fast these are is not what is tested.
unhurried = settings(deadline=None, max_examples=60)

requests = st.builds(
    FitRequest,
    kv_cache_memory=st.integers(1, 64 * GIB),
    max_model_len=st.integers(1, 1_048_576),
    max_num_batched_tokens=st.integers(1, 65_536),
    watchdog_min_available_kb=st.integers(0, 32 * 2**20),
    routed_experts=st.integers(1, 256),
    max_num_seqs=st.integers(1, 8),
    mtp=st.booleans(),
    engine=st.sampled_from(["gb10", "cpu"]),
    expandable_segments=st.booleans(),
)
hosts = st.integers(1, 130 * GIB).flatmap(
    lambda total: st.builds(HostMemory, st.just(total), st.none() | st.integers(0, total))
)
ORDER = {"refuse": 0, "tight": 1, "fits": 2}


@unhurried
@given(requests, hosts, st.integers(1, 8 * GIB))
def test_more_kv_never_raises_headroom(request, host, more):
    before, after = (
        memory_fit(r, host) for r in (request, replace(request, kv_cache_memory=request.kv_cache_memory + more))
    )
    assert after.headroom <= before.headroom
    assert after.headroom_worst <= before.headroom_worst
    assert (after.kv.tokens or 0) >= (before.kv.tokens or 0)


@unhurried
@given(st.integers(1, 400), st.integers(1, 100), st.booleans())
def test_larger_k_never_lowers_weights(k, more, mtp):
    small, large = (predict(flash(value)) for value in (k, k + more))
    assert sum(large.loaded(mtp)) > sum(small.loaded(mtp))
    assert large.loaded(mtp)[1] >= small.loaded(mtp)[1]
    assert sum(small.loaded(True)) > sum(small.loaded(False))


@unhurried
@given(st.integers(1, 1_048_576), st.integers(0, 200_000), st.integers(1, 65_536), st.booleans())
def test_more_context_never_lowers_the_least_kv(tokens, more, batched, mtp):
    accounting = accounting_of(flash(144), mtp)
    assert accounting.min_bytes(tokens + more, batched) >= accounting.min_bytes(tokens, batched)
    assert accounting.min_bytes(tokens, batched + more) >= accounting.min_bytes(tokens, batched)
    assert accounting.min_bytes(tokens, batched, 2) > accounting.min_bytes(tokens, batched)


@unhurried
@given(requests, hosts, st.integers(0, 2**20))
def test_a_higher_floor_or_a_smaller_host_never_helps(request, host, more):
    fit = memory_fit(request, host)
    higher = memory_fit(replace(request, watchdog_min_available_kb=request.watchdog_min_available_kb + more), host)
    assert ORDER[higher.verdict] <= ORDER[fit.verdict]


@unhurried
@given(requests, hosts)
def test_every_answer_is_whole(request, host):
    fit = advised_fit(request, host, profiles={})
    assert [term.name for term in fit.ledger] == list(TERM_NAMES)
    assert fit.headroom_worst <= fit.headroom <= fit.headroom_best
    assert all(0 <= term.low <= term.expected <= term.high for term in fit.ledger)
    assert fit.fits == (fit.verdict != "refuse")
    assert fit.to_dict()["headroom_bytes"] == fit.headroom
    if fit.verdict == "fits":
        assert fit.headroom_worst >= fit.margin
    if fit.verdict == "refuse":
        assert "short by" in fit.message
    suggested = fit.advice_data.get("kv_suggested_bytes")
    if suggested is not None:
        assert memory_fit(replace(request, kv_cache_memory=suggested), host).fits


@unhurried
@given(requests, st.integers(GIB, 130 * GIB), st.floats(0, 1))
def test_both_questions_agree_on_a_host_without_a_model(request, total, share):
    host = HostMemory(total, int(total * share))
    profile, start = (memory_fit(request, host, question) for question in ("profile", "start"))
    assert (profile.verdict, profile.headroom) == (start.verdict, start.headroom)


@unhurried
@given(requests, st.integers(GIB, 130 * GIB), st.floats(0, 1), st.floats(0, 1))
def test_a_loaded_model_does_not_change_the_answer(request, total, share, left):
    """What was remembered before the load decides, whatever MemAvailable says now."""
    used = int(total * share)
    before = memory_fit(request, HostMemory(total, total - used))
    after = memory_fit(request, HostMemory(total, int((total - used) * left), model_loaded=True, remembered=used))
    assert (after.verdict, after.headroom) == (before.verdict, before.headroom)
