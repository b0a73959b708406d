"""The pages in a real browser: nothing is fetched, nothing is logged, nothing overflows, both themes are readable.

Needs a Chromium or Chrome on the path (`make test` installs the distribution's): `.venv/bin/pytest tests/browser`.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pages.fleet import latest_reports, render_fleet
from pages.report import render_report
from reap.verify import Settings, verify
from tests.support import lying_servers as doubles

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser here: install the package chromium")

PAGES = {"passed": "good/*/report.html", "failed": "bad/*/report.html", "fleet": "index.html"}
# A headless browser's window cannot be narrower than 500 pixels. A frame can, and media queries ask the frame.
WIDTHS = {"desk": 1200, "phone": 390}

# What each page is like once it is laid out, as the title of the page that holds them all.
PROBE = """<script>
const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const numbers = c => c.match(/[\\d.]+/g).map(Number);
const luminance = c => { const p = numbers(c).map(v => linear(v / 255));
  return .2126 * p[0] + .7152 * p[1] + .0722 * p[2]; };
const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((m, n) => n - m);
  return (x + .05) / (y + .05); };
const look = frame => {
  const { document, performance, innerWidth } = frame.contentWindow;
  const style = e => frame.contentWindow.getComputedStyle(e);
  const all = selector => [...document.querySelectorAll(selector)].filter(e => e.getClientRects().length > 0);
  const ground = e => { for (; e; e = e.parentElement) {
    const c = style(e).backgroundColor; if ((numbers(c)[3] ?? 1) > 0) return c; } };
  const texts = all("svg text");
  return {
    width: innerWidth, page: document.documentElement.scrollWidth,
    background: style(document.body).backgroundColor,
    drawings: all("figure").length, shown: all("figure svg").length,
    words: texts.map(e => e.textContent.trim()),
    smallest: Math.min(...texts.map(e => e.getBoundingClientRect().height)),
    outside: texts.filter(e => { const t = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
      return t.left < s.left - 1 || t.right > s.right + 1; }).map(e => e.textContent.trim()),
    thinnest: Math.min(...all("td").filter(e => e.textContent.trim().length > 3)
      .map(e => e.getBoundingClientRect().width)),
    contrast: Math.min(...all("h1, h2, p, td, th, a, summary span, .muted, .verdict, figcaption")
      .map(e => contrast(style(e).color, ground(e)))),
    resources: performance.getEntriesByType("resource").map(r => r.name),
  };
};
addEventListener("load", () => {
  const views = [...document.querySelectorAll("iframe")].map(frame => [frame.id, look(frame)]);
  document.title = JSON.stringify(Object.fromEntries(views));
});
</script>"""


def look(artifacts: Path, folder: Path, *, dark: bool) -> tuple[dict[str, Any], str]:
    """What the probe saw of every page at every width, and what the browser logged."""
    frames = "".join(
        f'<iframe id="{name}-{device}" width="{width}" height="1400" frameborder="0" '
        f'srcdoc="{html.escape(next(artifacts.glob(pattern)).read_text(encoding="utf-8"))}"></iframe>'
        for name, pattern in PAGES.items()
        for device, width in WIDTHS.items()
    )
    holder = folder / "holder.html"
    icon = '<meta charset="utf-8"><link rel="icon" href="data:,">'
    holder.write_text(f"<!doctype html>{icon}{PROBE}{frames}", encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        # A dead proxy: whatever a page would fetch fails and is logged.
        "--proxy-server=127.0.0.1:9", "--enable-logging=stderr", "--log-level=0",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1300,1400",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom", holder.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert title, done.stdout[:500] + done.stderr[-1000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(title[1])), console


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hosts' evidence: one that passed with every picture, and one that failed."""
    folder = tmp_path_factory.mktemp("artifacts")
    for host, double in (("good", doubles.Honest), ("bad", doubles.AlwaysTheSameCode)):
        with doubles.serving(double) as server:
            report = verify(
                Settings(
                    endpoint=server.url,
                    model=doubles.MODEL,
                    host=host,
                    profile="double",
                    hardware="spark",
                    needle_tokens=1500,
                    tasks=["smoke", "unicode", "ladder", "grid", "needle"],
                    lengths=[600, 1500],
                    depths=[0.0, 0.5, 1.0],
                    floor_kb=1000,
                    fail_below=0.0001,
                    reference={"prompt_tokens": 1500, "ttft_s": 0.1, "prefill_tok_s": 9e3, "decode_tok_s": 200.0},
                )
            )
        run = folder / host / f"{report['stamp']}-double"
        run.mkdir(parents=True)
        (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
        (run / "report.html").write_text(render_report(report), encoding="utf-8")
    (folder / "index.html").write_text(render_fleet(latest_reports(folder), folder), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def seen(
    request: pytest.FixtureRequest, artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[str, Any], str]:
    """One start of the browser for all pages of a theme: whether it is the dark one, what was seen, what was logged."""
    return request.param, *look(artifacts, tmp_path_factory.mktemp("browser"), dark=request.param)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_readable(name: str, width: str, seen: tuple[bool, dict[str, Any], str]) -> None:
    dark, views, _console = seen
    view = views[f"{name}-{width}"]
    assert view["width"] == WIDTHS[width]
    assert view["page"] <= view["width"], "the page is wider than the window"
    assert view["thinnest"] >= 40, "a column is squeezed to a letter or two"
    assert view["contrast"] >= 4.5
    channels = [int(value) for value in re.findall(r"\d+", view["background"])[:3]]
    assert (max(channels) < 80) is dark
    if name != "fleet":
        # One of the two widths of each drawing is shown, with letters that can be read.
        assert view["shown"] == view["drawings"] >= 4
        assert view["smallest"] >= 9
        assert view["outside"] == []
        said = " ".join(view["words"])
        for unit in ("seconds since the start", "GiB", "prompt tokens", "prefill, tokens/s", "depth of the needle"):
            assert unit in said
        for legend in ("MemAvailable", "watchdog's floor", "needle found" if name == "passed" else "needle lost"):
            assert legend in said


def test_nothing_is_fetched_or_logged(seen: tuple[bool, dict[str, Any], str]) -> None:
    _dark, views, console = seen
    assert console == ""
    assert [view["resources"] for view in views.values()] == [[]] * len(views)


def test_a_page_holds_what_it_needs(artifacts: Path) -> None:
    for page in artifacts.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
        assert "<script" not in text
        assert "url(http" not in text


def test_what_a_model_answers_is_shown_and_not_run(artifacts: Path) -> None:
    report = json.loads(next(artifacts.glob("good/*/report.json")).read_text(encoding="utf-8"))
    report["tasks"]["smoke"]["exchanges"][0]["content"] = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    text = render_report(report)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
