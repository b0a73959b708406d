"""What is read of a host, and the gate of every start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reap import cli
from reap.errors import ReapError
from reap.memory import FitRequest, HostMemory, memory_fit, start_gate
from reap.memory.host import model_loaded, parse_meminfo, recall, remember
from reap.sizes import GIB
from tests.support.sparse_checkpoint import write_sparse_checkpoint

ROOT = Path(__file__).resolve().parents[3]
K144 = {
    "profile": "k144-nospec-200k",
    "routed_experts": 144,
    "kv_cache_memory": "14G",
    "max_model_len": 200000,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 1,
    "mtp": False,
    "watchdog_min_available_kb": 8388608,
    "engine": "gb10",
}
MEMINFO = """MemTotal:       125514547 kB
MemFree:        110000000 kB
MemAvailable:   119000000 kB
Buffers:          1000000 kB
Cached:           9000000 kB
Shmem:             500000 kB
SReclaimable:      300000 kB
SwapTotal:       16777212 kB
HugePages_Total:       0
"""


def state(tmp_path, **content):
    path = tmp_path / "service.json"
    path.write_text(json.dumps(content))
    return path


def test_meminfo(tmp_path):
    (tmp_path / "meminfo").write_text(MEMINFO)
    host = HostMemory.read(tmp_path / "meminfo", tmp_path / "none.json")
    assert host.total == 125514547 * 1024
    assert host.available == 119000000 * 1024
    assert host.page_cache == (1000000 + 9000000 + 300000 - 500000) * 1024
    assert host.swap_total == 16777212 * 1024
    assert not host.model_loaded


def test_swap_is_not_counted(tmp_path):
    (tmp_path / "with").write_text(MEMINFO)
    (tmp_path / "without").write_text(MEMINFO.replace("16777212", "0"))
    fits = [
        memory_fit(FitRequest.from_mapping(K144), HostMemory.read(tmp_path / n, tmp_path / "no"))
        for n in ("with", "without")
    ]
    assert fits[0].headroom == fits[1].headroom


@pytest.mark.parametrize("line", ["MemAvailable", "MemTotal"])
def test_meminfo_without_what_is_needed(line):
    text = "\n".join(row for row in MEMINFO.splitlines() if not row.startswith(line))
    with pytest.raises(ReapError, match=f"has no {line}"):
        parse_meminfo(text)


@pytest.mark.parametrize("text", ["", "MemTotal: x kB", "MemTotal 1 kB", "\0\0", "MemTotal: -1 kB\nMemAvailable: 1 kB"])
def test_meminfo_that_is_none(text):
    with pytest.raises(ReapError):
        parse_meminfo(text)


def test_meminfo_that_cannot_be_read(tmp_path):
    with pytest.raises(ReapError, match="cannot be read"):
        HostMemory.read(tmp_path)


@pytest.mark.parametrize(("total", "available"), [(0, None), (-1, None), (10, 11), (10, -1)])
def test_figures_that_cannot_be(total, available):
    with pytest.raises(ReapError):
        HostMemory(total, available)


@pytest.mark.parametrize(
    ("content", "loaded"),
    [
        ({"phase": "serving", "pid": os.getpid()}, True),
        ({"phase": "loading", "pid": os.getpid()}, True),
        ({"phase": "absent", "pid": os.getpid()}, False),
        ({"phase": "serving", "pid": 2**22 + 5}, False),
        ({"phase": "serving", "pid": None}, False),
        ([], False),
    ],
)
def test_whether_a_model_is_loaded(tmp_path, content, loaded):
    path = tmp_path / "service.json"
    path.write_text(json.dumps(content))
    assert model_loaded(path) == loaded


def test_a_converged_host_is_not_refused(tmp_path):
    """The model is loaded, so MemAvailable is low; the answer is the one that was given before the load."""
    remembered = tmp_path / "state/host-memory.json"
    before = HostMemory(round(120 * GIB), round(117 * GIB))
    remember(remembered, before)
    (tmp_path / "meminfo").write_text(f"MemTotal: {120 * 2**20} kB\nMemAvailable: {9 * 2**20} kB\n")
    serving = state(tmp_path, phase="serving", pid=os.getpid())
    host = HostMemory.read(tmp_path / "meminfo", serving, remembered)
    now, then = (memory_fit(FitRequest.from_mapping(K144), h) for h in (host, before))
    assert now.verdict == then.verdict == "tight"
    assert now.headroom == then.headroom
    assert now.ledger[-1].basis == "measured"
    # The same without memory of a start: an estimate, and no refusal either.
    plain = memory_fit(FitRequest.from_mapping(K144), HostMemory.read(tmp_path / "meminfo", serving))
    assert plain.verdict == "tight"
    assert plain.ledger[-1].basis == "estimated"
    # A start in that state is another question.
    assert memory_fit(FitRequest.from_mapping(K144), host, "start").verdict == "refuse"


def test_a_converged_simulated_host(tmp_path):
    request = FitRequest.from_mapping(
        {**K144, "routed_experts": None, "weights_bytes": 3000000, "kv_cache_memory": "1G", "engine": "cpu"}
    )
    loaded = HostMemory(24 * GIB, 12 * GIB, model_loaded=True)
    assert memory_fit(request, loaded).ledger[-1].basis == "estimated"
    assert memory_fit(request, loaded).fits


def test_what_is_remembered_is_for_this_host_only(tmp_path):
    path = tmp_path / "host.json"
    remember(path, HostMemory(100, 90))
    assert recall(path, 100) == 10
    assert recall(path, 101) is None
    assert [p.name for p in tmp_path.iterdir()] == ["host.json"]
    for text in (
        "",
        "[]",
        '{"mem_total_bytes": 100, "host_bytes": true}',
        '{"mem_total_bytes": 100, "host_bytes": 101}',
    ):
        path.write_text(text)
        assert recall(path, 100) is None
    with pytest.raises(ReapError, match="cannot be written"):
        remember(path / "below", HostMemory(100, 90))


def test_a_start_that_may_go_ahead():
    gate = start_gate(K144, HostMemory(120 * GIB, 117 * GIB))
    assert gate.allowed
    assert gate.fit.question == "start"
    assert "tight: profile k144-nospec-200k leaves" in gate.text
    assert "KV cache" in gate.text


def test_a_start_that_memory_cannot_carry():
    gate = start_gate(K144, HostMemory(120 * GIB, 100 * GIB))
    assert not gate.allowed
    assert "short by 15.43 GiB" in gate.message
    assert "MemAvailable is 100.00 GiB" in gate.message
    assert gate.message.splitlines() == [gate.message]
    assert "weights, routed experts" in gate.text


def test_the_page_cache_is_pointed_at():
    gate = start_gate(K144, HostMemory(120 * GIB, 100 * GIB, free=40 * GIB, page_cache=60 * GIB))
    assert "60.00 GiB of MemAvailable is page cache" in gate.text
    assert "drop_caches" in gate.text


def test_a_start_that_is_not_enforced():
    gate = start_gate({**K144, "enforce": False}, HostMemory(120 * GIB, 100 * GIB))
    assert gate.allowed
    assert not gate.fit.fits
    assert "not enforced" in gate.message


def test_the_hold_after_a_kill():
    hold = 118 * 2**20
    gate = start_gate(K144, HostMemory(120 * GIB, 117 * GIB), hold_until_available_kb=hold)
    assert not gate.allowed
    assert "holds every start until 118.00 GiB" in gate.message
    assert start_gate(K144, HostMemory(120 * GIB, 118 * GIB), hold_until_available_kb=hold).allowed


def test_the_gate_remembers_the_host(tmp_path, monkeypatch):
    kept = tmp_path / "deep/host-memory.json"
    small = {
        **K144,
        "routed_experts": None,
        "weights_bytes": 1000,
        "kv_cache_memory": "1M",
        "engine": "cpu",
        "watchdog_min_available_kb": 0,
    }
    monkeypatch.setattr(HostMemory, "read", classmethod(lambda cls, **_: cls(100 * GIB, 90 * GIB)))
    assert start_gate({**small, "host_memory_file": str(kept)}).allowed
    assert recall(kept, 100 * GIB) == 10 * GIB
    # A start that is refused is no measurement of an idle host: something holds the memory.
    other = tmp_path / "other.json"
    assert not start_gate({**K144, "host_memory_file": str(other), "routed_experts": 256}).allowed
    assert not other.exists()
    # Not being able to write it is no reason not to serve.
    gate = start_gate({**small, "host_memory_file": str(kept / "below")})
    assert gate.allowed
    assert "could not write" in gate.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_cache_memory": "14X"}, "14X"),
        ({"kv_cache_memory": 0}, "kv_cache_memory is 0"),
        ({"kv_cache_memory": -1}, "negative"),
        ({"kv_cache_memory": None}, "kv_cache_memory is missing"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"max_model_len": -5}, "max_model_len is -5"),
        ({"max_model_len": "many"}, "max_model_len is 'many'"),
        ({"max_model_len": 1.5}, "max_model_len is 1.5"),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens is True"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"watchdog_min_available_kb": "8G"}, "watchdog_min_available_kb is '8G'"),
        ({"routed_experts": 0}, "routed_experts is 0"),
        ({"routed_experts": None}, "nothing says how large the weights are"),
        ({"weights_bytes": 0, "routed_experts": None}, "weights_bytes is 0"),
        ({"engine": "tpu"}, "engine is 'tpu'"),
        ({"mtp": "yes"}, "mtp is 'yes'"),
        ({"gpu_memory_utilization": 88}, "at most 1"),
        ({"gpu_memory_utilization": "much"}, "a number is wanted"),
        ({"model_dir": ""}, "model_dir is ''"),
        ({"model_dir": "a\0b"}, "model_dir is"),
        ({"kv_cache_memroy": "14G"}, "unknown key 'kv_cache_memroy'"),
    ],
)
def test_bad_configuration_is_one_clear_error(change, words):
    with pytest.raises(ReapError, match=words) as error:
        start_gate({**K144, **change}, HostMemory(120 * GIB, 117 * GIB))
    assert "\n" not in str(error.value)


def test_text_digits_are_numbers():
    request = FitRequest.from_mapping({**K144, "watchdog_min_available_kb": "8388608", "max_model_len": "200000"})
    assert request.floor_bytes == 8 * GIB
    assert request.max_model_len == 200000


def test_a_start_wants_the_checkpoint_itself(tmp_path):
    with pytest.raises(ReapError, match="nothing can be loaded"):
        start_gate({**K144, "model_dir": str(tmp_path / "gone")}, HostMemory(120 * GIB, 117 * GIB))
    # To the other question a prediction is answer enough.
    fit = memory_fit(FitRequest.from_mapping({**K144, "model_dir": str(tmp_path / "gone")}), HostMemory(120 * GIB))
    assert fit.weights_from == "prediction"


def test_another_model_than_the_profile_wants(tmp_path):
    folder = write_sparse_checkpoint(tmp_path, 128).folder
    with pytest.raises(ReapError, match="n_routed_experts 128, but expected_routed_experts is 144"):
        start_gate(
            {**K144, "routed_experts": None, "model_dir": str(folder), "expected_routed_experts": 144},
            HostMemory(120 * GIB, 117 * GIB),
        )


def test_headers_and_prediction_give_the_same_ledger(tmp_path):
    folder = write_sparse_checkpoint(tmp_path, 144).folder
    host = HostMemory(120 * GIB, 117 * GIB)
    read, predicted = (
        memory_fit(FitRequest.from_mapping({**K144, **more}), host) for more in ({"model_dir": str(folder)}, {})
    )
    assert read.weights_from == "headers"
    assert predicted.weights_from == "prediction"
    assert [term.expected for term in read.ledger] == [term.expected for term in predicted.ledger]
    assert read.ledger[0].basis == "measured"


def run(capsys, *words):
    code = cli.main(["fit", *words])
    return code, capsys.readouterr()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "reap.json"
    path.write_text(json.dumps({"image": "x", "fit": K144}))
    return str(path)


def test_command_line_profile(capsys, config):
    code, out = run(capsys, "--config", config, "--mem-total", "120G")
    assert code == 0
    assert "tight" in out.out
    code, out = run(capsys, "--config", config, "--mem-total", "120G", "--kv-cache-memory", "5G", "--json")
    assert code == 0
    assert json.loads(out.out)["verdict"] == "fits"
    assert json.loads(out.out)["kv_tokens"] == 272140
    code, out = run(capsys, "--config", config, "--mem-total", "110G")
    assert code == 1
    assert "refuse" in out.out
    assert run(capsys, "--config", config, "--mem-total", "110G", "--no-enforce")[0] == 0


def test_command_line_gate(capsys, config):
    assert run(capsys, "--gate", "--config", config, "--mem-total", "120G", "--mem-available", "117G")[0] == 0
    code, out = run(capsys, "--gate", "--config", config, "--mem-total", "120G", "--mem-available", "60G")
    assert code == 1
    assert "short by" in out.out
    assert "weights, routed experts" in out.out
    code, out = run(capsys, "--gate", "--config", config, "--mem-total", "120G", "--mem-available", "60G", "--json")
    assert code == 1
    assert json.loads(out.out)["allowed"] is False


def test_command_line_profile_as_json(capsys, tmp_path):
    profile = {
        "hardware": "spark",
        "model_expect": {"n_routed_experts": 160},
        "model_bytes": 1,
        "kv_cache_memory": "6G",
        "max_model_len": 200000,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 1,
        "speculative": {"method": "deepseek_mtp"},
        "watchdog_min_available_kb": 6291456,
    }
    path = tmp_path / "k160.json"
    path.write_text(json.dumps(profile))
    code, out = run(capsys, "--profile-json", str(path), "--mem-total", "120G", "--json")
    assert code == 0
    assert json.loads(out.out)["kv_tokens"] == 537516
    assert json.loads(out.out)["profile"] == "k160"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "kv_cache_memory is missing"),
        (["--config", "/nowhere.json"], "not there"),
        (["--profile-json", "/nowhere.json"], "not there"),
        (
            [
                "--kv-cache-memory",
                "8GB",
                "--max-model-len",
                "1",
                "--max-num-batched-tokens",
                "1",
                "--floor-kb",
                "1",
                "--routed-experts",
                "1",
            ],
            "8GB",
        ),
        (["--mem-total", "0", "--routed-experts", "144"], "missing"),
    ],
)
def test_command_line_wrong_use(capsys, words, said):
    code, out = run(capsys, *words)
    assert code == 2
    assert said in out.err
    assert "Traceback" not in out.err


def test_a_configuration_without_the_object(capsys, tmp_path):
    path = tmp_path / "reap.json"
    path.write_text('{"image": "x"}')
    code, out = run(capsys, "--config", str(path))
    assert code == 2
    assert 'no object "fit"' in out.err


def test_the_real_program_on_this_machine():
    """No double anywhere: the program, this machine's /proc/meminfo, a request that nothing can refuse and one that
    nothing can carry."""
    base = [
        sys.executable,
        "-m",
        "reap",
        "fit",
        "--max-model-len",
        "200000",
        "--max-num-batched-tokens",
        "8192",
        "--floor-kb",
        "0",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "plugins/module_utils")}
    huge = subprocess.run(
        [*base, "--routed-experts", "50000", "--kv-cache-memory", "5G"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert huge.returncode == 1, huge.stderr
    assert "short by" in huge.stdout
