"""Bytes of the weights: the geometry's prediction against the published totals, and the sum of headers against both."""

from __future__ import annotations

import json

import pytest

from reap.errors import ReapError
from reap.memory.config import FLASH_CONFIG, flash, parse_deepseek, read_config
from reap.memory.terms import runtime_tables
from reap.memory.weights import deepseek_tensors, from_headers, predict, summed
from reap.sizes import GIB
from tests.support.sparse_checkpoint import write_sparse_checkpoint, write_sparse_file

# K -> GiB of the files without and with the drafter layer, to two decimals.
TABLE = {130: (77.79, 79.57), 144: (85.29, 87.24), 160: (93.86, 96.01), 180: (104.58, 106.98), 192: (111.01, 113.56)}


def test_the_unpruned_model_comes_out_to_the_byte():
    """Index of the published deepseek-ai/DeepSeek-V4-Flash: 69,187 tensors, total_size 159,609,485,896; 1,575 of them
    are the drafter's."""
    tensors = list(deepseek_tensors(flash(256)))
    assert len(tensors) == 69187
    assert sum(tensor.nbytes for tensor in tensors) == 159_609_485_896
    assert sum(tensor.name.startswith("mtp.") for tensor in tensors) == 1575
    assert len({tensor.name for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("k", [1, 2, 3, 144])
def test_the_prediction_is_the_sum_of_the_tensors(k):
    assert predict(flash(k)) == summed(deepseek_tensors(flash(k)))


@pytest.mark.parametrize(("k", "gib"), TABLE.items())
def test_file_bytes_within_two_thousandths_of_the_table(k, gib):
    weights = predict(flash(k))
    for mtp, expected in enumerate(gib):
        assert sum(weights.loaded(bool(mtp))) / GIB == pytest.approx(expected, rel=0.002)


def test_one_unit_of_k_is_what_the_format_says():
    more = predict(flash(145)).experts - predict(flash(144)).experts
    assert more == 43 * 3 * 4096 * 2048 * 17 // 32  # 4 bits, and one byte for 32 elements


def test_the_published_k144_has_94_gb():
    assert predict(flash(144)).file_bytes == pytest.approx(93.68e9, rel=0.0002)


@pytest.mark.parametrize(
    ("k", "mtp", "logged", "within"), [(160, True, 96.66, 0.1), (160, True, 96.72, 0.1), (144, False, 86.12, 0.3)]
)
def test_loading_took(k, mtp, logged, within):
    """ "Model loading took" of vLLM: on GB10 (K160, MTP2), and on an H200 with the same and with K144."""
    config = flash(k)
    tables = runtime_tables(config)
    weights = sum(predict(config).loaded(mtp))
    assert (weights + tables.expected) / GIB == pytest.approx(logged, abs=within)
    assert weights + tables.low <= (logged + 0.005) * GIB
    assert weights + tables.high >= (logged - 0.005) * GIB


@pytest.fixture(scope="module")
def k144(tmp_path_factory):
    return write_sparse_checkpoint(tmp_path_factory.mktemp("k144"), 144)


def test_a_full_size_checkpoint_is_summed_exactly(k144):
    assert k144.apparent_bytes > 93e9
    assert k144.disk_bytes < 20e6
    weights = from_headers(k144.folder, read_config(k144.folder), mtp=False)
    assert weights == predict(flash(144))
    assert weights.file_bytes == k144.tensor_bytes
    assert weights.tensors == k144.tensors == 39619


SMALL = {"num_hidden_layers": 3, "num_hash_layers": 1, "compress_ratios": [0, 4, 128, 0], "vocab_size": 1000}


@pytest.fixture
def small(tmp_path):
    return write_sparse_checkpoint(tmp_path / "small", 8, **SMALL).folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def test_config_and_tensors_disagree_on_experts(small):
    edit_config(small, n_routed_experts=9)
    with pytest.raises(ReapError, match=r"config\.json says 9 routed experts, layer 0 has 8"):
        from_headers(small, read_config(small), mtp=False)


def test_the_router_disagrees_with_the_experts(small):
    tensors = [
        tensor for tensor in deepseek_tensors(read_config(small).deepseek) if tensor.name.startswith("layers.1.")
    ]
    wrong = [
        type(t)(t.name, t.dtype, (7, 4096), 7 * 4096 * 2) if t.name == "layers.1.ffn.gate.weight" else t
        for t in tensors
    ]
    write_sparse_file(small / "model-00003-of-00006.safetensors", wrong)
    with pytest.raises(ReapError, match="the router of layer 1 has 7 rows"):
        from_headers(small, read_config(small), mtp=False)


def test_config_and_tensors_disagree_on_layers(small):
    edit_config(small, num_hidden_layers=4, compress_ratios=[0, 4, 128, 4, 0])
    with pytest.raises(ReapError, match=r"config\.json says 4 layers, the tensors have 3"):
        from_headers(small, read_config(small), mtp=False)


def test_a_drafter_that_is_not_there(tmp_path):
    folder = write_sparse_checkpoint(tmp_path, 8, **{**SMALL, "num_nextn_predict_layers": 0}).folder
    assert from_headers(folder, read_config(folder), mtp=False).mtp_other == 0
    with pytest.raises(ReapError, match="no mtp tensors"):
        from_headers(folder, read_config(folder), mtp=True)


@pytest.mark.parametrize("key", [key for key in FLASH_CONFIG if key != "model_type"])
def test_a_missing_key_is_named(small, key):
    edit_config(small, **{key: "gone"})
    with pytest.raises(ReapError, match=f"config.json has no {key}"):
        read_config(small)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_routed_experts": 0}, "n_routed_experts is 0"),
        ({"n_routed_experts": -1}, "n_routed_experts is -1"),
        ({"n_routed_experts": "144"}, "n_routed_experts is '144'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 4096.5}, "hidden_size is 4096.5"),
        ({"compress_ratios": 4}, "compress_ratios is 4"),
        ({"compress_ratios": [0, -4, 128, 0]}, "whole numbers"),
        ({"compress_ratios": [0]}, "1 entries for 3 layers"),
        ({"num_hidden_layers": 10**9}, "no DeepSeek V4 model"),
        ({"num_hash_layers": 7}, "larger than what it is a part of"),
        ({"model_type": 7}, "no model_type"),
    ],
)
def test_a_value_out_of_range_is_named(small, changes, words):
    edit_config(small, **changes)
    with pytest.raises(ReapError, match=words):
        read_config(small)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"model_type": ""}'])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ReapError, match=r"config\.json"):
        read_config(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(ReapError, match="not there"):
        read_config(tmp_path)


def test_padding_after_the_drafters_belongs_to_no_layer():
    padded = {**FLASH_CONFIG, "compress_ratios": [*FLASH_CONFIG["compress_ratios"], 0, 0]}
    assert parse_deepseek(padded, "x") == parse_deepseek(FLASH_CONFIG, "x")
