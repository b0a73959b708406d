"""The memory ledger of one host, from the result of memory_fit: picture, table with sources, advice.

Runs on the controller only. Everything shown comes from the result; nothing is computed anew but sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .theme import INK, MUTED, RED, drawing, page, text

GIB = 2**30

# Name -> label and colour: Okabe and Ito's, which stay apart for colour-blind readers and on light and dark ground
# alike.
TERMS = {
    "weights_experts": ("weights, routed experts", "#0072b2"),
    "weights_other": ("weights, everything else", "#56b4e9"),
    "runtime_tables": ("tables made at load", "#8c8c8c"),
    "kv_cache": ("KV cache", "#e69f00"),
    "cuda_graphs": ("CUDA graphs", "#cc79a7"),
    "engine": ("engine and activations", "#d55e00"),
    "host": ("the host itself", "#009e73"),
}
_VERDICTS = {"fits": ("passed", "fits"), "tight": ("slower", "tight"), "refuse": ("failed", "does not fit")}
# The shared style lets long words break anywhere, which a figure must not.
_WHOLE = ' style="white-space:nowrap;padding-right:14px"'
_ROWS = (("low_bytes", "low"), ("bytes", "expected"), ("high_bytes", "high"))


def render_ledger_svg(fit: Mapping[str, Any]) -> str:
    """The ledger as stacked bars (low, expected, high) against MemTotal and the floor.

    Args:
        fit: Result of memory_fit: `Fit.to_dict()`, or what the module returned.

    Returns:
        A ``<figure>`` with the drawing for a desk and for a phone, for a page that has the shared style.

    Raises:
        KeyError, TypeError, ValueError: It is no such result.
    """
    caption = (
        "What the model takes on this host: the least, the expected and the most, in GiB (2^30 bytes)."
        " A bar that reaches the red zone eats into the watchdog's floor."
    )

    def draw(figure: Figure, narrow: bool) -> None:
        _draw(figure, fit, narrow)

    return drawing("ledger", f"Memory ledger. {fit['message']}", caption, draw, height=3.9)


def render_ledger_section(fit: Mapping[str, Any]) -> str:
    """Verdict, picture, table and advice, for a page that holds other things as well."""
    style, word = _VERDICTS.get(str(fit["verdict"]), ("other", str(fit["verdict"])))
    parts = [
        f'<p><span class="verdict {style}">{escape(word)}</span></p>',
        f"<p>{escape(str(fit['message']).removeprefix(str(fit['verdict']) + ': '))}</p>",
        render_ledger_svg(fit),
        _ledger_rows(fit),
        "<h2>KV cache</h2>",
        _kv_rows(fit),
    ]
    advice = [str(line) for line in fit.get("advice") or []]
    if advice:
        items = "".join(f"<li>{escape(line)}</li>" for line in advice)
        parts.append(f'<h2>What would help</h2><div class="panel"><ul>{items}</ul></div>')
    return "\n".join(parts)


def render_ledger_page(host: str, fit: Mapping[str, Any]) -> str:
    """A page of its own for one host; HTML, complete in one file, light and dark.

    Args:
        host: The host's name in the inventory.
        fit: Result of memory_fit.
    """
    subject = f"{fit['profile']} on {host}" if fit.get("profile") else host
    rule = (
        f"Nothing was loaded to find this out. An estimated figure has a range: fits wants the high ones to leave"
        f" {int(fit['margin_bytes']) / GIB:.2f} GiB above the floor, tight wants the expected ones to stay above it."
    )
    body = f'<h1>Memory: {escape(subject)}</h1>\n{render_ledger_section(fit)}\n<p class="muted">{rule}</p>'
    return page(f"Memory: {subject}", body)


def _draw(figure: Figure, fit: Mapping[str, Any], narrow: bool) -> None:
    terms = list(fit["ledger"])
    total, floor = int(fit["mem_total_bytes"]) / GIB, int(fit["floor_bytes"]) / GIB
    limit = total - floor
    right = max(total, sum(int(term["high_bytes"]) for term in terms) / GIB) * 1.02
    axes = figure.add_subplot()
    axes.axvspan(limit, total, color=RED, alpha=0.14, linewidth=0)
    ends = []
    for row, (key, label) in enumerate(reversed(_ROWS)):
        left = 0.0
        for term in terms:
            value = int(term[key]) / GIB
            name = str(term["name"])
            axes.barh(row, value, left=left, height=0.6, color=_colour(name), zorder=2)
            if value > right * (0.12 if narrow else 0.05):
                # Black on the light colours, white on the dark ones.
                ink = "#111111" if name in ("weights_other", "kv_cache", "cuda_graphs", "runtime_tables") else "#ffffff"
                axes.text(left + value / 2, row, f"{value:.1f}", ha="center", va="center", color=ink, zorder=4)
            left += value
        ends.append(f"{label}\n{left:.1f}")
    axes.axvline(limit, color=RED, linewidth=1.5, linestyle=(0, (5, 2)), zorder=3)
    axes.axvline(total, color=INK, linewidth=1.5, zorder=3)
    # One above the other, so that they cannot meet whatever the floor is.
    for height, at, label, colour in (
        (0.0, limit, f"MemTotal - floor: {limit:.1f}", RED),
        (1.25, total, f"MemTotal: {total:.1f}", INK),
    ):
        axes.annotate(
            label,
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 3 + 10 * height),
            textcoords="offset points",
            color=colour,
            ha="right",
        )
    axes.set(xlim=(0, right), ylim=(-0.5, 2.5), xlabel="GiB")
    # The sums stand here and not at the bars' ends, where they would meet the two lines.
    axes.set_yticks(range(3), ends)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    handles = [
        Patch(
            facecolor=_colour(str(term["name"])), label=f"{_label(str(term['name']))}  {int(term['bytes']) / GIB:.2f}"
        )
        for term in terms
    ]
    handles.append(Patch(facecolor=RED, alpha=0.3, label=f"floor of the watchdog  {floor:.2f}"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2 if narrow else 3,
        fontsize=7.5 if narrow else 9,
        title="expected, GiB",
    )


def _ledger_rows(fit: Mapping[str, Any]) -> str:
    rows = []
    for term in fit["ledger"]:
        low, expected, high = (int(term[key]) for key, _ in _ROWS)
        span = [_number(low), _number(high)] if low != high else ["", ""]
        rows.append((_label(str(term["name"])), [_number(expected), *span], text(term["basis"]), text(term["source"])))
    low, expected, high = (sum(int(term[key]) for term in fit["ledger"]) for key, _ in _ROWS)
    rows.append(("sum", [_number(expected), _number(low), _number(high)], "", ""))
    rows.append(("floor of the watchdog", [_number(int(fit["floor_bytes"])), "", ""], "", "set by the profile"))
    rows.append(("MemTotal", [_number(int(fit["mem_total_bytes"])), "", ""], "", ""))
    left = [_number(int(fit[key])) for key in ("headroom_bytes", "headroom_best_bytes", "headroom_worst_bytes")]
    rows.append(("left above the floor", left, "", "MemTotal less floor less sum"))
    body = "".join(
        f"<tr><td{_WHOLE}>{escape(name)}</td>{_numbers(values)}<td{_WHOLE}>{basis}</td>"
        f'<td style="min-width:16em">{source}</td></tr>'
        for name, values, basis, source in rows
    )
    columns = "".join(f'<th class="number">{name}</th>' for name in ("expected", "low", "high"))
    head = f"<tr><th>GiB</th>{columns}<th>basis</th><th>source</th></tr>"
    return f'<div class="panel scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _kv_rows(fit: Mapping[str, Any]) -> str:
    if fit.get("kv_tokens") is None:
        return f'<div class="panel">{text(fit.get("kv_reason"))}</div>'
    rows = [
        ("tokens, as vLLM logs them", f"{int(fit['kv_tokens']):,}"),
        ("sequences of the whole context, as vLLM logs them", f"{float(fit['kv_concurrency']):.2f}"),
        ("tokens, by whole pages", f"{int(fit['kv_page_true_tokens']):,}"),
        ("sequences, by whole pages", f"{float(fit['kv_page_true_concurrency']):.2f}"),
        ("least that admits one sequence", f"{int(fit['kv_min_bytes']) / GIB:.2f} GiB"),
        ("accounting", text(fit["kv_accounting"])),
    ]
    body = "".join(f'<tr><td class="key">{name}</td><td>{value}</td></tr>' for name, value in rows)
    return f'<div class="panel"><table><tbody>{body}</tbody></table></div>'


def _label(name: str) -> str:
    return TERMS.get(name, (name, ""))[0]


def _colour(name: str) -> str:
    return TERMS.get(name, ("", MUTED))[1]


def _numbers(values: list[str]) -> str:
    return "".join(f'<td class="number"{_WHOLE}>{value}</td>' for value in values)


def _number(value: int) -> str:
    return f"{value / GIB:.2f}"
