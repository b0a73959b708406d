"""The page of a fleet: every host's latest verification, and what differs between the hosts.

python3 -m pages.fleet [--artifacts artifacts] [--out artifacts/index.html]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

from .report import gib, number
from .theme import page, text

Report = dict[str, Any]
_STYLES = {"passed": "passed", "passed-slower": "slower", "failed": "failed"}
# What must be the same where hosts serve the same profile: heading -> path in the report.
_IDENTITIES = {
    "image": ("identity", "image"),
    "base image": ("identity", "base_image"),
    "model folder": ("identity", "served", "root"),
    "context": ("identity", "served", "max_model_len"),
    "vLLM": ("vllm_version",),
    "driver": ("identity", "host", "driver"),
    "kernel": ("identity", "host", "kernel"),
    "operating system": ("identity", "host", "os"),
    "GPU": ("identity", "host", "gpu"),
    "reap": ("reap_version",),
}


def dig(report: Report, path: tuple[str, ...]) -> Any:
    """The value at a path, or None."""
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def latest_reports(artifacts: Path) -> dict[str, list[tuple[Path, Report]]]:
    """By host, its reports with the newest first. Files that are no report are left out."""
    hosts: dict[str, list[tuple[Path, Report]]] = {}
    for path in sorted(artifacts.glob("*/*/report.json"), reverse=True):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict) and str(report.get("schema", "")).startswith("reap-verification/"):
            hosts.setdefault(path.parts[-3], []).append((path, report))
    for runs in hosts.values():
        runs.sort(key=lambda run: run[1]["started_unix"], reverse=True)
    return dict(sorted(hosts.items()))


def differences(reports: dict[str, Report]) -> list[tuple[str, str, dict[str, str]]]:
    """What is not the same on all hosts of a profile: (profile, what, value by host)."""
    found = []
    for profile in sorted({str(report["profile"]) for report in reports.values()}):
        same = {host: report for host, report in reports.items() if str(report["profile"]) == profile}
        for name, path in _IDENTITIES.items():
            values = {host: text(dig(report, path)) for host, report in same.items()}
            if len(set(values.values())) > 1:
                found.append((profile, name, values))
    return found


def render_fleet(hosts: dict[str, list[tuple[Path, Report]]], base: Path) -> str:
    """The page; links are relative to `base`, the folder it will lie in."""
    newest = {host: runs[0][1] for host, runs in hosts.items()}
    count = {state: sum(report["verdict"] == state for report in newest.values()) for state in _STYLES}
    parts = [
        "<h1>Verified hosts</h1>",
        f'<p class="muted">{len(newest)} hosts: {count["passed"]} passed, {count["passed-slower"]} passed but slower, '
        f"{count['failed']} failed. Latest run of each.</p>",
    ]
    rows = []
    for host, runs in hosts.items():
        path, report = runs[0]
        link = escape(os.path.relpath(path.with_name("report.html").resolve(), base), quote=True)
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(report["started_unix"]))
        retained = report["needle_retained"]
        needle = "–" if retained is None else "found" if retained else "lost"
        earlier = "".join(
            f'<span class="{_STYLES.get(old["verdict"], "other")}" title="{old["stamp"]} {old["verdict"]}">●</span>'
            for _path, old in reversed(runs[:12])
        )
        simulated = ' <span class="muted">(simulated)</span>' if report["simulated"] else ""
        rows.append(
            f'<tr><td><a href="{link}">{escape(host)}</a>{simulated}</td>'
            f'<td class="{_STYLES.get(report["verdict"], "other")}">{escape(report["verdict"])}</td>'
            f"<td>{text(report['profile'])}</td><td>{needle}</td>"
            f'<td class="number">{number(report["ttft_s"])}</td>'
            f'<td class="number">{number(report["prefill_tok_s"])}</td>'
            f'<td class="number">{number(report["decode_tok_s"])}</td>'
            f'<td class="number">{gib(report["mem_available_min_kb"])}</td><td>{when}</td><td>{earlier}</td></tr>'
        )
    parts.append(
        '<div class="panel scroll"><table><tr><th>host</th><th>verdict</th><th>profile</th><th>needle</th>'
        '<th class="number">TTFT, s</th><th class="number">prefill, tokens/s</th>'
        '<th class="number">decode, tokens/s</th>'
        '<th class="number">least memory</th><th>UTC</th><th>runs, newest last</th></tr>'
        + "".join(rows)
        + "</table></div>"
    )
    failed = [(host, report) for host, report in newest.items() if report["failures"]]
    if failed:
        parts.append("<h2>What failed</h2>")
        for host, report in failed:
            items = "".join(f"<li>{escape(line)}</li>" for line in report["failures"])
            parts.append(f'<div class="panel"><strong>{escape(host)}</strong><ul class="failed">{items}</ul></div>')
    parts.append("<h2>What differs between hosts of one profile</h2>")
    differing = differences(newest)
    if differing:
        cells = "".join(
            f"<tr><td>{escape(profile)}</td><td>{escape(name)}</td><td>"
            + "<br>".join(f"{escape(host)}: {value}" for host, value in values.items())
            + "</td></tr>"
            for profile, name, values in differing
        )
        heads = "<tr><th>profile</th><th>what</th><th>value by host</th></tr>"
        parts.append(f'<div class="panel scroll"><table>{heads}{cells}</table></div>')
    else:
        parts.append("<p>Nothing: images, models, versions and drivers are the same.</p>")
    return page("Verified hosts", "\n".join(parts))


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
    beside = out.with_name(f".{out.name}.{os.getpid()}.new")
    beside.write_text(render_fleet(hosts, out.resolve().parent), encoding="utf-8")
    beside.replace(out)
    print(f"{out}: {len(hosts)} hosts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
