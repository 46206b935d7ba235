"""A real browser without a network: what a person sees of a page."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
CONTRAST = 4.5  # WCAG 2.2, level AA, of text

# Text colour against what it stands on: the backgrounds of an element and its ancestors, laid over each other.
CONTRAST_OF = """element => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
  const ground = layers.reverse().reduce((below, above) => over(above, below), [255, 255, 255, 1]);
  const style = getComputedStyle(element);
  const ink = over(parse(element.ownerSVGElement ? style.fill : style.color), ground);
  const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


@contextlib.contextmanager
def new_page(profile: Path) -> Iterator[Page]:
    """A page of a browser of its own. profile: an empty directory."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert program, "pages are tested in a real browser: install chromium (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, args=FLAGS, offline=True
        )
        context.set_default_timeout(60_000)  # a busy machine
        yield context.new_page()
        context.close()


class Browser:
    """One page without a network; what it complains about and what it asks for is kept."""

    def __init__(self, page: Page):
        self.page, self.complaints, self.requests = page, [], []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append("a dialog opened"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))

    def look_at(self, file: Path, scheme: str = "light", width: int = 1366) -> Page:
        """Open a file; every figure is drawn, nothing is complained about, and nothing else is asked for."""
        self.complaints.clear()
        self.requests.clear()
        self.page.emulate_media(color_scheme=scheme)
        self.page.set_viewport_size({"width": width, "height": 800})
        self.page.goto(file.resolve().as_uri())
        self.page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
        assert self.complaints == []
        assert self.requests == [file.resolve().as_uri()]
        return self.page

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def drawn(self) -> dict[str, int]:
        """Figure -> marks of it that have an extent: lines, bars, and heat maps as images."""
        return self.page.evaluate(
            """() => Object.fromEntries([...document.querySelectorAll('.plot')].map(plot => [plot.id,
                 [...plot.querySelectorAll('.js-line, .points path, .bars path, .hm image, .heatmaplayer image')]
                   .filter(mark => { const box = mark.getBoundingClientRect(); return box.width + box.height > 0; })
                   .length]))"""
        )

    def heatmap(self, name: str) -> tuple[list, list, list]:
        """x, y and z of a heat map as drawn; z: [rows][columns], None for an empty cell."""
        return self.page.evaluate(
            """name => { const cells = document.getElementById(name).calcdata[0][0];
                 const rows = [...cells.z].map(row => [...row].map(v => isNaN(v) ? null : v));
                 return [[...cells.x], [...cells.y], rows]; }""",
            name,
        )
