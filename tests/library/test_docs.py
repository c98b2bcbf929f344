"""Tests that the code in docs/ runs, that its numbers are the recorded ones, and that its links and figures exist."""

import ast
import importlib
import inspect
import json
import re
import types
from pathlib import Path

import jax
import pytest

import jaxlstm

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
README = (ROOT / "README.md").read_text(encoding="utf-8")
LSTM = (DOCS / "lstm.md").read_text(encoding="utf-8")
PAGES = [*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *DOCS.glob("api/notes/*.md"), *DOCS.glob("notebooks/*.md")]
# Blocks by page and number; tests/library/test_porting.py runs the ones in porting.md, the site the notebooks.
BLOCK = re.compile(r"^( *)```python *(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
BLOCKS = {
    f"{page.stem}-{n}": (package, inspect.cleandoc(code))
    for page in PAGES
    if page.name != "porting.md"
    for n, (_, package, code) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    if "runs/night" not in code  # a fragment that needs a run
}
LISTED = [  # names in the tables of docs/api
    name
    for page in sorted(DOCS.glob("api/*.md"))
    for block in re.findall(r"autosummary::\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for name in re.findall(r"^   (jaxlstm\S+)$", block, re.MULTILINE)
]
APPLICATION = {"jaxlstm.training"}  # documented by docs/training.md
QUOTATIONS = re.findall(r"^```python cells.py\n(.*?)^```", README + LSTM, re.DOTALL | re.MULTILINE)


def headings(page):
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def public_names(module):
    """Names of ``__all__``; without one, names imported ``as`` themselves and definitions without underscore."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.With):
            names += [alias.asname for n in node.body for alias in n.names if alias.asname]
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and module.__name__.count(".") == 1:  # not the colors of diagnostics.plots
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def public_objects():
    """Every public object by its full name, of the package and its public modules."""
    objects, modules = {}, [jaxlstm]
    modules += [importlib.import_module(f"jaxlstm.{name}") for name in jaxlstm._SUBMODULES]
    for module in modules:
        if module.__name__ in APPLICATION:
            continue
        for name in public_names(module):
            value = getattr(module, name)
            objects[f"{module.__name__}.{name}"] = value
            is_container = isinstance(value, types.ModuleType) and module is not jaxlstm.experimental
            modules += [value] if is_container and value not in modules else []
    return objects


def resolve(name):
    """The object with a full name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_docs_api_lists_every_public_name():
    """A public name needs a line in a table of docs/api; the same object under another name counts."""
    documented = [resolve(name) for name in LISTED]
    modules = {f"jaxlstm.{name}" for name in jaxlstm._SUBMODULES} | {"jaxlstm.flax.linen"}
    missing = [
        name
        for name, value in public_objects().items()
        if name not in LISTED and name not in modules and not any(value is other for other in documented)
    ]
    assert not missing, f"add to a table of docs/api: {missing}"


def test_docs_api_lists_names_once():
    assert len(LISTED) == len(set(LISTED))
    assert len(LISTED) > 50


def test_docs_api_notes_belong_to_listed_names():
    assert {path.stem for path in DOCS.glob("api/notes/*.md")} <= set(LISTED)


def test_docs_navigation_names_existing_pages():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for block in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL):
        for name in re.findall(r"^([\w/]+)$", block, re.MULTILINE):
            assert (DOCS / f"{name}.md").exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_docs_python_block_runs(block):
    package, code = BLOCKS[block]
    if package in ("onnx", "flax"):
        pytest.importorskip(package)
    elif package:
        pytest.skip(f"a quotation of {package}")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, {})


def test_docs_have_python_blocks():
    assert len(BLOCKS) >= 25


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
    for page in [
        *PAGES,
        ROOT / "README.md",
        ROOT / "benchmarks" / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
    ]:
        for link, anchor in re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            target = (page.parent / link if link else page).resolve()
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in headings(target), f"{page.name}: {link}#{anchor}"


def test_docs_show_every_figure():
    shown = set()
    for page in DOCS.glob("*.md"):
        shown |= {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))}
    assert {path.resolve() for path in FIGURES.iterdir() if path.suffix in (".png", ".svg")} <= shown
