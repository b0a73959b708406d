"""The patches against the published packages themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reap import patches
from reap.cli import main
from tests.published.releases import USUAL, apply_twice, contents, files_of, rows_in_page, site_packages, states

RELEASES = [(project, version) for project, versions in USUAL.items() for version in versions]


@pytest.mark.parametrize(("project", "version"), RELEASES)
def test_states_are_those_of_the_table_in_the_docs(project: str, version: str) -> None:
    assert states(project, version) == rows_in_page()[project, version]


@pytest.mark.parametrize(("project", "version"), RELEASES)
@pytest.mark.parametrize("router", patches.ROUTERS)
def test_apply_changes_what_it_says_and_a_second_run_nothing(
    tmp_path: Path, project: str, version: str, router: str
) -> None:
    apply_twice(tmp_path, project, version, router)


@pytest.mark.parametrize("version", USUAL["vllm"])
def test_an_edit_adds_lines_and_takes_none_but_the_ones_it_replaces(tmp_path: Path, version: str) -> None:
    folder = site_packages(tmp_path, "vllm", version)
    for path, data in patches.plan(patches.PATCHES, folder).files.items():
        if (folder / path).exists():
            old, new = (folder / path).read_text().splitlines(), data.decode().splitlines()
            assert len(set(old) - set(new)) <= 1, path


def test_check_changes_nothing_and_apply_reports_the_same_states(
    unpatched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(unpatched)
    assert main(["patch", "check", "--site-packages", str(unpatched), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert contents(unpatched) == before
    assert checked["changed"] is True
    assert main(["patch", "apply", "--site-packages", str(unpatched), "--json"]) == 0
    applied = json.loads(capsys.readouterr().out)
    assert [one["state"] for one in applied["patches"]] == ["applied"] * len(patches.PATCHES)
    assert checked["patches"] == applied["patches"]
    assert main(["patch", "apply", "--site-packages", str(unpatched), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] is False


def test_the_other_router_variant_changes_only_the_added_file(unpatched: Path) -> None:
    patches.write(unpatched, patches.plan(patches.PATCHES, unpatched, "torch").files)
    planned = patches.plan(patches.PATCHES, unpatched, "padded")
    assert [Path(name).name for name in planned.files] == ["reap_router.py"]
    assert b'\nVARIANT = "padded"\n' in next(iter(planned.files.values()))


def test_the_identity_of_the_set_depends_on_the_variant() -> None:
    assert patches.patch_set_hash("torch") != patches.patch_set_hash("padded")
    assert patches.patch_set_hash("torch") == patches.patch_set_hash("torch")


def test_every_file_that_a_patch_reads_is_fetched() -> None:
    assert {patch.path for patch in patches.PATCHES} <= {*files_of("vllm"), *files_of("flashinfer-python")}
