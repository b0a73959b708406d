"""Plans, expectations, manifests and progress files: pure decisions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap.errors import ReapError
from reap.fetch import manifest, plan, progress

NAMES = st.text(alphabet="abc.-_/", min_size=1, max_size=20)
HASH = "0" * 64


@given(NAMES)
def test_no_name_of_a_hub_leaves_the_folder(name: str) -> None:
    try:
        checked = plan.check_name(name)
    except ReapError:
        return
    root = Path("/models/x")
    assert (root / checked).resolve().is_relative_to(root)
    assert not checked.startswith("/")


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a//b", "a/./b", "", ".reap/plan.json", "reap-manifest.json", "a\nb", "a\\b", "a\x7f"],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ReapError):
        plan.check_name(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": -1}, "size"),
        ({"size": True}, "size"),
        ({"size": "7"}, "size"),
        ({"sha256": "xyz"}, "sha256"),
        ({"sha256": None}, "no hash"),
        ({"name": "../x"}, "plain relative path"),
        ({"name": "config.json"}, "listed twice"),
    ],
)
def test_a_listing_that_cannot_be_verified_is_refused(change: dict[str, Any], words: str) -> None:
    config = {"name": "config.json", "size": 2, "sha256": HASH}
    with pytest.raises(ReapError, match=words):
        plan.plan_from_listing([config, {"name": "a", "size": 1, "sha256": HASH, **change}])


def test_a_listing_without_a_config_is_no_model() -> None:
    with pytest.raises(ReapError, match=r"no config\.json"):
        plan.plan_from_listing([{"name": "a", "size": 1, "sha256": HASH}])


@given(
    st.dictionaries(st.sampled_from(["config.json", "a", "b/c", "z.safetensors"]), st.integers(0, 2**50), min_size=1)
)
def test_a_plan_survives_being_written(sizes: dict[str, int]) -> None:
    sizes["config.json"] = 3
    made = {name: plan.Want(name, size, HASH) for name, size in sizes.items()}
    assert plan.plan_from_listing(json.loads(json.dumps(plan.listing(made)))) == made


def test_what_can_refuse_comes_first_and_big_files_before_small() -> None:
    made = {n: plan.Want(n, s, HASH) for n, s in {"a": 5, "b": 9, plan.INDEX: 1, plan.CONFIG: 1}.items()}
    assert [want.name for want in plan.download_order(made)] == [plan.CONFIG, plan.INDEX, "b", "a"]


@pytest.mark.parametrize(
    ("expect", "problems"),
    [
        ({"n_routed_experts": 144}, ["n_routed_experts is 128, wanted 144"]),
        ({"n_routed_experts": 128, "q.method": "fp8"}, []),
        ({"q.method": ["fp4", "fp8"]}, []),
        ({"q.bits.x": 1}, ["q.bits.x is missing, wanted 1"]),
        ({"tie": 1}, ["tie is true, wanted 1"]),
        ({"absent": None}, []),
    ],
)
def test_config_is_compared_with_the_profile(tmp_path: Path, expect: dict[str, Any], problems: list[str]) -> None:
    config = {"n_routed_experts": 128, "q": {"method": "fp8", "bits": 8}, "tie": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan.config_problems(tmp_path / "config.json", expect) == problems


@pytest.mark.parametrize("repo", ["model", "a/b/c", "../x", "a/..", "", "a b/c"])
def test_a_repository_is_owner_and_name(repo: str) -> None:
    with pytest.raises(ReapError, match="owner/name"):
        plan.check_identity(repo, "0" * 40)


@given(st.binary(max_size=3000), st.integers(1, 700))
def test_hashes_are_those_of_git_and_sha256(data: bytes, step: int) -> None:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    for want in (
        plan.Want("f", len(data), hashlib.sha256(data).hexdigest()),
        plan.Want("f", len(data), git_sha1=git),
    ):
        hasher = manifest.Hasher(want)
        for start in range(0, len(data), step):
            hasher.update(data[start : start + step])
        assert hasher.problem() is None
        hasher.update(b"x")
        assert hasher.problem() is not None


def test_a_journal_line_that_a_power_cut_tore_loses_only_itself(tmp_path: Path) -> None:
    (tmp_path / ".reap").mkdir()
    journal = manifest.Journal(tmp_path)
    one, two = (manifest.Entry(name, 1, HASH, None, 1, 1, 0.0) for name in ("one", "two"))
    journal.add(one)
    with journal.path.open("a") as out:
        out.write('{"name": "torn", "si')
    journal.add(two)
    assert journal.read() == {"one": one, "two": two}


def test_a_manifest_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"files": [{"name": "../x"}]}', '{"repo": 1}'):
        (tmp_path / plan.MANIFEST).write_text(text)
        assert manifest.load(tmp_path) is None


def test_progress_has_rate_and_time_left(tmp_path: Path) -> None:
    now = [0.0]
    file = tmp_path / "deep" / "p.json"
    watched = progress.Progress(file, "model_fetch", 1000, source="hub", clock=lambda: now[0])
    for second in range(6):
        now[0] = float(second)
        watched.update(second * 100, detail="a.safetensors")
    state = json.loads(file.read_text())
    assert (state["rate"], state["eta_s"], state["done"], state["state"]) == (100.0, 5, 500, "running")
    now[0] += 30
    watched.update(500)
    assert json.loads(file.read_text())["rate"] < 20
    watched.failed("no network")
    state = json.loads(file.read_text())
    assert (state["state"], state["error"], state["rate"]) == ("failed", "no network", None)
    assert [p.name for p in file.parent.iterdir()] == ["p.json"]


def test_a_secret_that_somebody_else_quotes_is_in_no_progress_file(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    watched = progress.Progress(file, "x", every_s=0, secret="sesame")
    watched.update(1, detail="503: you sent sesame", source="hub sesame")
    assert json.loads(file.read_text())["detail"] == "503: you sent ***"
    assert "sesame" not in file.read_text()
    watched.done("sesame")
    assert "sesame" not in file.read_text()
    watched.failed("refused sesame")
    assert json.loads(file.read_text())["error"] == "refused ***"


def test_progress_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watched = progress.Progress(tmp_path / "file" / "p.json", "x")
    watched.update(1)
    watched.done()
