"""The memory series around a kill, from the watchdog's evidence bundle."""

from __future__ import annotations

from html import escape
from typing import Any

from matplotlib.figure import Figure

from .theme import AMBER, BLUE, INK, MUTED, RED, drawing, page

KIB_PER_GIB = 1024 * 1024
# The whole series says whether it was a leak or a collapse; the last seconds say how the kill went.
_CLOSE_BEFORE_S, _CLOSE_AFTER_S = 2.0, 3.0
_LINES = {"floor": AMBER, "loading_floor": AMBER, "last_line": AMBER, "hard_floor": RED}


def render_series_svg(bundle: dict[str, Any]) -> str:
    """The series twice: whole, and the seconds around the kill.

    Args:
        bundle: bundle.json of reap-watchdog-evidence/1. Readings of -1 kB were unreadable and leave a gap.

    Returns:
        A ``<figure>`` element that follows the page's theme (see pages.theme).

    Raises:
        KeyError: It is no such bundle.
    """
    event = bundle["event"]
    at = float(event["monotonic"])
    series = [(float(when) - at, kb / KIB_PER_GIB if kb >= 0 else float("nan")) for when, kb in bundle["series"]]
    phase = "loading_floor" if event["phase"] == "loading" else "floor"
    values = bundle["lines_kb"]
    # A last line at the floor is the same line.
    between = ["last_line"] if values.get("last_line", 0) < values.get(phase, 0) else []
    lines = [name for name in (phase, *between, "hard_floor") if name in values]
    close = [point for point in series if -_CLOSE_BEFORE_S <= point[0] <= _CLOSE_AFTER_S]

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots(2 if narrow else 1, 1 if narrow else 2, squeeze=False)
        parts = ((series, "the last minutes"), (close, "around the kill"))
        for part, (points, title) in zip(axes.flat, parts, strict=True):
            part.plot([x for x, _ in points], [y for _, y in points], color=BLUE, linewidth=1.3)
            for name in lines:
                value = values[name] / KIB_PER_GIB
                part.axhline(value, color=_LINES[name], linewidth=1.1, linestyle="--")
                part.annotate(
                    name.replace("_", " "), (0.01, value), xycoords=("axes fraction", "data"), fontsize=8, color=MUTED,
                    xytext=(0, 2), textcoords="offset points",
                )  # fmt: skip
            part.axvline(0.0, color=RED, linewidth=0.9)
            part.set_title(title, fontsize=9.5, color=INK)
            part.set_xlabel("seconds from the kill")
            part.set_ylabel("MemAvailable, GiB")

    return drawing("memoryseries", "MemAvailable before and after the kill", str(event["reason"]), draw, 3.2)


def render_series_page(bundle: dict[str, Any]) -> str:
    """One page for one kill: why, the picture, the biggest processes and the last lines that speak of it."""
    event = bundle["event"]
    rows = "".join(
        f"<tr><td>{process['pid']}</td><td>{escape(process['command'])}</td>"
        f"<td>{process['rss_kb'] / KIB_PER_GIB:.2f} GiB</td></tr>"
        for process in bundle["processes_before"] or bundle["processes_after"]
    )
    parts = [
        f"<h1>{escape(event['event'])} in phase {escape(event['phase'])}</h1>",
        f"<p>{escape(event['reason'])}</p>",
        render_series_svg(bundle),
        f'<h2>Biggest processes</h2><div class="panel"><table>{rows}</table></div>',
    ]
    for title, key in (("Kernel", "kernel"), ("Container log", "container_log"), ("Journal of the service", "journal")):
        if bundle[key]:
            text = escape("\n".join(bundle[key][-60:]))
            parts.append(f'<h2>{title}</h2><div class="panel"><pre>{text}</pre></div>')
    return page(f"Watchdog: {event['event']}", "\n".join(parts))
