"""Writes the notebooks as .ipynb files that install the package first: ``python docs/colab.py OUT REPOSITORY``.

The workflow pages.yml pushes them to the branch from which the "Open in Colab" links of the site read.
"""

import sys
from pathlib import Path

import jupytext
from nbformat.v4 import new_code_cell

NOTEBOOKS = Path(__file__).parent / "notebooks"


def main(out: str, repository: str) -> None:
    """Writes one .ipynb file per notebook."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for path in sorted(NOTEBOOKS.glob("*.md")):
        notebook = jupytext.read(path)
        notebook.cells.insert(0, new_code_cell(f'%pip install -q "jaxlstm[train] @ git+{repository}"'))
        jupytext.write(notebook, Path(out) / f"{path.stem}.ipynb")


if __name__ == "__main__":
    main(*sys.argv[1:])
