"""The pages in a real browser: nothing is fetched, nothing is logged, nothing overflows, both themes are readable.

Needs the package chromium (`make test` installs it): `.venv/bin/pytest tests/browser`.
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

# Put into a copy of the page: what it is like once it is laid out, as the title.
PROBE = """<script>
addEventListener("load", () => {
  const shown = e => e.getClientRects().length > 0;
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => { const p = c.match(/[\\d.]+/g).map(v => linear(v / 255));
    return .2126 * p[0] + .7152 * p[1] + .0722 * p[2]; };
  const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((m, n) => n - m);
    return (x + .05) / (y + .05); };
  const texts = [...document.querySelectorAll("svg text")].filter(shown);
  const surface = document.querySelector(".panel") || document.body;
  const back = getComputedStyle(surface).backgroundColor;
  document.title = JSON.stringify({
    width: innerWidth, page: document.documentElement.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor,
    drawings: [...document.querySelectorAll("figure")].length,
    shown: [...document.querySelectorAll("figure svg")].filter(shown).length,
    words: texts.map(e => e.textContent.trim()),
    smallest: Math.min(...texts.map(e => e.getBoundingClientRect().height)),
    contrast: Math.min(...[...document.querySelectorAll("h1, h2, p, td, .muted, .verdict, figcaption")].filter(shown)
      .map(e => contrast(getComputedStyle(e).color, back))),
    resources: performance.getEntriesByType("resource").map(r => r.name),
  });
});
</script>"""


def look(page: Path, folder: Path, width: int, *, dark: bool) -> tuple[dict[str, Any], str]:
    """What the probe saw, and what the browser logged of the page."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        # A dead proxy: whatever the page would fetch fails and is logged.
        "--proxy-server=127.0.0.1:9", "--enable-logging=stderr", "--log-level=0",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1400",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
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
                    ladder=[600, 1500],
                    grid_lengths=[600, 1500],
                    grid_depths=[0.0, 0.5, 1.0],
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


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 500], ids=["desk", "phone"])
@pytest.mark.parametrize("name", ["good/*/report.html", "bad/*/report.html", "index.html"])
def test_a_page_is_readable(name: str, width: int, dark: bool, artifacts: Path, tmp_path: Path) -> None:
    seen, console = look(next(artifacts.glob(name)), tmp_path, width, dark=dark)
    assert console == ""
    assert seen["resources"] == []
    assert seen["page"] <= seen["width"], "the page is wider than the window"
    assert seen["contrast"] >= 4.5
    channels = [int(value) for value in re.findall(r"\d+", seen["background"])[:3]]
    assert (max(channels) < 80) is dark
    if "report" in name:
        # One of the two widths of each drawing is shown, with letters that can be read.
        assert seen["shown"] == seen["drawings"] >= 4
        assert seen["smallest"] >= 9
        said = " ".join(seen["words"])
        for unit in ("seconds since the start", "GiB", "prompt tokens", "prefill, tokens/s", "depth of the needle"):
            assert unit in said
        for legend in ("MemAvailable", "watchdog's floor", "needle found" if "good" in name else "needle lost"):
            assert legend in said


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
