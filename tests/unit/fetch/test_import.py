"""Import from disks: both layouts of a Hugging Face cache, a plain download folder, another host's models."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reap.errors import ReapError
from reap.fetch import manifest

from .conftest import REPO, Site
from .test_download import environment

CACHE_NAME = "models--org--model"


def download(site: Site, **how: Any) -> None:
    """The hub's own snapshot_download, as somebody used it before."""
    program = (
        "import json, sys; from huggingface_hub import snapshot_download; snapshot_download(**json.loads(sys.argv[1]))"
    )
    arguments = json.dumps({"repo_id": REPO, "revision": site.revision, **how})
    subprocess.run(
        [site.python, "-c", program, arguments],
        env=environment(HF_ENDPOINT=site.hub.url, HF_HUB_DISABLE_PROGRESS_BARS="1"),
        check=True,
        capture_output=True,
    )
    site.hub.log.clear()


def offline(site: Site, *folders: Path) -> Any:
    return site.fetch(imports=folders, offline=True, settings={"python": "/nonexistent"})


def test_a_cache_is_imported_without_a_network(site: Site, tmp_path: Path) -> None:
    download(site, cache_dir=str(tmp_path / "cache"))
    assert any(path.is_symlink() for path in (tmp_path / "cache").rglob("*"))
    outcome = offline(site, tmp_path / "cache")
    assert site.is_whole()
    assert not any(path.is_symlink() for path in site.dest.rglob("*"))
    assert outcome.source.startswith("disk:")
    assert site.hub.log.lines(1) == ""


def test_a_cache_of_an_older_library_has_no_listing(site: Site, tmp_path: Path) -> None:
    download(site, cache_dir=str(tmp_path / "home" / "hub"))
    shutil.rmtree(tmp_path / "home" / "hub" / CACHE_NAME / "trees", ignore_errors=True)
    offline(site, tmp_path / "home")
    assert site.is_whole()


def test_a_cache_whose_blobs_are_shared_is_followed(site: Site, tmp_path: Path) -> None:
    """Newer libraries keep the blobs outside of the repository's folder, with links to them."""
    download(site, cache_dir=str(tmp_path / "cache"))
    blobs, shared = tmp_path / "cache" / CACHE_NAME / "blobs", tmp_path / "cache" / "shared"
    shared.mkdir()
    for blob in list(blobs.iterdir()):
        shutil.move(blob, shared / f"x{blob.name}")
        blob.symlink_to(shared / f"x{blob.name}")
    shutil.rmtree(tmp_path / "cache" / CACHE_NAME / "trees", ignore_errors=True)
    offline(site, tmp_path / "cache")
    assert site.is_whole()


def test_a_download_folder_is_imported(site: Site, tmp_path: Path) -> None:
    download(site, local_dir=str(tmp_path / "local"))
    offline(site, tmp_path / "local")
    assert site.is_whole()


def test_another_hosts_models_folder_is_imported(site: Site, tmp_path: Path) -> None:
    site.fetch()
    # A copy has other inodes and times: its manifest is no reason to believe it, only to know what it should be.
    shutil.copytree(site.models, tmp_path / "disk", copy_function=shutil.copyfile)
    shutil.rmtree(site.models)
    offline(site, tmp_path / "disk")
    assert site.is_whole()
    record = manifest.load(site.dest)
    assert record is not None
    assert manifest.faults(site.dest, record) == []


def test_a_damaged_copy_is_completed_from_the_hub(site: Site, tmp_path: Path) -> None:
    site.fetch()
    shutil.copytree(site.dest, tmp_path / "disk")
    shutil.rmtree(site.models)
    victim = tmp_path / "disk" / "model-00002-of-00003.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    site.hub.log.clear()
    with pytest.raises(ReapError, match=r"model-00002-of-00003\.safetensors .* cannot be had from .*disk, and the hub"):
        offline(site, tmp_path / "disk")
    assert not site.dest.exists()
    outcome = site.fetch(imports=(tmp_path / "disk",))
    assert site.is_whole()
    assert len(outcome.warnings) == 1
    assert [Path(line["path"]).name for line in site.got()] == [victim.name]


def test_a_snapshot_with_lost_blobs_is_named(site: Site, tmp_path: Path) -> None:
    download(site, cache_dir=str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache" / CACHE_NAME / "trees", ignore_errors=True)
    snapshot = tmp_path / "cache" / CACHE_NAME / "snapshots" / site.revision
    (snapshot / "model-00001-of-00003.safetensors").resolve().unlink()
    with pytest.raises(ReapError, match="this cache is incomplete"):
        offline(site, tmp_path / "cache")


def test_a_folder_without_hashes_cannot_be_verified_offline(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ReapError, match=r"Add the file reap-manifest\.json"):
        offline(site, site.source)
    site.fetch(imports=(site.source,))
    assert site.is_whole()


def test_an_import_of_another_revision_is_refused(site: Site, tmp_path: Path) -> None:
    site.fetch()
    with pytest.raises(ReapError, match="wanted org/model@" + "2" * 40):
        site.fetch(revision="2" * 40, dest=site.models / REPO / ("2" * 40), imports=(site.dest,), offline=True)
    with pytest.raises(ReapError, match="has nothing of"):
        site.fetch(revision="2" * 40, dest=site.models / REPO / ("2" * 40), imports=(tmp_path / "empty",))
