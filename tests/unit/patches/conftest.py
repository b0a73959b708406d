"""Published files that a test may change, fetched once into .cache/packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.published.releases import site_packages

# The release nearest to the validated image, with a FlashInfer of its time; every patch applies to them.
VLLM, FLASHINFER = "0.22.0", "0.6.11.post2"


@pytest.fixture
def unpatched(tmp_path: Path) -> Path:
    folder = site_packages(tmp_path / "site-packages", "vllm", VLLM)
    return site_packages(folder, "flashinfer-python", FLASHINFER)
