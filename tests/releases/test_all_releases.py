"""Every published release in the range: `pytest tests/releases` (a few minutes, about 30 MB the first time)."""

from __future__ import annotations

from pathlib import Path

import pytest

from reap import patches
from tests.published.releases import RANGE, all_releases, apply_twice, rows_in_page, table, table_in_page


def test_the_table_in_the_docs_is_what_every_release_needs() -> None:
    wanted = table({project: all_releases(project) for project in RANGE})
    assert table_in_page() == wanted, "run `python3 -m tests.published.releases --write` and read what changed"


@pytest.mark.parametrize("router", patches.ROUTERS)
@pytest.mark.parametrize(("project", "version"), sorted(rows_in_page()))
def test_every_release_is_patched_once(tmp_path: Path, project: str, version: str, router: str) -> None:
    apply_twice(tmp_path, project, version, router)
