"""The pages in docs/ that explain: their code runs, their numbers are those measured, their figures are there."""

import json
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
LSTM = (DOCS / "lstm.md").read_text(encoding="utf-8")
PAGES = [LSTM, (DOCS / "scaling.md").read_text(encoding="utf-8")]
BLOCKS = re.findall(r"^```python\n(.*?)^```", "\n".join(PAGES), re.DOTALL | re.MULTILINE)
QUOTED = re.findall(r"^```python cells.py\n(.*?)^```", LSTM, re.DOTALL | re.MULTILINE)
MADE = [DOCS / "lstm.md", DOCS / "gallery.md"]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_runs(block):
    with jax.enable_x64(False):
        exec(block, {})


def test_the_equations_are_those_of_the_library():
    (quoted,) = QUOTED
    assert quoted in (ROOT / "jaxlstm" / "cells.py").read_text(encoding="utf-8")
    assert len(BLOCKS) >= 5


def test_every_number_is_the_one_that_was_measured():
    numbers = json.loads((FIGURES / "numbers.json").read_text(encoding="utf-8"))
    seen = set()
    for page in MADE:
        for name, value in re.findall(r"<!-- (\w+) -->([^<]*)<!-- -->", page.read_text(encoding="utf-8")):
            assert value == numbers[name], f"{page.name}: {name}"
            seen.add(name)
    assert len(seen) > 15


def test_every_figure_is_there_and_shown():
    shown = set()
    for page in DOCS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (DOCS / link).exists(), f"{page.name}: {link}"
            shown.add((DOCS / link).resolve())
    assert {path.resolve() for path in FIGURES.glob("*.png")} <= shown
