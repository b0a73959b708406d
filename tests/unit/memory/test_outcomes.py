"""What is known to have happened on Sparks must come out for every MemTotal they are seen with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from reap.memory import FitRequest, HostMemory, advised_fit, memory_fit, request_from_profile
from reap.memory import terms as terms_module
from reap.memory.terms import GRAPHS, HOST, PROCESSES, READY, prefill
from reap.memory.types import TERM_NAMES
from reap.sizes import GIB, human_bytes, to_bytes

PROFILES = yaml.safe_load((Path(__file__).parents[3] / "group_vars/all/profiles.yml").read_text())["reap_profiles"]
MEM_TOTALS = [round(119.7 + step / 10, 1) for step in range(21)]


def from_profile(name, **changes):
    return request_from_profile(name, PROFILES[name], **changes)


CASES = {
    "K160 + MTP2, 6G, B 4096, floor 6 GiB: served": (from_profile("k160-mtp2-200k"), {"fits", "tight"}),
    "K160, 8G, B 4096, floor 6 GiB: served": (from_profile("k160-nospec-200k"), {"fits", "tight"}),
    "K144, 14G, B 8192, floor 8 GiB: served, killed near the floor at teardown": (
        from_profile("k144-nospec-200k"),
        {"tight"},
    ),
    "K144 + MTP2, the same settings: not long-context safe": (from_profile("k144-nospec-200k", mtp=True), {"refuse"}),
    "200B (K180), as K160: failed readiness": (
        from_profile("k160-nospec-200k", routed_experts=180, expected_routed_experts=180),
        {"refuse"},
    ),
    "200B (K180) with the least KV cache": (
        from_profile("k160-nospec-200k", routed_experts=180, expected_routed_experts=180, kv_cache_memory=2601042048),
        {"refuse"},
    ),
    "213B (K190), as K160: too large": (
        from_profile("k160-nospec-200k", routed_experts=190, expected_routed_experts=190),
        {"refuse"},
    ),
    "K144 with the KV cache that one sequence needs: predicted": (from_profile("k144-nospec-200k-headroom"), {"fits"}),
}


@pytest.mark.parametrize("mem_total", MEM_TOTALS)
@pytest.mark.parametrize("case", CASES)
def test_known_outcomes(case, mem_total):
    request, expected = CASES[case]
    fit = memory_fit(request, HostMemory(round(mem_total * GIB)))
    assert fit.verdict in expected, fit.message
    if fit.verdict == "refuse":
        assert f"short by {-fit.headroom / GIB:.2f} GiB" in fit.message
        assert fit.headroom < 0


def test_the_ledger_has_each_term_once_and_adds_up():
    fit = memory_fit(from_profile("k144-nospec-200k"), HostMemory(round(120.7 * GIB)))
    assert tuple(term.name for term in fit.ledger) == TERM_NAMES
    assert fit.headroom == fit.mem_total - fit.floor - sum(term.expected for term in fit.ledger)
    for term in fit.ledger:
        assert term.low <= term.expected <= term.high
        assert term.source
        assert (term.basis == "estimated") or term.low == term.high


def test_what_gb10_had_free_when_the_worker_began():
    """114.01 GiB on spark-2822, whose MemTotal is not known: the sum of the two estimates must be able to be each of
    5.7 to 7.7 GiB."""
    both = HOST + PROCESSES
    assert both.low <= 119.7 - 114.01
    assert both.high >= 121.7 - 114.01
    assert both.expected == pytest.approx(120.7 - 114.01, abs=0.05)


def test_what_gb10_had_available_once_steady():
    """About 9.4 GB with K160 + MTP2: between ready and after a prompt of the whole context."""
    loaded = 96.66 + 6 + GRAPHS.expected + READY.expected
    ready = (114.01 - loaded) * GIB
    after = ready - prefill(4096, True, True).expected * GIB
    assert after <= 9.4e9 <= ready


def test_a_long_prompt_keeps_what_was_measured():
    assert prefill(8192, False, False) == terms_module.Range(2.01, 5.8, 5.8)
    assert prefill(4096, True, False) == terms_module.Range(1.2, 9.8, 9.8)
    assert prefill(300, False, True).low == pytest.approx(0.07)


@pytest.mark.parametrize(("share", "holds"), [(0.02, False), (0.03, True), (0.06, True), (0.10, True), (0.11, False)])
def test_the_share_that_expandable_segments_keep(monkeypatch, share, holds):
    """The one figure that was fitted: where the known outcomes come out, and where they no longer do."""
    monkeypatch.setattr(terms_module, "EXPANDABLE_SHARE", share)
    right = [
        memory_fit(request, HostMemory(round(mem_total * GIB))).verdict in expected
        for request, expected in list(CASES.values())[:5]
        for mem_total in (MEM_TOTALS[0], MEM_TOTALS[-1])
    ]
    assert all(right) == holds


def test_the_headroom_profile_is_the_validated_one_with_the_advised_cache():
    validated, headroom = PROFILES["k144-nospec-200k"], PROFILES["k144-nospec-200k-headroom"]
    for mem_total in MEM_TOTALS:
        advice = advised_fit(from_profile("k144-nospec-200k"), HostMemory(round(mem_total * GIB)))
        assert advice.advice_data["kv_suggested"] == headroom["kv_cache_memory"]
        assert advice.advice_data["kv_is_what_makes_it_thin"]
        assert any("14.00 GiB for one sequence needing 4.05 GiB" in line for line in advice.advice)
        assert any("makes the margin thin" in line for line in advice.advice)
    differ = {key for key in validated if validated[key] != headroom[key]}
    assert differ == {"description", "validated", "kv_cache_memory", "reference"}
    assert headroom["validated"] is False
    assert headroom["reference"] is None
    assert "predicted, not validated on hardware" in headroom["description"]


def test_the_headroom_profile_admits_its_context():
    fit = memory_fit(from_profile("k144-nospec-200k-headroom"), HostMemory(round(119.7 * GIB)))
    assert fit.kv.page_true_concurrency >= 1
    assert to_bytes(PROFILES["k144-nospec-200k-headroom"]["kv_cache_memory"]) >= fit.kv.min_bytes


def test_a_cache_too_small_for_one_sequence_is_refused():
    request = from_profile("k144-nospec-200k")
    fit = memory_fit(request, HostMemory(round(120.7 * GIB)))
    least = fit.kv.min_bytes
    assert memory_fit(replace(request, kv_cache_memory=least), HostMemory(round(120.7 * GIB))).verdict == "fits"
    small = memory_fit(replace(request, kv_cache_memory=least - 1), HostMemory(round(120.7 * GIB)))
    assert small.verdict == "refuse"
    assert f"give at least {least} bytes" in small.message


def test_advice_about_the_largest_cache_is_true():
    request = from_profile("k144-nospec-200k")
    host = HostMemory(round(119.7 * GIB))
    data = advised_fit(request, host).advice_data
    most, tight = data["kv_max_fit_bytes"], data["kv_max_tight_bytes"]
    assert memory_fit(replace(request, kv_cache_memory=most), host).verdict == "fits"
    assert memory_fit(replace(request, kv_cache_memory=most + 1), host).verdict == "tight"
    assert memory_fit(replace(request, kv_cache_memory=tight), host).verdict == "tight"
    assert memory_fit(replace(request, kv_cache_memory=tight + 1), host).verdict == "refuse"


@pytest.mark.parametrize("name", [name for name in PROFILES if PROFILES[name]["hardware"] == "spark"])
def test_advice_about_the_floor_is_true(name):
    request, host = from_profile(name), HostMemory(round(120.7 * GIB))
    fit = advised_fit(request, host)
    highest = fit.advice_data["floor_max_kb"]
    assert memory_fit(replace(request, watchdog_min_available_kb=highest), host).verdict == fit.verdict
    assert memory_fit(replace(request, watchdog_min_available_kb=highest + 1), host).verdict != fit.verdict


def test_advice_about_other_profiles_steps_and_desktop():
    host = HostMemory(round(121.7 * GIB), round(107.7 * GIB))
    fit = advised_fit(from_profile("k144-nospec-200k"), host, profiles=PROFILES)
    assert fit.verdict == "refuse"
    assert fit.advice_data["profiles"]["k144-nospec-200k-headroom"] == "tight"
    assert "sim-needle-32k" not in fit.advice_data["profiles"]
    assert fit.advice_data["host_above_usual_bytes"] == round(121.7 * GIB) - round(107.7 * GIB) - round(3.7 * GIB)
    text = " ".join(fit.advice)
    assert "desktop" in text
    assert "max_num_batched_tokens 4096" in text
    assert "floor at" in text
    relieved = memory_fit(
        from_profile("k144-nospec-200k"),
        HostMemory(host.total, host.available + fit.advice_data["host_above_usual_bytes"]),
    )
    assert relieved.fits


def test_advice_about_the_allocator():
    plain = advised_fit(from_profile("k144-nospec-200k", expandable_segments=False), HostMemory(round(121.7 * GIB)))
    with_it = advised_fit(from_profile("k144-nospec-200k"), HostMemory(round(121.7 * GIB)))
    assert plain.verdict == "refuse"
    assert any("expandable_segments" in line for line in plain.advice)
    assert not any("expandable_segments" in line for line in with_it.advice)


def test_vllm_itself_would_refuse():
    host = HostMemory(round(120 * GIB), round(100 * GIB))
    fit = advised_fit(from_profile("k144-nospec-200k-headroom"), host, "start")
    assert any(
        "vLLM itself will not start: gpu_memory_utilization 0.88 asks for 105.60 GiB" in line for line in fit.advice
    )


def test_the_simulated_spark_is_judged_without_pretending():
    fit = advised_fit(from_profile("sim-needle-32k"), HostMemory(16 * GIB, 12 * GIB), profiles=PROFILES)
    assert fit.verdict == "fits"
    assert fit.kv.tokens is None
    assert "no KV accounting is known" in fit.kv.reason
    assert {term.name: term.expected for term in fit.ledger}["cuda_graphs"] == 0
    assert fit.advice_data["profiles"] == {}
    assert fit.weights_from == "given"


def test_nothing_says_how_large_the_weights_are(tmp_path):
    request = FitRequest.from_mapping(
        {
            "model_dir": str(tmp_path),
            "kv_cache_memory": "1G",
            "max_model_len": 1,
            "max_num_batched_tokens": 1,
            "watchdog_min_available_kb": 0,
        }
    )
    with pytest.raises(Exception, match="download the model first"):
        memory_fit(request, HostMemory(GIB))
    assert human_bytes(request.kv_cache_memory) == "1G"
