"""The page of one verification, from its report.json.

python3 -m pages.report FOLDER...    draws report.html beside the report.json of each, or of each run in it
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import write
from .theme import AMBER, BLUE, GREEN, GRID, INK, MUTED, RED, SURFACE, VIOLET, drawing, page, text

Report = dict[str, Any]
KIB_PER_GIB = 1024 * 1024
_VERDICTS = {
    "passed": ("passed", "passed"),
    "passed-slower": ("slower", "passed, but slower than published"),
    "failed": ("failed", "failed"),
    "could-not-run": ("failed", "could not be verified"),
}
SCHEMA = "reap-verification/1"
_NAMES = {"ttft_s": "Time to first token", "prefill_tok_s": "Prefill", "decode_tok_s": "Decode"}
_UNITS = {"ttft_s": "s", "prefill_tok_s": "tokens/s", "decode_tok_s": "tokens/s"}


def number(value: float | None, unit: str = "") -> str:
    """Four significant figures, thousands separated."""
    if value is None:
        return "–"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{shown} {unit}".rstrip()


def gib(kib: float | None) -> str:
    """kB as the kernel counts them (1024 bytes), in GiB."""
    return "–" if kib is None else f"{kib / KIB_PER_GIB:.2f} GiB"


def slower_by(report: Report) -> str:
    """The figures that are slower than the published ones, and by how much; empty where none is."""
    slow = [row for row in report["comparison"] if row["state"] in ("slower", "too-slow")]
    return ", ".join(f"{_NAMES[row['name']].lower()} at {row['speed']:.0%}" for row in slow)


def _head(report: Report) -> str:
    style, word = _VERDICTS.get(report["verdict"], ("other", report["verdict"]))
    if report["verdict"] == "passed-slower":
        word = f"{word}: {slower_by(report)}"
    when = time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(report["started_unix"]))
    subject = report["profile"] or report["model"]
    parts = [
        f"<h1>{escape(subject)} on {escape(report['host'])}</h1>",
        f'<p><span class="verdict {style}">{escape(word)}</span></p>',
        f'<p class="muted">{when}, suite {escape(report["suite"])}, {number(report["seconds"])} s, '
        f"vLLM {text(report['vllm_version'])}, served as {escape(report['model'])}</p>",
    ]
    if report["simulated"]:
        said = (
            "Simulated Spark. The figures on this page come from a machine that is no DGX Spark and a model of a few "
            "megabytes. They show that the recipe works, and nothing about a Spark's speed or memory."
            if report["hardware"] == "sim"
            else "Not known to be a DGX Spark. The figures on this page are not compared with those of one."
        )
        parts.append(f'<div class="panel banner">{said}</div>')
    if report["failures"]:
        items = "".join(f"<li>{escape(line)}</li>" for line in report["failures"])
        heading = "Why it could not run" if report["verdict"] == "could-not-run" else "What failed"
        parts.append(f'<h2>{heading}</h2><div class="panel"><ul class="failed">{items}</ul></div>')
    return "\n".join(parts)


def _with_small_unit(value: str) -> str:
    figure, space, unit = value.partition(" ")
    return f"{escape(figure)}{space}<small>{escape(unit)}</small>" if unit else escape(figure)


def _cards(report: Report) -> str:
    cards = []
    for name in ("ttft_s", "prefill_tok_s", "decode_tok_s"):
        spread = report["measurements"].get(name)
        more = ""
        if spread and len(spread["values"]) > 1:
            low, high = number(spread["smallest"]), number(spread["largest"])
            more = f"median of {len(spread['values'])}: {low} to {high}"
        reference = next((row for row in report["comparison"] if row["name"] == name), None)
        if reference:
            more = f"published {number(reference['reference'])}" + (f"; {more}" if more else "")
        cards.append((_NAMES[name], number(report[name], _UNITS[name]), more))
    retained = report["needle_retained"]
    found = "–" if retained is None else "found" if retained else "lost"
    tokens = report["prompt_tokens"]
    cards.append(("Needle", found, "" if tokens is None else f"in {tokens:,} prompt tokens"))
    memory = report["memory"]
    if memory:
        distance = memory["distance_to_floor_kb"]
        side = "above" if (distance or 0) >= 0 else "below"
        more = "" if distance is None else f"{gib(abs(distance))} {side} the floor"
        cards.append(("Least memory available", gib(memory["min_kb"]), more))
    return '<div class="cards">' + "".join(
        f'<div class="card panel"><div class="name">{escape(name)}</div>'
        f'<div class="value">{_with_small_unit(value)}</div>'
        f'<div class="more">{escape(more)}</div></div>'
        for name, value, more in cards
    ) + "</div>"  # fmt: skip


def _comparison(report: Report) -> str:
    rows = report["comparison"]
    if not rows:
        why = report["not_compared"] or "nothing was measured"
        return f"<h2>Against the published figures</h2><p>Not compared: {escape(why)}.</p>"
    colours = {"same": GREEN, "faster": GREEN, "slower": AMBER, "too-slow": RED}
    tolerances = report["tolerances"]

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        names = [_NAMES[row["name"]] for row in rows][::-1]
        if narrow:
            names = [name.replace("Time to first token", "First\ntoken") for name in names]
        speeds = [100 * row["speed"] for row in rows][::-1]
        axes.barh(names, speeds, height=0.55, color=[colours[row["state"]] for row in rows][::-1])
        right = min(max(118.0, *speeds), 250.0) * 1.08
        for index, speed in enumerate(speeds):
            inside = speed > right / 4
            axes.annotate(
                f"{speed:.0f} %", (min(speed, right), index), (-5 if inside else 5, 0), textcoords="offset points",
                va="center", ha="right" if inside else "left", color=SURFACE if inside else INK, fontweight="bold",
            )  # fmt: skip
        axes.axvline(100, color=INK, linewidth=1.2, label="published")
        axes.axvline(100 * tolerances["slower_below"], color=AMBER, linestyle="--", linewidth=1, label="slower below")
        axes.axvline(100 * tolerances["fail_below"], color=RED, linestyle="--", linewidth=1, label="fails below")
        axes.set_xlim(0, right)
        axes.set_xlabel("speed, % of the published figure")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=3)

    table = "".join(
        f'<tr><td>{_NAMES[row["name"]]}</td><td class="number">{number(row["found"], row["unit"])}</td>'
        f'<td class="number">{number(row["reference"], row["unit"])}</td>'
        f'<td class="number">{row["speed"]:.0%}</td></tr>'
        for row in rows
    )
    reference = report["reference"]
    source = ", ".join(str(reference[key]) for key in ("host", "date") if reference.get(key))
    source = f"Published: {source}." if source else ""
    return (
        "<h2>Against the published figures</h2>"
        + drawing("comparison", "Speed against the published figures", source, draw, 2.6)
        + '<div class="panel scroll"><table><tr><th></th><th class="number">here</th><th class="number">published</th>'
        f'<th class="number">speed</th></tr>{table}</table></div>'
    )


def _memory(report: Report) -> str:
    memory = report["memory"]
    if not memory:
        ran = any(task["passed"] is not None for task in report["tasks"].values())
        why = "the endpoint is on another machine" if ran else "nothing ran"
        return f"<h2>Memory</h2><p>Not sampled: {why}.</p>"
    times = [sample[0] for sample in memory["samples"]]
    values = [sample[1] / KIB_PER_GIB for sample in memory["samples"]]
    floor = memory["floor_kb"]
    total = report["seconds"]
    phases = [phase for phase in report["phases"] if phase["end_s"] - phase["start_s"] > 0.04 * max(total, 0.001)]

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        axes.plot(times, values, color=BLUE, linewidth=1.4, label="MemAvailable")
        low = memory["min_kb"] / KIB_PER_GIB
        axes.plot([memory["min_at_s"]], [low], "o", color=VIOLET, markersize=5, label=f"lowest, {low:.2f} GiB")
        if floor is not None:
            axes.axhline(floor / KIB_PER_GIB, color=RED, linewidth=1.2, linestyle="--", label="watchdog's floor")
        axes.set_ylim(0, max(values) * 1.18)
        for index, phase in enumerate(phases):
            if index % 2 == 0:
                axes.axvspan(phase["start_s"], phase["end_s"], color=GRID, alpha=0.35, linewidth=0)
            # As many letters as there is room for, at about 5 points a letter.
            room = (phase["end_s"] - phase["start_s"]) / total * (3.6 if narrow else 8.3) * 72 / 5
            if room > len(phase["name"]):
                middle = (phase["start_s"] + phase["end_s"]) / 2
                axes.text(middle, max(values) * 1.1, phase["name"], ha="center", color=MUTED, fontsize=8.5)
        axes.set_xlabel("seconds since the start")
        axes.set_ylabel("GiB")
        axes.set_xlim(-0.01 * total, 1.01 * max(total, times[-1]))
        figure.legend(loc="outside lower center", ncols=2 if narrow else 3)

    where = f"during {memory['min_phase']}" if memory["min_phase"] else "between two tasks"
    caption = (
        f"MemAvailable, {memory['hertz']:g} times a second, {memory['samples_taken']:,} samples. "
        f"Lowest: {gib(memory['min_kb'])} after {memory['min_at_s']:.1f} s, {where}."
    )
    return "<h2>Memory over time</h2>" + drawing("memory", "Available memory during the run", caption, draw)


def _tokens(report: Report) -> str:
    times = report["token_times"]
    if len(times) < 2:
        return ""
    first = times[0][0]
    moments = [at - first for at, _count in times]
    counts = [count for _at, count in times]

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        axes.step(moments, counts, where="post", color=BLUE, linewidth=1.4, label="events with text")
        axes.plot([0, moments[-1]], [counts[0], counts[-1]], color=MUTED, linestyle=":", label="an even pace")
        axes.set_xlabel("seconds since the first token")
        axes.set_ylabel("events")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2)

    caption = f"The answer to the long prompt, as it came. The first token took {number(first)} s."
    return "<h2>Token by token</h2>" + drawing("tokens", "Arrival of tokens", caption, draw, 2.7)


def _lengths(report: Report) -> str:
    """The ladder's rates, and the grid's heat map, where those tasks ran."""
    parts = []
    tried = (report["tasks"].get("ladder") or {}).get("data", {})
    ladder = tried.get("needles") or []
    steps = [item for item in ladder if item["rates"]]
    if steps:

        def draw_ladder(figure: Figure, narrow: bool) -> None:
            axes = figure.subplots()
            lengths = [item["tokens"] for item in steps]
            axes.plot(lengths, [item["rates"]["prefill_tok_s"] for item in steps], "-", color=BLUE, label="prefill")
            for found, colour, label in ((True, GREEN, "needle found"), (False, RED, "needle lost")):
                some = [item for item in steps if item["found"] is found]
                if some:
                    rates = [item["rates"]["prefill_tok_s"] for item in some]
                    marker = "o" if found else "X"
                    axes.plot([item["tokens"] for item in some], rates, marker, color=colour, label=label)
            axes.set_ylim(0, 1.12 * max(item["rates"]["prefill_tok_s"] for item in steps))
            axes.set_xlabel("prompt tokens")
            axes.set_ylabel("prefill, tokens/s")
            axes.xaxis.set_major_formatter(lambda value, _position: f"{value / 1000:g}k")
            figure.legend(loc="outside lower center", ncols=3)

        caption, stopped = "Found at every length.", tried.get("stopped")
        if stopped:
            caption = (
                f"{'Lost' if stopped['lost'] else 'Found, but ended'} at {stopped['tokens']:,} tokens by "
                f"{stopped['name']}: found {stopped['found']}, wanted {stopped['wanted']}."
            )
        parts.append("<h2>Ladder of lengths</h2>" + drawing("ladder", "Ladder of lengths", caption, draw_ladder, 2.8))
    grid = (report["tasks"].get("grid") or {}).get("data", {}).get("needles") or []
    if grid:
        lengths = sorted({item["wanted_tokens"] for item in grid})
        depths = sorted({item["depth"] for item in grid})

        def draw_grid(figure: Figure, narrow: bool) -> None:
            axes = figure.subplots()
            for item in grid:
                x, y = lengths.index(item["wanted_tokens"]), depths.index(item["depth"])
                colour = GREEN if item["found"] else RED
                axes.barh(y, 1, height=1, left=x - 0.5, color=colour, edgecolor=SURFACE, linewidth=2)
                word = ("✓" if item["found"] else "✗") if narrow else ("found" if item["found"] else "lost")
                axes.text(x, y, word, ha="center", va="center", color=SURFACE, fontweight="bold")
            axes.set_xticks(range(len(lengths)), [f"{length / 1000:.0f}k" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
            axes.set_xlim(-0.5, len(lengths) - 0.5)
            axes.set_ylim(len(depths) - 0.5, -0.5)
            axes.set_xlabel("prompt tokens")
            axes.set_ylabel("depth of the needle")
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set_visible(False)

        good = sum(item["found"] for item in grid)
        found = "All" if good == len(grid) else f"{good} of {len(grid)}"
        caption = f"{found} needles found (✓)"
        caption += "." if good == len(grid) else ", the others lost (✗)."
        # An answer may be right and its reply not: then the colour tells of the needle and this of the rest.
        wrong = sorted({name for item in grid if item["found"] for name in item.get("failed", [])})
        caption += f" Of those found some failed another check: {', '.join(wrong)}." if wrong else ""
        caption += " Depth 0 % is the beginning of the prompt."
        parts.append("<h2>Depth and length</h2>" + drawing("grid", "Heat map of needles", caption, draw_grid, 3.4))
    return "".join(parts)


def _exchange(item: dict[str, Any]) -> str:
    parts = [f'<div class="label">sent</div><pre>{escape(item["sent"])}</pre>']
    if item["reasoning"]:
        parts.append(f'<div class="label">reasoning</div><pre>{escape(item["reasoning"])}</pre>')
    if item["content"]:
        parts.append(f'<div class="label">content</div><pre>{escape(item["content"])}</pre>')
    if item["tool_calls"]:
        calls = json.dumps(item["tool_calls"], ensure_ascii=False, indent=1)
        parts.append(f'<div class="label">tool calls</div><pre>{escape(calls)}</pre>')
    if item["status"] != 200 or item["problems"]:
        body = item["body"] or json.dumps(item["problems"], ensure_ascii=False, indent=1)
        parts.append(f'<div class="label">status {item["status"]}</div><pre>{escape(body)}</pre>')
    usage, timing = item["usage"], item["timing"]
    facts = [f"finish reason {text(item['finish_reason'])}"]
    if usage:
        facts.append(f"{usage['prompt_tokens']:,} prompt and {usage['completion_tokens']:,} completion tokens")
    for key, name in (
        ("first_reasoning_s", "first reasoning token"),
        ("first_content_s", "first content token"),
        ("last_token_s", "last token"),
    ):
        if timing.get(key) is not None:
            facts.append(f"{name} after {number(timing[key])} s")
    return "".join(parts) + f'<div class="label">{"; ".join(facts)}</div>'


def _tasks(report: Report) -> str:
    rows = []
    for name, task in report["tasks"].items():
        if task["passed"]:
            mark, style = "✓", "passed"
        elif task["passed"] is None:
            mark, style = "–", "other"
        else:
            mark, style = "✗", "failed" if task["expected"] else "other"
        checks = "".join(
            f'<tr><td class="{"passed" if c["passed"] else "failed"}">{"✓" if c["passed"] else "✗"} '
            f"{escape(c['name'])}</td><td>{escape(c['found'])}</td><td>{escape(c['wanted'])}</td></tr>"
            for c in task["checks"]
        )
        said = "" if task["expected"] else " (beyond this profile's model)"
        note = f"<p>{escape(task['note'])}</p>" if task["note"] else ""
        exchanges = "".join(_exchange(item) for item in task["exchanges"])
        rows.append(
            f'<details><summary><span class="{style}">{mark}</span><span>{escape(name)}</span>'
            f'<span class="title">{escape(task["title"])}{said}</span>'
            f'<span class="took">{number(task["seconds"])} s</span></summary>'
            f'{note}<div class="scroll"><table><tr><th>check</th><th>found</th><th>wanted</th></tr>'
            f"{checks}</table></div>"
            f"{exchanges}</details>"
        )
    passed = sum(bool(task["passed"]) for task in report["tasks"].values())
    beyond = sum(not task["passed"] and not task["expected"] for task in report["tasks"].values())
    said = f"; {beyond} failed that this profile does not expect of its model" if beyond else ""
    return (
        f"<h2>Tasks</h2><p>{passed} of {len(report['tasks'])} passed{said}. "
        "Open one for what was sent and what came.</p>"
        f'<div class="panel">{"".join(rows)}</div>'
    )


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every single value in nested data, with its path joined by dots."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in flat(item, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        return [(name, json.dumps(value, ensure_ascii=False))]
    return [(name, value)]


def _readable(name: str, value: Any) -> str:
    """A value of the identities: times and sizes as people write them."""
    # What a server says of itself comes under any name.
    if not isinstance(value, int | float):
        return text(value)
    if name.endswith("_unix"):
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value))
    return gib(value) if name.endswith("_kb") else text(value)


def _identity(report: Report) -> str:
    rows = "".join(
        f'<tr><td class="key">{escape(re.sub("_(unix|kb)$", "", name))}</td><td>{_readable(name, value)}</td></tr>'
        for name, value in flat(report["identity"])
        if value is not None and "permission" not in name
    )
    about = {"run": report["run_id"], "subject": report["subject"], "endpoint": report["endpoint"],
             "reap": report["reap_version"]}  # fmt: skip
    rows += "".join(f'<tr><td class="key">{key}</td><td>{text(value)}</td></tr>' for key, value in about.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    heard = f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""
    return f'{heard}<h2>Identities</h2><div class="panel scroll"><table>{rows}</table></div>'


def render_report(report: Report) -> str:
    """The whole page, in one file that works offline."""
    body = "\n".join(
        part(report) for part in (_head, _cards, _comparison, _memory, _tokens, _lengths, _tasks, _identity)
    )
    return page(f"{report['verdict']}: {report['profile'] or report['model']} on {report['host']}", body)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw pages; 2 where there is no report."""
    parser = argparse.ArgumentParser(prog="python3 -m pages.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a run, or of runs")
    for folder in parser.parse_args(argv).folders:
        found = [folder / "report.json"] if (folder / "report.json").is_file() else sorted(folder.glob("*/report.json"))
        if not found:
            print(f"no report.json in {folder}, nor in a folder of it: give the folder of --out", file=sys.stderr)
            return 2
        for path in found:
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
                if report.get("schema") != SCHEMA:
                    raise ValueError(f"its schema is {report.get('schema')!r}, wanted {SCHEMA!r}")
                page_of = render_report(report)
            except (OSError, ValueError, KeyError, AttributeError) as error:
                print(f"{path} is no report that can be drawn: {error}", file=sys.stderr)
                return 2
            write(path.with_name("report.html"), page_of.encode())
            print(path.with_name("report.html"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
