"""The header reader: exact on good files, one clear error on every kind of bad one, never a traceback."""

from __future__ import annotations

import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reap import safetensors
from reap.errors import ReapError
from reap.safetensors import DTYPE_BITS, INDEX_NAME, has_weights, iter_tensors, read_header, read_index

GOOD = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]},
    "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
    "empty": {"dtype": "I8", "shape": [0, 7], "data_offsets": [20, 20]},
    "scalar": {"dtype": "F8_E8M0", "shape": [], "data_offsets": [20, 21]},
}


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def good(tmp_path):
    return raw_file(tmp_path / "model.safetensors", GOOD, bytes(21))


def test_a_good_header_is_read_in_file_order(good):
    tensors = read_header(good)
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in tensors] == [
        ("a", "BF16", (2,), 4),
        ("b", "F32", (2, 2), 16),
        ("empty", "I8", (0, 7), 0),
        ("scalar", "F8_E8M0", (), 1),
    ]


def entry(**changes):
    return {**GOOD, "b": {**GOOD["b"], **changes}}


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        pytest.param(GOOD, bytes(20), None, "short|past", id="data truncated"),
        pytest.param(GOOD, bytes(22), None, "short of the end", id="data too long"),
        pytest.param(GOOD, bytes(21), 10**6, "ends after", id="length past the end"),
        pytest.param(GOOD, bytes(21), 100_000_000, "at most", id="100 MB header"),
        pytest.param(GOOD, bytes(21), 2**64 - 1, "at most", id="length of 2^64 - 1"),
        pytest.param(GOOD, bytes(21), 5, "cannot be read", id="length too short"),
        pytest.param(GOOD, bytes(21), 0, "does not begin", id="length zero"),
        pytest.param(b"[]", b"", None, "does not begin", id="a list"),
        pytest.param(b"{", b"", None, "cannot be read", id="cut JSON"),
        pytest.param(b"{\xff}", b"", None, "cannot be read", id="no UTF-8"),
        pytest.param(b'{"a":' + b"[" * 200_000, b"", None, "cannot be read", id="nested without end"),
        pytest.param(b'{"a":1' + b"0" * 5000 + b"}", b"", None, "cannot be read", id="number of 5,000 digits"),
        pytest.param(b'{"a":{},"a":{}}', b"", None, "twice", id="a name twice"),
        pytest.param({"a": 1}, b"", None, "not by dtype", id="entry is a number"),
        pytest.param({"__metadata__": {"a": 1}}, b"", None, "text to text", id="metadata with a number"),
        pytest.param(entry(dtype="F3"), bytes(21), None, "unknown dtype 'F3'", id="unknown dtype"),
        pytest.param(entry(dtype=None), bytes(21), None, "unknown dtype", id="no dtype"),
        pytest.param(entry(shape=[2, -2]), bytes(21), None, "zero or more", id="negative shape"),
        pytest.param(entry(shape=[2, 2.0]), bytes(21), None, "whole numbers", id="fraction in shape"),
        pytest.param(entry(shape=[True, 4]), bytes(21), None, "whole numbers", id="true in shape"),
        pytest.param(entry(shape="22"), bytes(21), None, "whole numbers", id="text as shape"),
        pytest.param(entry(shape=[2**62, 2**62]), bytes(21), None, r"2\^63", id="shape overflows"),
        pytest.param(entry(shape=[3, 2]), bytes(21), None, "by dtype and shape", id="shape and offsets disagree"),
        pytest.param(entry(data_offsets=[4]), bytes(21), None, "two whole numbers", id="one offset"),
        pytest.param(entry(data_offsets=[20, 4]), bytes(21), None, "by its data_offsets", id="offsets reversed"),
        pytest.param(entry(data_offsets=[-4, 12]), bytes(21), None, "two whole numbers", id="negative offset"),
        pytest.param(entry(data_offsets=[2, 18]), bytes(21), None, "overlaps", id="overlapping offsets"),
        pytest.param(entry(data_offsets=[8, 24]), bytes(25), None, "unused", id="hole between tensors"),
        pytest.param(
            {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}},
            b"1",
            None,
            "no whole number of bytes",
            id="half a byte",
        ),
    ],
)
def test_a_bad_header_is_one_clear_error(tmp_path, header, data, length, words):
    path = raw_file(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(ReapError, match=words) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_shorter_than_its_first_field(tmp_path, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(ReapError, match=f"has {size} bytes"):
        read_header(path)


def test_a_large_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100 * 10**6).to_bytes(8, "little"))
        file.truncate(101 * 10**6)
    with pytest.raises(ReapError, match="100000000 bytes; at most 25000000"):
        read_header(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    for name, words in {
        "pipe": "no regular file",
        "folder": "no regular file",
        "loop": "leads back to itself",
        "gone": "not there",
    }.items():
        with pytest.raises(ReapError, match=words):
            read_header(tmp_path / f"{name}.safetensors")


def test_a_file_that_shrinks_while_it_is_read(good, monkeypatch):
    monkeypatch.setattr(safetensors.os, "pread", lambda *_: b"")
    with pytest.raises(ReapError, match="became shorter"):
        read_header(good)


def two_shards(folder):
    raw_file(folder / "one.safetensors", {"a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}}, bytes(3))
    raw_file(folder / "two.safetensors", {"b": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}, bytes(4))
    index = {"metadata": {"total_size": 7}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return index


def test_an_index_names_the_files(tmp_path):
    two_shards(tmp_path)
    raw_file(tmp_path / "other.safetensors", {"c": {"dtype": "I8", "shape": [9], "data_offsets": [0, 9]}}, bytes(9))
    assert sum(tensor.nbytes for tensor in iter_tensors(tmp_path)) == 7
    assert has_weights(tmp_path)


def test_without_an_index_every_file_counts(tmp_path):
    two_shards(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    assert read_index(tmp_path) is None
    assert sum(tensor.nbytes for tensor in iter_tensors(tmp_path)) == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"weight_map": {"a": "one.safetensors", "c": "three.safetensors"}},
            "missing, the first three.safetensors: finish the download",
        ),
        (
            {"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}},
            "do not hold, the first 'c' in two.safetensors",
        ),
        ({"weight_map": {"a": "../one.safetensors"}}, "same folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "same folder"),
        ({"weight_map": {"a": 3}}, "same folder"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
    ],
)
def test_a_bad_index(tmp_path, change, words):
    index = two_shards(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({**index, **change}))
    with pytest.raises(ReapError, match=words):
        list(iter_tensors(tmp_path))


@pytest.mark.parametrize("text", ["", "[", "3", "[" * 100_000, '"' + "x" * 100])
def test_an_index_that_is_no_json_object(tmp_path, text):
    two_shards(tmp_path)
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ReapError):
        list(iter_tensors(tmp_path))


def test_a_shard_that_links_to_itself(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    (tmp_path / "two.safetensors").symlink_to("two.safetensors")
    with pytest.raises(ReapError, match="leads back to itself"):
        list(iter_tensors(tmp_path))


def test_a_tensor_in_two_files(tmp_path):
    two_shards(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    (tmp_path / "three.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    with pytest.raises(ReapError, match="mixes two checkpoints"):
        list(iter_tensors(tmp_path))


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(ReapError, match="holds no safetensors file"):
        list(iter_tensors(tmp_path))
    with pytest.raises(ReapError, match="not there"):
        list(iter_tensors(tmp_path / "nowhere"))
    assert not has_weights(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ReapError, match="leads back to itself"):
        list(iter_tensors(tmp_path / "loop"))
    with pytest.raises(ReapError, match="leads back to itself"):
        has_weights(tmp_path / "loop")


def as_nobody(work):
    """Run `work` in a child without root's rights; its text comes back."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        text = "no error"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def test_what_may_not_be_read(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    two_shards(locked)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp"):
            parent.chmod(0o755)
    (locked / "one.safetensors").chmod(0)
    assert "one.safetensors cannot be read: Permission denied" in as_nobody(lambda: list(iter_tensors(locked)))
    locked.chmod(0)
    try:
        assert as_nobody(lambda: has_weights(locked)) == f"ReapError: {locked} cannot be read: Permission denied"
        assert as_nobody(lambda: list(iter_tensors(locked))).startswith("ReapError: ")
    finally:
        locked.chmod(0o755)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_fuzz_bytes_never_a_traceback(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    with pytest.raises(ReapError):
        read_header(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(list(DTYPE_BITS)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(header=st.dictionaries(st.text(max_size=5), json_values, max_size=4), data=st.binary(max_size=40))
def test_fuzz_headers_never_a_traceback(tmp_path_factory, header, data):
    path = raw_file(tmp_path_factory.getbasetemp() / "fuzz2.safetensors", header, data)
    try:
        tensors = read_header(path)
    except ReapError:
        return
    assert sum(tensor.nbytes for tensor in tensors) == len(data)


def test_fuzz_a_good_file_with_bytes_changed(good):
    """Whatever a damaged disk makes of a good file: a clear error, or a header that still describes exactly the
    file."""
    whole = good.read_bytes()
    chance = random.Random(20260527)
    for _ in range(3000):
        broken = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        good.write_bytes(broken[: chance.randrange(len(broken) + 1)] if chance.random() < 0.2 else broken)
        try:
            tensors = read_header(good)
        except ReapError:
            continue
        assert sum(tensor.nbytes for tensor in tensors) == 21


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([d for d, bits in DTYPE_BITS.items() if bits % 8 == 0]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=6,
    )
)
def test_every_well_formed_file_is_read_exactly(tmp_path_factory, plan):
    header, offset, expected = {}, 0, []
    for number, (dtype, shape) in enumerate(plan):
        size = DTYPE_BITS[dtype] // 8
        for length in shape:
            size *= length
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        expected.append((f"t{number}", size))
        offset += size
    path = raw_file(tmp_path_factory.getbasetemp() / "well.safetensors", header, bytes(offset))
    found = read_header(path)
    assert sorted((t.name, t.nbytes) for t in found) == sorted(expected)
