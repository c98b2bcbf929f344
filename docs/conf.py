"""Configuration of the documentation site: ``python -m sphinx -W -b html docs OUT``."""

import ast
import importlib
import inspect
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
# The address of the repository; on GitHub, the one that builds the site. "" if there is none yet.
GITHUB = f"https://github.com/{os.environ['GITHUB_REPOSITORY']}" if "GITHUB_REPOSITORY" in os.environ else ""
REPOSITORY = str(URLS.get("Repository", GITHUB)).rstrip("/")

project = "jaxlstm"
author = "the jaxlstm authors"
project_copyright = author
version = release = importlib.import_module("jaxlstm").__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["api/notes", "figures", "_templates", "**/.ipynb_checkpoints"]
templates_path = ["_templates"]
default_role = "py:obj"  # `LSTM` in a docstring is a link if there is such a page, and code otherwise

# Docstrings
add_module_names = False
autosummary_context = {"notes": [path.stem for path in DOCS.glob("api/notes/*.md")]}
# On a file system that ignores case, `Trace` and `trace` would be one file.
autosummary_filename_map = {"jaxlstm.diagnostics.trace": "jaxlstm.diagnostics.trace-function"}
autosummary_ignore_module_all = False
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_format = "fully-qualified"  # the short form leaves tildes in unions with a Literal
autodoc_typehints_description_target = "documented"
maximum_signature_line_length = 72
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True

# Pages
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 600  # seconds, for a cell on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True

html_theme = "sphinx_book_theme"
html_title = "jaxlstm"
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options: dict[str, Any] = {
    "logo": {"image_light": "_static/logo.svg", "image_dark": "_static/logo.svg", "text": "jaxlstm"},
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": "main",
        "path_to_docs": "docs",
        "use_repository_button": True,
    }


# Docstrings are Markdown in their tables and code, and reStructuredText for Sphinx: the functions below translate.


