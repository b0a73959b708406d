"""What the registry is sent: archives and documents with fixed bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
from pathlib import Path

import pytest

from sim.common import SimError
from sim.runtime_image import registry

EPOCH = 1_700_000_000


def folder(base: Path) -> Path:
    (base / "usr/bin").mkdir(parents=True)
    (base / "usr/bin/tool").write_text("#!/bin/sh\n")
    (base / "usr/bin/tool").chmod(0o700)
    (base / "usr/data").write_bytes(b"x" * 10_000)
    (base / "usr/link").symlink_to("data")
    return base


def test_a_layer_has_the_same_bytes_whoever_makes_it_and_when(tmp_path: Path) -> None:
    one = registry.Layer.from_folder(folder(tmp_path / "a"), tmp_path / "a.gz", EPOCH)
    again = folder(tmp_path / "b")
    os.utime(again / "usr/data", (1, 1))
    other = registry.Layer.from_folder(again, tmp_path / "b.gz", EPOCH)
    assert (one.digest, one.size, one.diff_id) == (other.digest, other.size, other.diff_id)


def test_digests_are_those_of_the_written_archives(tmp_path: Path) -> None:
    layer = registry.Layer.from_folder(folder(tmp_path / "a"), tmp_path / "a.gz", EPOCH)
    packed = layer.path.read_bytes()
    plain = gzip.decompress(packed)
    assert layer.digest == "sha256:" + hashlib.sha256(packed).hexdigest()
    assert layer.diff_id == "sha256:" + hashlib.sha256(plain).hexdigest()
    assert (layer.size, layer.unpacked) == (len(packed), len(plain))


def test_files_belong_to_root_and_keep_only_whether_they_can_run(tmp_path: Path) -> None:
    layer = registry.Layer.from_folder(folder(tmp_path / "a"), tmp_path / "a.gz", EPOCH)
    with tarfile.open(layer.path) as archive:
        members = {member.name: member for member in archive}
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, EPOCH)}
    assert members["usr/bin/tool"].mode == 0o755
    assert members["usr/data"].mode == 0o644
    assert members["usr/link"].issym()


def test_a_layer_from_an_archive_keeps_that_archive(tmp_path: Path) -> None:
    tar = tmp_path / "base.tar"
    tar.write_bytes(b"anything" * 1000)
    layer = registry.Layer.from_tar(tar, tmp_path / "base.gz")
    assert gzip.decompress(layer.path.read_bytes()) == tar.read_bytes()
    assert layer.diff_id == "sha256:" + hashlib.sha256(tar.read_bytes()).hexdigest()


def test_manifest_names_config_and_layers_by_digest() -> None:
    layer = registry.Layer(Path("x"), "sha256:aa", 10, "sha256:bb", 20)
    config, manifest = registry.documents([layer], {"reap.runtime": "simulated"}, EPOCH)
    described = json.loads(manifest)
    assert described["config"]["digest"] == "sha256:" + hashlib.sha256(config).hexdigest()
    assert described["layers"] == [{"mediaType": registry.LAYER, "size": 10, "digest": "sha256:aa"}]
    assert json.loads(config)["rootfs"]["diff_ids"] == ["sha256:bb"]
    assert json.loads(config)["created"] == "2023-11-14T22:13:20Z"
    assert json.loads(config)["config"]["Labels"] == {"reap.runtime": "simulated"}


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_an_image_says_for_which_architecture_it_is(architecture: str) -> None:
    config, _ = registry.documents([], {}, EPOCH, architecture)
    assert json.loads(config)["architecture"] == architecture


def test_a_registry_that_is_down_is_one_clear_error() -> None:
    with pytest.raises(SimError, match=r"the registry at http://127\.0\.0\.1:1 does not answer"):
        registry.has_manifest("http://127.0.0.1:1", "x", "sha256:aa")
