"""Draws the page of ``jaxlstm explore`` on held-out text: ``python docs/explorer_figure.py RUN``.

RUN is the directory of a run of ``train.py`` on the default text. Needs Playwright, of the extra ``dev``, and Chromium.
Writes figures/explorer.png, the page down to the search, and figures/explorer_training.png, its playback of the run.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from rich.console import Console

from jaxlstm.training.data.text import load_text
from jaxlstm.training.diagnose_cli import Explore

FIGURES = Path(__file__).parent / "figures"
HELD_OUT = 0.93  # of the text; training ends before 0.9
SELECTED = '"list"'  # the first place of this text is selected


def drag_over(page: Page, first: int, last: int) -> None:
    """Selects steps by dragging over the text."""
    boxes = [page.locator(f"#text span[data-step='{step}']").bounding_box() for step in (first, last)]
    (x, y), (to_x, to_y) = ((box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in boxes if box)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(to_x, to_y, steps=5)
    page.mouse.up()


def main(run_dir: Path) -> None:
    """Writes the figures."""
    text = load_text("python-reference")
    text = text[text.index("\n\n", int(HELD_OUT * len(text))) + 2 :]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        source, out = Path(folder) / "held-out.txt", Path(folder) / "page.html"
        source.write_text(text, encoding="utf-8")
        Explore(run_dir, source, out=out).run(Console())
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1100}, color_scheme="light")
        page.goto(out.as_uri())
        page.wait_for_selector("html[data-ready]")
        page.select_option("#order", "property inside quotes")
        page.locator("#text").scroll_into_view_if_needed()
        first = text.index(SELECTED)
        drag_over(page, first, first + len(SELECTED) - 1)
        page.mouse.move(0, 0)
        pictures = {
            "explorer": page.screenshot(clip={"x": 0, "y": 0, "width": 1200, "height": 1500}, full_page=True),
            "explorer_training": page.locator("#training").screenshot(),
        }
        browser.close()
    for name, picture in pictures.items():
        Image.open(io.BytesIO(picture)).quantize(128).save(FIGURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
