"""Every published release in the range: `pytest tests/releases` (a few minutes, about 30 MB the first time)."""

from __future__ import annotations

from tests.published.releases import RANGE, all_releases, table, table_in_page


def test_the_table_in_the_docs_is_what_every_release_needs() -> None:
    wanted = table({project: all_releases(project) for project in RANGE})
    assert table_in_page() == wanted, "run `python3 -m tests.published.releases --write` and read what changed"
