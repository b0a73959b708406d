"""The releases that the patches are checked against, and the table of what each needs.

python3 -m tests.published.releases          # print the table
python3 -m tests.published.releases --write  # put it into docs/patches.md
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins" / "module_utils"))

from reap import patches
from tests.published import REPOSITORY, fetch, wheel_urls

PAGE = REPOSITORY / "docs" / "patches.md"
BEGIN, END = "<!-- table of releases: begin -->", "<!-- table of releases: end -->"
LOADER = "vllm/model_executor/model_loader/utils.py"
PROJECTS = {"vllm": "vllm", "flashinfer": "flashinfer-python"}

# Checked by every run of the tests: nearest to the validated image, where a state changes, the newest.
USUAL = {
    "vllm": ("0.22.0", "0.24.0", "0.27.0", "0.28.0", "0.32.0", "0.33.0"),
    "flashinfer-python": ("0.6.11.post2", "0.6.14", "0.7.1"),
}
# Oldest and newest release of the longer run; releases in between that are no candidates are taken from the index.
RANGE = {"vllm": ("0.20.0", "0.33.0"), "flashinfer-python": ("0.6.8.post1", "0.7.2.post1")}


def version_key(version: str) -> tuple[int, ...]:
    """Order of versions without pre-releases: 0.6.8 < 0.6.8.post1 < 0.6.11."""
    main, _, post = version.partition(".post")
    numbers = tuple(int(part) for part in main.split("."))
    return (*numbers, *([0] * (4 - len(numbers))), int(post or -1))


def all_releases(project: str) -> list[str]:
    """Every final release between the two of `RANGE`, oldest first, as the package index lists them."""
    low, high = (version_key(version) for version in RANGE[project])
    found = [version for version in wheel_urls(project) if re.fullmatch(r"\d+(\.\d+)+(\.post\d+)?", version)]
    return sorted((one for one in found if low <= version_key(one) <= high), key=version_key)


def files_of(project: str) -> list[str]:
    """What the patches read of a project."""
    paths = [patch.path for patch in patches.PATCHES if PROJECTS[patch.package] == project]
    return [*paths, LOADER] if project == "vllm" else paths


def site_packages(folder: Path, project: str, version: str) -> Path:
    """A copy of the published files that may be changed."""
    shutil.copytree(
        fetch(project, version, files_of(project)), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".absent")
    )
    return folder


def states(project: str, version: str) -> dict[str, str]:
    """State of each patch of a project's files in one release."""
    folder = fetch(project, version, files_of(project))
    own = [patch for patch in patches.PATCHES if PROJECTS[patch.package] == project]
    return {verdict.id: verdict.state for verdict in patches.plan(own, folder).verdicts}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def apply_twice(folder: Path, project: str, version: str, router: str) -> None:
    """Patch one release in a folder of its own: what the report says changes, and nothing at a second run.

    Raises:
        AssertionError: it is otherwise.
    """
    own = [patch for patch in patches.PATCHES if PROJECTS[patch.package] == project]
    site_packages(folder, project, version)
    before = contents(folder)
    first = patches.plan(own, folder, router)
    assert first.ok, first.verdicts
    wanted = rows_in_page()[project, version]
    assert {verdict.id: verdict.state for verdict in first.verdicts} == wanted
    assert {verdict.id for verdict in first.verdicts if verdict.changed} == {
        name for name, state in wanted.items() if state == "applied"
    }
    patches.write(folder, first.files)
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == set(first.files)
    for name in first.files:
        compile(after[name], name, "exec")

    second = patches.plan(own, folder, router)
    assert second.files == {}
    assert [verdict.state for verdict in second.verdicts] == [verdict.state for verdict in first.verdicts]
    assert not any(verdict.changed for verdict in second.verdicts)
    patches.write(folder, second.files)
    assert contents(folder) == after


def table(releases: dict[str, list[str]]) -> str:
    """The table as markdown: one part per project, one row per release."""
    parts = []
    for project, versions in releases.items():
        names = [patch.id for patch in patches.PATCHES if PROJECTS[patch.package] == project]
        rows = [f"| {project} | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for version in versions:
            found = states(project, version)
            rows.append(f"| {version} | {' | '.join(found[name] for name in names)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def table_in_page() -> str:
    """What docs/patches.md has."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def rows_in_page() -> dict[tuple[str, str], dict[str, str]]:
    """The page's table as data: (project, version) -> {patch: state}."""
    rows, project, names = {}, "", []
    for line in table_in_page().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in RANGE:
            project, names = cells[0], cells[1:]
        elif re.match(r"\d", cells[0]):
            rows[project, cells[0]] = dict(zip(names, cells[1:], strict=True))
    return rows


def main() -> int:
    """Print or write the table of all releases."""
    text = table({project: all_releases(project) for project in RANGE})
    if "--write" in sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        head, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