def translate_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Translates Markdown tables and indented code, and adds the fields of a `NamedTuple` with their comments."""
    if what == "data":
        lines[:] = constant_lines(name)
        return
    lines[:] = translate_code(translate_tables(lines))
    lines[:] = [re.sub(r"^( +\w+: )([A-Z]\.)$", r"\1\\\2", line) for line in lines]  # "H." would start a list
    if what == "class" and hasattr(obj, "_fields"):
        lines += ["", "Attributes:", *field_lines(obj), ""]


def translate_tables(lines: list[str]) -> Iterator[str]:
    """Replaces Markdown tables by list tables."""
    rows: list[list[str]] = []
    for line in [*lines, ""]:
        if line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip("| ").split(" | ")])
            continue
        if rows:
            yield from ["", ".. list-table::", "   :header-rows: 1", ""]
            for row in [rows[0], *rows[2:]]:
                yield from (f"   {'  ' if n else '* '}- {cell}" for n, cell in enumerate(row))
            yield ""
            rows = []
        yield line


def translate_code(lines: Iterator[str]) -> Iterator[str]:
    """Marks an indented block after a paragraph as code, unless it belongs to a section or a directive."""
    paragraph, in_block = "", False
    for line in lines:
        if line and not line.startswith(" "):
            paragraph, in_block = line, False
        is_section = re.fullmatch(r"[A-Z][a-z]+:", paragraph) is not None
        if line.startswith("    ") and not in_block and paragraph:
            in_block = True
            if not (is_section or paragraph.endswith("::") or paragraph.startswith((".. ", "- ", "|", "="))):
                yield from [".. code-block:: python", ""]
        yield line


def field_lines(cls: type) -> Iterator[str]:
    """Yields the entries of an "Attributes" section: each field of a `NamedTuple` with the comment in its source."""
    source = textwrap.dedent(inspect.getsource(cls))
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno is not None:
            comment = source.splitlines()[node.end_lineno - 1].partition("  # ")[2]
            yield f"  {node.target.id} ({ast.unparse(node.annotation)}): {code_shapes(comment)}"


def code_shapes(comment: str) -> str:
    """Typesets shapes such as (T, *batch) as code: an asterisk would start an emphasis."""
    return re.sub(
        r"(\([^()]*\))", lambda match: f"``{match[1]}``" if "," in match[1] or "*" in match[1] else match[1], comment
    )


def constant_lines(name: str) -> list[str]:
    """Returns the comment above a constant, and its definition as code; follows imports to the defining module."""
    module, _, constant = name.rpartition(".")
    source = inspect.getsource(importlib.import_module(module))
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == constant for alias in node.names):
            return constant_lines(f"{node.module}.{constant}")
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == constant and node.end_lineno is not None:
            lines = source.splitlines()
            first = node.lineno - 1
            while lines[first - 1].startswith("# "):
                first -= 1
            comment = [line.removeprefix("# ") for line in lines[first : node.lineno - 1]]
            definition = lines[node.lineno - 1 : node.end_lineno]
            return [*comment, "", ".. code-block:: python", "", *(f"   {line}" for line in definition), ""]
    raise ValueError(f"{name} is not assigned in {module}")


NETWORK_MEMBERS = {  # methods of a network for its users; the others are for backends and subclasses
    *("__call__", "step", "init", "initial_state", "param_shapes", "state_shapes", "check_params", "summary"),
    *("num_parameters", "num_directions", "output_size", "resolved_cell"),
}


def skip_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the properties of a `NamedTuple`, which `field_lines` lists, and methods of networks for backends."""
    if type(obj).__name__ == "_tuplegetter":
        return True
    module = getattr(getattr(obj, "fget", obj), "__module__", "")
    is_network = module in ("jaxlstm.lstm", "jaxlstm.network", "jaxlstm.conv_lstm")
    return True if is_network and what == "class" and name not in NETWORK_MEMBERS else None


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Writes the default ``<class 'jax.numpy.float32'>`` as ``float32``."""
    return (signature and re.sub(r"<class 'jax\.numpy\.(\w+)'>", r"\1", signature), returns)


# Pages

# Files in the root of the repository or in another folder that are pages of the site, too.
MIRRORED = {"benchmarks": "benchmarks/README.md", "changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}


def mirror_file(app: Sphinx, docname: str, content: list[str]) -> None:
    """Replaces a page by the file that it mirrors, with links relative to docs/."""
    if docname in MIRRORED:
        path = ROOT / MIRRORED[docname]
        app.env.note_dependency(str(path))
        folder = os.path.relpath(path.parent, DOCS)
        text = path.read_text(encoding="utf-8")
        content[0] = re.sub(
            r"\]\(((?!https?:|#)[^)#]+)", lambda match: f"]({os.path.normpath(f'{folder}/{match[1]}')}", text
        )


def link_to_colab(app: Sphinx, docname: str, content: list[str]) -> None:
    """Adds a link that opens a notebook in Colab, from the branch that the workflow pages.yml writes."""
    if docname.startswith("notebooks/") and REPOSITORY.startswith("https://github.com/"):
        address = REPOSITORY.replace("https://github.com/", "https://colab.research.google.com/github/")
        link = f"[Open in Colab]({address}/blob/notebooks/{Path(docname).name}.ipynb)"
        content[0] = re.sub(r"^(# .*)$", lambda match: f"{match[1]}\n\n{link}", content[0], count=1, flags=re.MULTILINE)


def list_other_guides(app: Sphinx, docname: str, content: list[str]) -> None:
    """Replaces the line "(other guides)" of the navigation by the pages of docs/ that the navigation does not name."""
    if docname == "index":
        names = (path.stem for path in sorted(DOCS.glob("*.md")) if path.stem != "index")
        others = [name for name in names if not re.search(rf"^{name}$", content[0], re.MULTILINE)]
        content[0] = content[0].replace("(other guides)", "\n".join(others))


def rewrite_links(app: Sphinx, docname: str, content: list[str]) -> None:
    """Replaces links to files outside of docs/, which work on GitHub, by links that work on the site."""
    content[0] = re.sub(r"(?<!!)\[([^\]]*)\]\((?:\.\./)+([^)#]*)(#[^)]*)?\)", site_link, content[0])


def site_link(match: re.Match[str]) -> str:
    """Returns the link to a page; else, as that is no page, to the file if the repository has an address."""
    text, path, anchor = match[1], match[2], match[3] or ""
    if (DOCS / path).is_file():  # one folder up from docs/api or docs/notebooks
        return match[0]
    pages = {file: page for page, file in MIRRORED.items()} | {"README.md": "training" if anchor else "index"}
    if path in pages:
        return f"[{text}]({pages[path]}.md)"
    return f"[{text}]({REPOSITORY}/blob/main/{path}{anchor})" if REPOSITORY else text


def correct_backlinks(app: Sphinx, error: Exception | None) -> None:
    """Corrects links from source code to its pages, for which viewcode takes one prefix per module."""
    backlink = re.compile(r"/((?:[\w-]+\.)*(\w+))\.html#(?:\w+\.)*\2\"")
    for path in Path(app.outdir).glob("_modules/**/*.html"):
        html = path.read_text(encoding="utf-8")
        path.write_text(backlink.sub(r'/\1.html#\1"', html), encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Registers the functions above."""
    app.connect("autodoc-process-docstring", translate_docstring, priority=1)  # before napoleon
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("build-finished", correct_backlinks)
    app.connect("source-read", mirror_file)
    app.connect("source-read", link_to_colab)
    app.connect("source-read", list_other_guides)
    app.connect("source-read", rewrite_links)
