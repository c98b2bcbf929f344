"""Tests that the code in docs/ runs, that its numbers are the recorded ones, and that its links and figures exist."""

import json
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
README = (ROOT / "README.md").read_text(encoding="utf-8")
LSTM = (DOCS / "lstm.md").read_text(encoding="utf-8")
SCALING = (DOCS / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", LSTM + "\n" + SCALING, re.DOTALL | re.MULTILINE)
QUOTATIONS = re.findall(r"^```python cells.py\n(.*?)^```", README + LSTM, re.DOTALL | re.MULTILINE)


def headings(page):
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("block", BLOCKS)
def test_docs_python_block_runs(block):
    with jax.enable_x64(False):
        exec(block, {})


def test_docs_have_python_blocks():
    assert len(BLOCKS) >= 5


def test_docs_quoted_equations_match_cells():
    assert len(QUOTATIONS) == 3
    for quotation in QUOTATIONS:
        assert quotation in (ROOT / "jaxlstm" / "cells.py").read_text(encoding="utf-8")


def test_docs_numbers_match_recorded_values():
    numbers = json.loads((FIGURES / "numbers.json").read_text(encoding="utf-8"))
    checked = set()
    for page in (DOCS / "lstm.md", DOCS / "gallery.md"):
        for name, value in re.findall(r"<!-- (\w+) -->([^<]*)<!-- -->", page.read_text(encoding="utf-8")):
            assert value == numbers[name], f"{page.name}: {name}"
            checked.add(name)
    assert len(checked) > 15


def test_docs_links_exist():
    for page in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "CHANGELOG.md"]:
        for link, anchor in re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            target = (page.parent / link if link else page).resolve()
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in headings(target), f"{page.name}: {link}#{anchor}"


def test_docs_show_every_figure():
    shown = set()
    for page in DOCS.glob("*.md"):
        shown |= {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))}
    assert {path.resolve() for path in FIGURES.glob("*.png")} <= shown
