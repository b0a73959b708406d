"""What every page shares: colours of a light and a dark theme, the frame of the page, and drawings that follow both."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Drawings are made once, with these stand-ins; each becomes a CSS variable, so one drawing serves both themes.
INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
BLUE, GREEN, RED, AMBER, VIOLET = "#050505", "#060606", "#070707", "#080808", "#090909"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface",
    BLUE: "--blue", GREEN: "--green", RED: "--red", AMBER: "--amber", VIOLET: "--violet",
}  # fmt: skip

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")

Draw = Callable[[Figure, bool], None]


def _svg(name: str, draw: Draw, width: float, height: float, title: str, *, narrow: bool) -> str:
    settings: Any = {
        "svg.fonttype": "none",
        # Fixed, so that the same report gives the same page; its own for each drawing, so that ids do not meet.
        "svg.hashsalt": f"{name}-{narrow}",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
        "legend.labelcolor": INK,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure, narrow)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    # The size comes from the page; the view box keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def drawing(name: str, title: str, caption: str, draw: Draw, height: float = 3.0) -> str:
    """A figure in two widths, for a desk and for a phone.

    Args:
        name: letters, unique in the page.
        draw: gets the empty figure and whether it is the narrow one.
        height: of the wide drawing, inches at a width of 9.
    """
    wide = _svg(name, draw, 9.0, height, title, narrow=False)
    narrow = _svg(name, draw, 4.3, max(2.7, height), title, narrow=True)
    return (
        f'<figure class="panel"><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def page(title: str, body: str) -> str:
    """One file that needs nothing else: no script, no font, no network."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An empty icon: a browser would ask the network for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """A value as the page shows it; what is not known is a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(str(value))
