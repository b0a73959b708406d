"""Files that are not as published, and folders that cannot be written: one clear failure, every byte as it was."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reap import patches
from reap.cli import main
from reap.errors import ReapError
from tests.published.releases import LOADER, contents, site_packages

from .conftest import FLASHINFER, VLLM

ROOT = Path(__file__).resolve().parents[3]
BY_ID = {patch.id: patch for patch in patches.PATCHES}


def swap(old: str, new: str, count: int = -1) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, count)

    return change


def repeat(first: str, end: str) -> Callable[[str], str]:
    """Write the part from `first` up to `end` twice."""

    def change(text: str) -> str:
        start = text.index(first)
        part = text[start : text.index(end, start)]
        return text.replace(part, part + part, 1)

    return change


def repeat_last(first: str, end: str) -> Callable[[str], str]:
    """The same with the last such part: the class before has a call of the same look."""

    def change(text: str) -> str:
        start = text.rindex(first)
        part = text[start : text.index(end, start)]
        return text[:start] + part + text[start:]

    return change


METHOD = "    def process_weights_after_loading(self, layer):"
FIND = "\n\ndef find_loaded_library(lib_name):\n    return None\n"
TEST = "            if lib_name in line:\n"

MUTATIONS = [
    ("router-fallback", "renamed function", swap("def vllm_topk_softplus_sqrt(", "def vllm_topk_softplus_root(")),
    ("router-fallback", "renamed kernel", swap("ops.topk_hash_softplus_sqrt(", "ops.topk_hash_softplus_root(")),
    (
        "router-fallback",
        "kernel by another name",
        swap("import vllm._custom_ops as ops", "from vllm import _custom_ops as ops"),
    ),
    ("router-fallback", "duplicated function", repeat("def vllm_topk_softplus_sqrt(", "@functools.lru_cache")),
    (
        "router-fallback",
        "arguments in another order",
        swap(
            "        renormalize,\n        routed_scaling_factor,\n",
            "        routed_scaling_factor,\n        renormalize,\n",
        ),
    ),
    (
        "router-fallback",
        "an argument that is not known",
        swap(
            "        hash_indices_table,\n    )\n\n    return topk_weights",
            "        hash_indices_table,\n        soft=1,\n    )\n\n    return topk_weights",
        ),
    ),
    ("mxfp4-hygiene", "renamed class", swap("class Mxfp4MoEMethod(", "class Mxfp4ExpertsMethod(")),
    (
        "mxfp4-hygiene",
        "renamed method",
        swap("def process_weights_after_loading(self, layer)", "def process_after_loading(self, layer)"),
    ),
    ("mxfp4-hygiene", "renamed setup", swap("self._setup_kernel(", "self._set_up_kernel(")),
    (
        "mxfp4-hygiene",
        "something after the setup",
        swap(
            "w13_bias, w2_bias)\n\n    def get_fused",
            "w13_bias, w2_bias)\n        self.done = True\n\n    def get_fused",
        ),
    ),
    ("mxfp4-hygiene", "duplicated setup", repeat_last("        self._setup_kernel(", "\n    def get_fused")),
    ("mxfp4-hygiene", "duplicated class", lambda text: text + "\n\nclass Mxfp4MoEMethod:\n    pass\n"),
    ("mxfp4-hygiene", "duplicated method", lambda text: text.replace(METHOD, f"{METHOD}\n        pass\n\n{METHOD}")),
    ("cutedsl-switch", "renamed function", swap("def has_cutedsl(", "def has_cute_dsl(")),
    (
        "cutedsl-switch",
        "duplicated function",
        lambda text: text + '\n\ndef has_cutedsl() -> bool:\n    return _has_module("cutlass")\n',
    ),
    ("cutedsl-switch", "an argument", swap("def has_cutedsl()", "def has_cutedsl(strict)")),
    ("flashinfer-libcudart", "renamed function", swap("def find_loaded_library(", "def find_library(")),
    ("flashinfer-libcudart", "changed test", swap("if lib_name in line:", "if lib_name in line.lower():")),
    ("flashinfer-libcudart", "duplicated function", lambda text: text + FIND),
    ("flashinfer-libcudart", "duplicated test", lambda text: text.replace(TEST, f"{TEST}                pass\n{TEST}")),
    ("vllm-libcudart", "duplicated function", lambda text: text + FIND),
    ("vllm-libcudart", "duplicated test", lambda text: text.replace(TEST, f"{TEST}                pass\n{TEST}")),
    ("vllm-libcudart", "renamed function", swap("def find_loaded_library(", "def find_library(")),
    ("vllm-libcudart", "changed test", swap("if lib_name in line:", "if line.count(lib_name):")),
    ("vllm-libcudart", "other source of the map", swap('open("/proc/self/maps")', 'open("/proc/self/smaps")')),
]


@pytest.mark.parametrize(("patch", "what", "change"), MUTATIONS, ids=[f"{p}: {w}" for p, w, _ in MUTATIONS])
def test_an_unknown_shape_fails_and_changes_nothing(
    unpatched: Path, capsys: pytest.CaptureFixture[str], patch: str, what: str, change: Callable[[str], str]
) -> None:
    file = unpatched / BY_ID[patch].path
    text = file.read_text()
    file.write_text(change(text))
    assert file.read_text() != text
    before = contents(unpatched)
    assert main(["patch", "apply", "--site-packages", str(unpatched)]) == 1
    assert contents(unpatched) == before
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(patch))
    assert "failed" in said
    assert BY_ID[patch].path in said
    # What was found, by name and version, and what was wanted.
    package = BY_ID[patch].package
    assert f"of {package} {FLASHINFER if package == 'flashinfer' else VLLM}: looked for" in said


# Releases whose shapes differ from the usual one's.
LATER = [
    ("0.33.0", "router-fallback", "renamed kernel", swap("topk_hash_softplus_sqrt", "topk_hash_softplus_root")),
    ("0.33.0", "router-fallback", "renamed function", swap("vllm_topk_softplus_sqrt", "vllm_topk_softplus_root")),
    ("0.33.0", "router-fallback", "one more argument by name", swap("is_padding=", "is_dummy=")),
    (
        "0.33.0",
        "router-fallback",
        "duplicated call",
        lambda text: text + "\n\ndef again(*args):\n    return ops.topk_hash_softplus_sqrt(*args)\n",
    ),
]


@pytest.mark.parametrize(
    ("version", "patch", "change"),
    [(version, patch, change) for version, patch, _, change in LATER],
    ids=[f"{version} {patch}: {what}" for version, patch, what, _ in LATER],
)
def test_an_unknown_shape_of_a_later_release_fails_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str, patch: str, change: Callable[[str], str]
) -> None:
    folder = site_packages(tmp_path, "vllm", version)
    file = folder / BY_ID[patch].path
    text = file.read_text()
    file.write_text(change(text))
    assert file.read_text() != text
    before = contents(folder)
    assert main(["patch", "apply", "--site-packages", str(folder)]) == 1
    assert contents(folder) == before
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(patch))
    assert f"{BY_ID[patch].path} of vllm {version}: looked for" in said


RELEASE = "release_device_memory_under_pressure"
OUT_OF_THE_LOOP = f"\n\ndef process_weights_after_loading(model):\n    {RELEASE}()\n"
LOADER_CHANGES = {
    "renamed": swap(RELEASE, "release_memory_somehow"),
    "called once, outside the loop": lambda text: (
        text.replace("def process_weights_after_loading(", "def process_weights(") + OUT_OF_THE_LOOP
    ),
    "empty": lambda text: "",
}


@pytest.mark.parametrize("what", LOADER_CHANGES)
@pytest.mark.parametrize("version", ["0.24.0", "0.28.0", "0.33.0"])
def test_a_loader_without_the_fix_is_not_taken_for_fixed(tmp_path: Path, version: str, what: str) -> None:
    """The method is then patched where its shape is known, and refused where it is not; never called fixed."""
    folder = site_packages(tmp_path, "vllm", version)
    loader = folder / LOADER
    loader.write_text(LOADER_CHANGES[what](loader.read_text()))
    before = contents(folder)
    known = version in ("0.24.0", "0.28.0")
    assert main(["patch", "apply", "--site-packages", str(folder)]) == (0 if known else 1)
    verdict = next(one for one in patches.plan(patches.PATCHES, folder).verdicts if one.id == "mxfp4-hygiene")
    if known:
        assert (verdict.state, verdict.changed) == ("applied", False)
    else:
        assert verdict.state == "failed"
        assert f"of vllm {version}: looked for" in verdict.reason
        assert contents(folder) == before


@pytest.mark.parametrize("patch", sorted(BY_ID))
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data + b"def broken(:\n",
        lambda data: b"\xff" + data,
        lambda data: b"",
    ],
    ids=["CRLF", "syntax error", "not UTF-8", "empty"],
)
def test_a_file_that_is_not_as_published_fails(unpatched: Path, patch: str, change: Callable[[bytes], bytes]) -> None:
    file = unpatched / BY_ID[patch].path
    file.write_bytes(change(file.read_bytes()))
    before = contents(unpatched)
    planned = patches.plan(patches.PATCHES, unpatched)
    if not planned.ok:
        assert main(["patch", "apply", "--site-packages", str(unpatched)]) == 1
        assert contents(unpatched) == before
    # An import_utils.py without a word of cute-dsl is how a release without it looks.
    empty_is_fine = patch == "cutedsl-switch" and file.read_bytes() == b""
    assert planned.ok is empty_is_fine
    failed = {verdict.id for verdict in planned.verdicts if verdict.state == "failed"}
    assert failed == (set() if empty_is_fine else {patch})


@pytest.mark.parametrize("patch", sorted(BY_ID))
def test_a_missing_file_fails(unpatched: Path, patch: str) -> None:
    (unpatched / BY_ID[patch].path).unlink()
    verdict = next(one for one in patches.plan(patches.PATCHES, unpatched).verdicts if one.id == patch)
    assert verdict.state == "failed"
    assert "No such file" in verdict.reason


@pytest.mark.parametrize("patch", sorted(BY_ID))
def test_a_read_only_file_fails_even_for_root(unpatched: Path, patch: str) -> None:
    (unpatched / BY_ID[patch].path).chmod(0o444)
    before = contents(unpatched)
    assert main(["patch", "apply", "--site-packages", str(unpatched)]) == 1
    assert contents(unpatched) == before


def test_an_older_revision_of_a_patch_is_not_patched_over(unpatched: Path) -> None:
    file = unpatched / BY_ID["vllm-libcudart"].path
    file.write_text(file.read_text() + "# reap patch: vllm-libcudart v0\n")
    verdict = next(one for one in patches.plan(patches.PATCHES, unpatched).verdicts if one.id == "vllm-libcudart")
    assert verdict.state == "failed"
    assert "start from the unpatched package" in verdict.reason


def test_a_mark_without_the_change_is_not_believed(unpatched: Path) -> None:
    patch = BY_ID["vllm-libcudart"]
    file = unpatched / patch.path
    file.write_text(file.read_text() + f"{patch.mark}\n")
    verdict = next(one for one in patches.plan(patches.PATCHES, unpatched).verdicts if one.id == patch.id)
    assert verdict.state == "failed"


def test_a_file_of_somebody_else_where_one_is_to_be_added(unpatched: Path) -> None:
    added = unpatched / next(iter(BY_ID["router-fallback"].adds))
    added.write_text("mine = True\n")
    assert not patches.plan(patches.PATCHES, unpatched).ok
    assert added.read_text() == "mine = True\n"


def test_a_disk_that_fills_up_in_the_middle(unpatched: Path) -> None:
    # A real refusal of the kernel after some files are written: a limit on file size between the smallest and largest.
    planned = patches.plan(patches.PATCHES, unpatched)
    sizes = sorted(len(data) for data in planned.files.values())
    limit = (sizes[0] + sizes[-1]) // 2
    before = contents(unpatched)
    done = subprocess.run(
        [sys.executable, "-m", "reap", "patch", "apply", "--site-packages", str(unpatched)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "plugins" / "module_utils")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done
    assert "nothing was changed" in done.stdout
    assert contents(unpatched) == before


@pytest.mark.parametrize("fails_at", range(6))
def test_a_rename_that_fails_puts_everything_back(
    unpatched: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    planned = patches.plan(patches.PATCHES, unpatched)
    assert len(planned.files) == 6
    before = contents(unpatched)
    real, calls = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal calls
        if self.name.endswith(".reap-new"):
            calls += 1
            if calls == fails_at + 1:
                raise OSError(5, "Input/output error", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(ReapError, match="nothing was changed"):
        patches.write(unpatched, planned.files)
    assert contents(unpatched) == before


def test_mode_and_owner_are_kept(unpatched: Path) -> None:
    file = unpatched / BY_ID["mxfp4-hygiene"].path
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 1234, 2345)
    before = file.stat()
    patches.write(unpatched, patches.plan(patches.PATCHES, unpatched).files)
    after = file.stat()
    assert after.st_ino != before.st_ino
    assert (stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid) == (0o640, before.st_uid, before.st_gid)


def test_stale_bytecode_goes_with_the_old_file(unpatched: Path) -> None:
    file = unpatched / BY_ID["mxfp4-hygiene"].path
    stale, other = (
        file.parent / "__pycache__" / "mxfp4.cpython-312.pyc",
        file.parent / "__pycache__" / "x.cpython-312.pyc",
    )
    stale.parent.mkdir()
    stale.write_bytes(b"stale")
    other.write_bytes(b"other")
    patches.write(unpatched, patches.plan(patches.PATCHES, unpatched).files)
    assert not stale.exists()
    assert other.exists()


def test_a_folder_without_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "apply", "--site-packages", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"vllm is not in {tmp_path}" in out
    assert "nothing was changed" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["check", "--site-packages", "/nonexistent"],
        ["apply", "--site-packages", ".", "--router", "fast"],
        ["apply", "--site-packages", "auto"],
    ],
)
def test_wrong_use_ends_with_2_and_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
