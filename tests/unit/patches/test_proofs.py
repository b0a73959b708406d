"""The libcudart patches against process maps, made up and of a real process; the other patches' own proofs."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from reap import patches
from reap.patches.core import ShapeError, Source
from reap.patches.proofs import PROCESS_MAPS, finds_the_library
from tests.published import fetch

LIBRARY_PATCHES = [patch for patch in patches.PATCHES if patch.id.endswith("libcudart")]
# The stub was named so until TileLang 0.1.11; 0.1.12 and later call it libstub_cudart.so.
TILELANG, TILELANG_STUB = "0.1.9", "tilelang/lib/libcudart_stub.so"
CUDA_RUNTIME, CUDA_LIBRARY = "13.0.96", "nvidia/cu13/lib/libcudart.so.13"


@pytest.mark.parametrize("patch", LIBRARY_PATCHES, ids=lambda patch: patch.id)
def test_the_published_function_takes_a_stub_and_the_patched_one_does_not(
    unpatched: Path, patch: patches.Patch
) -> None:
    published = Source((unpatched / patch.path).read_bytes())
    assert finds_the_library(published) is not None
    patched = Source(patches.plan([patch], unpatched).files[patch.path])
    assert finds_the_library(patched) is None


def test_the_maps_have_the_stub_first_last_and_alone() -> None:
    assert {"stub first", "stub last", "stub alone"} <= set(PROCESS_MAPS)


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.id)
def test_no_proof_passes_on_the_published_file(unpatched: Path, patch: patches.Patch) -> None:
    with pytest.raises((ShapeError, NameError)):
        patch.proof(Source((unpatched / patch.path).read_bytes()))


@pytest.mark.parametrize("patch", LIBRARY_PATCHES, ids=lambda patch: patch.id)
@pytest.mark.parametrize("order", ["stub first", "stub last", "stub alone"])
def test_a_real_process_with_the_real_stub_and_the_real_runtime(
    unpatched: Path, patch: patches.Patch, order: str
) -> None:
    """Loads TileLang's stub and NVIDIA's library of the published wheels; neither needs a GPU to be loaded."""
    stub = fetch("tilelang", TILELANG, [TILELANG_STUB]) / TILELANG_STUB
    real = fetch("nvidia-cuda-runtime", CUDA_RUNTIME, [CUDA_LIBRARY]) / CUDA_LIBRARY
    load = {"stub first": [stub, real], "stub last": [real, stub], "stub alone": [stub]}[order]
    program = textwrap.dedent(
        """
        import ctypes, json, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from reap.patches.core import Source
        from reap.patches.proofs import load
        for path in sys.argv[4:]:
            ctypes.CDLL(path)
        found = {}
        for name, path in (("published", sys.argv[2]), ("patched", sys.argv[3])):
            find = load(Source(Path(path).read_bytes()), "find_loaded_library", {"open": open})
            try:
                found[name] = find("libcudart")
            except AssertionError as error:
                found[name] = f"AssertionError: {error}"
        print(json.dumps(found))
        """
    )
    patched = unpatched / "patched.py"
    patched.write_bytes(patches.plan([patch], unpatched).files[patch.path])
    module_utils = Path(__file__).resolve().parents[3] / "plugins" / "module_utils"
    words = [str(module_utils), str(unpatched / patch.path), str(patched), *map(str, load)]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["patched"] == (None if order == "stub alone" else str(real))
    if order == "stub alone":
        assert found["published"] is not None  # the defect: the stub is taken for the library
