"""The memory ledger as a picture and as a page: one file, no script, nothing loaded from elsewhere, dark and light.

Runs on the controller only, so it may use matplotlib. Everything shown comes from the result of memory_fit; nothing is
computed anew but sums.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

GIB = 2**30

# Name -> label and colour. The colours are Okabe and Ito's, which stay apart for colour-blind readers and on dark and
# light ground.
TERMS = {
    "weights_experts": ("weights, routed experts", "#0072b2"),
    "weights_other": ("weights, everything else", "#56b4e9"),
    "runtime_tables": ("tables made at load", "#8c8c8c"),
    "kv_cache": ("KV cache", "#e69f00"),
    "cuda_graphs": ("CUDA graphs", "#cc79a7"),
    "engine": ("engine and activations", "#d55e00"),
    "host": ("the host itself", "#009e73"),
}
_OTHER = "#b8b8b8"
# Colours that matplotlib draws with and that the page's own colours then replace, so that one picture serves dark and
# light.
_INK, _LINE, _FLOOR = "#010203", "#040506", "#c1121f"

_VERDICTS = {"fits": "fits", "tight": "tight", "refuse": "does not fit"}


def render_ledger_svg(fit: Mapping[str, Any]) -> str:
    """The ledger as stacked bars: low, expected and high, against MemTotal and the floor.

    Args:
        fit: Result of memory_fit (`Fit.to_dict()` or what the module returned).

    Returns:
        An ``<svg>`` element to put into an HTML page. Its text takes the page's colour (currentColor), its lines
        ``--line`` where the page sets it.

    Raises:
        KeyError, TypeError, ValueError: It is no such result.
    """
    terms = [
        (str(term["name"]), *(int(term[key]) / GIB for key in ("high_bytes", "bytes", "low_bytes")))
        for term in fit["ledger"]
    ]
    total, floor = int(fit["mem_total_bytes"]) / GIB, int(fit["floor_bytes"]) / GIB
    limit = total - floor
    right = max(total, sum(term[1] for term in terms)) * 1.02
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ledger",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _LINE,
        "xtick.color": _LINE,
        "xtick.labelcolor": _INK,
        "ytick.color": _LINE,
        "ytick.labelcolor": _INK,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(9.6, 4.1))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.09, 0.42, 0.89, 0.46))
        axes.axvspan(limit, total, color=_FLOOR, alpha=0.16, linewidth=0, zorder=0)
        for row in range(3):
            _stack(axes, row, [(name, values[row]) for name, *values in terms], right)
        axes.axvline(limit, color=_FLOOR, linewidth=1.6, linestyle=(0, (5, 2)), zorder=3)
        axes.axvline(total, color=_INK, linewidth=1.6, zorder=3)
        # Above the bars, away from one another: the floor's label ends where its line is, MemTotal's begins or ends at
        # the edge.
        axes.annotate(
            f"MemTotal less floor {limit:.1f}",
            (limit, 2.55),
            ha="right",
            va="bottom",
            xytext=(-3, 2),
            textcoords="offset points",
            color=_FLOOR,
            annotation_clip=False,
        )
        axes.annotate(
            f"MemTotal {total:.1f}",
            (total, 2.55),
            ha="center",
            va="bottom",
            xytext=(0, 15),
            textcoords="offset points",
            annotation_clip=False,
        )
        axes.set(xlim=(0, right), ylim=(-0.5, 2.55), xlabel="GiB (2^30 bytes)")
        axes.set_yticks(range(3), ["high", "expected", "low"])
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        handles = [
            Patch(
                facecolor=TERMS.get(name, (name, _OTHER))[1],
                label=f"{TERMS.get(name, (name, _OTHER))[0]}, {expected:.2f}",
            )
            for name, _, expected, _ in terms
        ]
        handles.append(Patch(facecolor=_FLOOR, alpha=0.3, label=f"floor of the watchdog, {floor:.2f}"))
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=3,
            frameon=False,
            bbox_to_anchor=(0.5, 0.0),
            title="expected, GiB",
        )
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_a_page(text.getvalue(), fit)


def render_ledger_page(host: str, fit: Mapping[str, Any]) -> str:
    """A whole page for one host: verdict, picture, table with sources, KV cache and advice.

    Args:
        host: The host's name in the inventory.
        fit: Result of memory_fit.

    Returns:
        HTML, complete in one file.
    """
    name = html.escape(host)
    verdict = str(fit["verdict"])
    profile = fit.get("profile")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Memory of {name}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Memory of {name}</h1>
{render_ledger_section(fit)}
<p class="small">{"Profile " + html.escape(str(profile)) + ". " if profile else ""}Verdict:
{html.escape(_VERDICTS.get(verdict, verdict))}. Nothing was loaded to find this out. Estimated figures have a range;
<em>fits</em> wants the high ones to leave {_gib(int(fit["margin_bytes"]))} above the floor, <em>tight</em> the expected
ones to stay above it.</p> </main>
</body>
</html>
"""


def render_ledger_section(fit: Mapping[str, Any]) -> str:
    """The body of that page, for a page that holds other things as well; it brings no style of its own."""
    verdict = str(fit["verdict"])
    shown = html.escape(_VERDICTS.get(verdict, verdict))
    return "\n".join(
        [
            f'<p class="verdict {html.escape(verdict, quote=True)}"><strong>{shown}</strong> {html.escape(str(fit["message"]))}</p>',
            f"<figure>{render_ledger_svg(fit)}<figcaption>What the model takes on this host, least, expected and most,"
            " against what the host has."
            " A bar that reaches the red zone reaches the watchdog's floor.</figcaption></figure>",
            _ledger_rows(fit),
            _kv_rows(fit),
            _advice(fit.get("advice") or []),
        ]
    )


