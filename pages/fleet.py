"""The page of a fleet: every host's latest verification, and what differs between the hosts.

python3 -m pages.fleet [--artifacts artifacts] [--out artifacts/index.html]
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

from . import write
from .report import SCHEMA, flat, gib, number, slower_by
from .theme import page, text

Report = dict[str, Any]
_STYLES = {"passed": "passed", "passed-slower": "slower", "failed": "failed", "could-not-run": "failed"}
# A form as well as a colour.
_MARKS = {"passed": "✓", "passed-slower": "~", "failed": "✗", "could-not-run": "!"}
# What a row needs. A report of another version is known by its folder alone; nothing else in it is trusted.
_UNKNOWN: Report = {
    "verdict": "of another version", "profile": None, "host": None, "simulated": False, "started_unix": None,
    "stamp": "", "needle_retained": None, "prompt_tokens": None, "ttft_s": None, "prefill_tok_s": None,
    "decode_tok_s": None, "mem_available_min_kb": None, "failures": [], "comparison": [],
}  # fmt: skip
# What should be the same where hosts serve the same profile: heading -> path in the report.
_IDENTITIES = {
    "profile": ("profile",),
    "image": ("identity", "image"),
    "base image": ("identity", "running", "base"),
    "validated base": ("identity", "running", "base_validated"),
    "patch set": ("identity", "running", "patch_set"),
    "model": ("identity", "model", "repo"),
    "model's commit": ("identity", "model", "revision"),
    "model folder": ("identity", "served", "root"),
    "context": ("identity", "served", "max_model_len"),
    "vLLM": ("vllm_version",),
    "driver": ("identity", "host", "driver"),
    "kernel": ("identity", "host", "kernel"),
    "operating system": ("identity", "host", "os"),
    "GPU": ("identity", "host", "gpu"),
    "settings": ("identity", "settings"),
    "reap": ("reap_version",),
}
# So many runs of a host are read and shown.
RUNS = 12
SHOWN_FAILURES = 6
# Of the hosts' table: heading -> whether it holds numbers.
_COLUMNS = {
    "host": False, "verdict": False, "profile": False, "needle, tokens": False, "TTFT, s": True,
    "prefill, tokens/s": True, "decode, tokens/s": True, "least memory": True, "UTC": False, "runs, newest last": False,
}  # fmt: skip


def dig(report: Report, path: tuple[str, ...]) -> Any:
    """The value at a path, or None."""
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def latest_reports(artifacts: Path) -> dict[str, list[tuple[Path, Report]]]:
    """By host, its newest reports with the newest first. Files that are no report are left out.

    A run lies in a folder of its host, as the playbooks leave it; or directly in the given one, as `reap verify --out`
    does, and then the report names the host.
    """
    hosts: dict[str, list[tuple[Path, Report]]] = {}
    by_host = list(artifacts.glob("*/*/report.json"))
    # The name of a run's folder begins with its time.
    for path in sorted([*by_host, *artifacts.glob("*/report.json")], key=lambda path: path.parent.name, reverse=True):
        host = path.parts[-3] if path in by_host else None
        if len(hosts.get(host or "", [])) == RUNS:
            continue
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(report, dict) or not str(report.get("schema", "")).startswith("reap-verification/"):
            continue
        if report["schema"] == SCHEMA:
            report = {**_UNKNOWN, **report}
        else:
            report = {**_UNKNOWN, "host": report.get("host"), "stamp": path.parent.name.partition("-")[0]}
        runs = hosts.setdefault(host or str(report["host"]), [])
        if len(runs) < RUNS:
            runs.append((path, report))
    return dict(sorted(hosts.items()))


def differences(reports: dict[str, Report]) -> list[tuple[str, dict[str, str]]]:
    """What is not the same in all of these reports: (what, value by report's name)."""
    found = []
    for name, path in _IDENTITIES.items():
        parts = {who: dict(flat(dig(report, path))) for who, report in reports.items()}
        for part in sorted({part for found_parts in parts.values() for part in found_parts}):
            shown = {who: text(found_parts.get(part)) for who, found_parts in parts.items()}
            if len(set(shown.values())) > 1:
                found.append((f"{name}: {part}" if part else name, shown))
    return found


def _difference_table(groups: dict[str, dict[str, Report]], head: str) -> str:
    """By group (of hosts of a profile, of runs of a host), what differs in it; empty where nothing does."""
    rows = "".join(
        f"<tr><td>{escape(group)}</td><td>{escape(name)}</td><td>"
        + "<br>".join(f'<span class="muted">{escape(who)}:</span> {value}' for who, value in values.items())
        + "</td></tr>"
        for group, reports in groups.items()
        for name, values in differences(reports)
    )
    heads = f"<tr><th>{head}</th><th>what</th><th>values</th></tr>"
    return f'<div class="panel scroll"><table>{heads}{rows}</table></div>' if rows else ""


def _row(*cells: tuple[str, str]) -> str:
    """A row of the hosts' table from (class, HTML); a phone shows it as a card, with the columns' names in it."""
    return f"<tr>{''.join(_cell(name, *cell) for name, cell in zip(_COLUMNS, cells, strict=True))}</tr>"


def _cell(name: str, style: str, content: str) -> str:
    return f'<td class="{style}" data-name="{name}"><span>{content}</span></td>'


def _link(report: Path, base: Path) -> str:
    return escape(os.path.relpath(report.with_name("report.html").resolve(), base), quote=True)


def render_fleet(hosts: dict[str, list[tuple[Path, Report]]], base: Path) -> str:
    """The page; links are relative to `base`, the folder it will lie in."""
    newest = {host: runs[0][1] for host, runs in hosts.items()}
    count = {state: sum(report["verdict"] == state for report in newest.values()) for state in _STYLES}
    rest = len(newest) - count["passed"] - count["passed-slower"] - count["failed"]
    unverified = f", {rest} could not be verified" if rest else ""
    parts = [
        "<h1>Verified hosts</h1>",
        f'<p class="muted">{len(newest)} hosts: {count["passed"]} passed, {count["passed-slower"]} passed but slower, '
        f"{count['failed']} failed{unverified}. Latest run of each.</p>",
    ]
    rows = []
    for host, runs in hosts.items():
        path, report = runs[0]
        started = report["started_unix"]
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(started)) if started else escape(report["stamp"])
        slower = slower_by(report)
        verdict = escape(report["verdict"]) + (f'<br><span class="muted">{escape(slower)}</span>' if slower else "")
        retained = report["needle_retained"]
        needle = "–" if retained is None else "found" if retained else "lost"
        earlier = " ".join(
            f'<a class="{_STYLES.get(old["verdict"], "other")}" href="{_link(old_path, base)}" '
            f'title="{escape(old["stamp"])} {escape(old["verdict"])}">{_MARKS.get(old["verdict"], "?")}</a>'
            for old_path, old in reversed(runs)
        )
        simulated = ' <span class="muted">(simulated)</span>' if report["simulated"] else ""
        rows.append(
            _row(
                ("", f'<a href="{_link(path, base)}">{escape(host)}</a>{simulated}'),
                (_STYLES.get(report["verdict"], "other"), verdict),
                ("", text(report["profile"])),
                ("", f"{needle} in {report['prompt_tokens']:,}" if report["prompt_tokens"] else needle),
                ("number", number(report["ttft_s"])),
                ("number", number(report["prefill_tok_s"])),
                ("number", number(report["decode_tok_s"])),
                ("number", gib(report["mem_available_min_kb"])),
                ("", when),
                ("", earlier),
            )
        )
    heads = "".join(f"<th{' class=number' if numeric else ''}>{name}</th>" for name, numeric in _COLUMNS.items())
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    parts.append(f'<div class="panel scroll hosts">{table}</div>')
    failed = [(host, report) for host, report in newest.items() if report["failures"]]
    if failed:
        parts.append("<h2>What failed</h2>")
        for host, report in failed:
            lines = report["failures"][:SHOWN_FAILURES]
            if len(report["failures"]) > len(lines):
                lines.append(f"and {len(report['failures']) - len(lines)} more: see the host's page")
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            parts.append(f'<div class="panel"><strong>{escape(host)}</strong><ul class="failed">{items}</ul></div>')
    profiles: dict[str, dict[str, Report]] = {}
    for host, report in newest.items():
        profiles.setdefault(str(report["profile"]), {})[host] = report
    parts.append("<h2>What differs between hosts of one profile</h2>")
    parts.append(
        _difference_table(profiles, "profile") or "<p>Nothing: images, models, versions and drivers are the same.</p>"
    )
    parts.append("<h2>What changed on a host since the run before</h2>")
    before = {
        host: {old["stamp"]: old for old in (runs[1][1], runs[0][1])} for host, runs in hosts.items() if len(runs) > 1
    }
    parts.append(_difference_table(before, "host") or "<p>Nothing.</p>")
    return page("Verified hosts", "\n".join(parts))


def write_index(artifacts: Path) -> Path:
    """Write the page into the folder that has one folder per host; several at once write one after the other.

    Raises:
        OSError: the folder cannot be written.
    """
    out = artifacts / "index.html"
    folder = os.open(artifacts, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        write(out, render_fleet(latest_reports(artifacts), out.resolve().parent).encode())
    finally:
        os.close(folder)
    return out


def main() -> int:
    """Write the page; 2 when there is no report."""
    parser = argparse.ArgumentParser(prog="python3 -m pages.fleet", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder with one folder per host")
    parser.add_argument("--out", type=Path, help="file to write (default: index.html in that folder)")
    args = parser.parse_args()
    out = args.out or args.artifacts / "index.html"
    hosts = latest_reports(args.artifacts)
    if not hosts:
        print(f"no report.json under {args.artifacts}: run playbooks/verify.yml first", file=sys.stderr)
        return 2
    write(out, render_fleet(hosts, out.resolve().parent).encode())
    print(f"{out}: {len(hosts)} hosts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