def _stack(axes: Any, row: int, parts: Sequence[tuple[str, float]], right: float) -> None:
    left = 0.0
    for name, value in parts:
        colour = TERMS.get(name, (name, _OTHER))[1]
        axes.barh(row, value, left=left, height=0.62, color=colour, edgecolor="none", zorder=2)
        if value > right * 0.045:
            axes.text(
                left + value / 2,
                row,
                f"{value:.1f}",
                ha="center",
                va="center",
                color="#ffffff" if name != "weights_other" else "#101010",
                zorder=4,
            )
        left += value
    axes.text(
        left + right * 0.004, row, f" {left:.1f}", ha="left", va="center", zorder=4, fontweight="bold"
    ) if left < right * 0.93 else None


def _for_a_page(svg: str, fit: Mapping[str, Any]) -> str:
    svg = svg[svg.index("<svg") :]
    label = html.escape(f"Memory ledger: {fit['message']}", quote=True)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"([^>]*?)height="[^"]*"', r"<svg \1\2", svg, count=1)
    svg = re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" style="width:100%;height:auto" ', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace(_INK, "currentColor").replace(_LINE, "var(--line, currentColor)")


def _ledger_rows(fit: Mapping[str, Any]) -> str:
    rows = []
    sums = [0, 0, 0]
    for term in fit["ledger"]:
        figures = [int(term[key]) for key in ("bytes", "low_bytes", "high_bytes")]
        sums = [one + other for one, other in zip(sums, figures, strict=True)]
        label, colour = TERMS.get(str(term["name"]), (str(term["name"]), _OTHER))
        spans = [
            _number(figures[0]),
            *(("", "") if figures[1] == figures[2] else (_number(figures[1]), _number(figures[2]))),
        ]
        rows.append(
            f'<tr><th scope="row"><span class="key" style="background:{colour}"></span>{html.escape(label)}</th>'
            + "".join(f"<td>{span}</td>" for span in spans)
            + f'<td class="text">{html.escape(str(term["basis"]))}</td><td class="text">{html.escape(str(term["source"]))}</td></tr>'
        )
    total, floor = int(fit["mem_total_bytes"]), int(fit["floor_bytes"])
    left = [int(fit[key]) for key in ("headroom_bytes", "headroom_best_bytes", "headroom_worst_bytes")]
    ends = [("sum", sums), ("floor of the watchdog", [floor]), ("MemTotal", [total]), ("left above the floor", left)]
    for label, figures in ends:
        cells = "".join(f"<td>{_number(value)}</td>" for value in figures) + "<td></td>" * (5 - len(figures))
        rows.append(f'<tr class="end"><th scope="row">{label}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{label}</th>' for label in ("GiB", "expected", "low", "high", "basis", "source"))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _kv_rows(fit: Mapping[str, Any]) -> str:
    if fit.get("kv_tokens") is None:
        return f"<p>KV cache: {html.escape(str(fit.get('kv_reason') or 'no accounting'))}</p>"
    rows = [
        ("tokens as vLLM logs them", f"{int(fit['kv_tokens']):,}"),
        ("sequences of the whole context, as vLLM logs them", f"{float(fit['kv_concurrency']):.2f}"),
        ("tokens by whole pages", f"{int(fit['kv_page_true_tokens']):,}"),
        ("sequences by whole pages", f"{float(fit['kv_page_true_concurrency']):.2f}"),
        ("least for one sequence", _gib(int(fit["kv_min_bytes"]))),
    ]
    body = "".join(f'<tr><th scope="row">{label}</th><td>{value}</td></tr>' for label, value in rows)
    return f'<h2>KV cache</h2><table><tbody>{body}</tbody></table><p class="small">Accounting: {html.escape(str(fit["kv_accounting"]))}.</p>'


def _advice(lines: Sequence[Any]) -> str:
    if not lines:
        return ""
    return "<h2>What would help</h2><ul>" + "".join(f"<li>{html.escape(str(line))}</li>" for line in lines) + "</ul>"


def _number(value: int) -> str:
    return f"{value / GIB:.2f}"


def _gib(value: int) -> str:
    return f"{value / GIB:.2f} GiB"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f23; --ground: #ffffff; --line: #9aa4ad; --soft: #f1f4f6; --good: #00734f;
--warn: #8a5a00; --bad: #b00020; } @media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --ground: #14181c;
--line: #6b7680; --soft: #1f252b; --good: #4fd6a5; --warn: #f0b84a;
  --bad: #ff8088; } }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
figure { margin: 1rem 0; color: var(--ink); } figcaption, .small { font-size: .875rem; opacity: .85; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--soft); vertical-align: top; }
tbody th, .text, thead th:first-child, thead th:nth-child(n+5) { text-align: left; font-weight: normal; }
.text { font-size: .875rem; } tr.end th, tr.end td { border-bottom: 0; background: var(--soft); }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px; }
.verdict { padding: .75rem 1rem; border-left: .4rem solid var(--line); background: var(--soft); }
.verdict strong { margin-right: .5rem; }
.verdict.fits { border-color: var(--good); } .verdict.fits strong { color: var(--good); }
.verdict.tight { border-color: var(--warn); } .verdict.tight strong { color: var(--warn); }
.verdict.refuse { border-color: var(--bad); } .verdict.refuse strong { color: var(--bad); }
"""
