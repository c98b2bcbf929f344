"""Imports only go down: the floors of the package, held by walking its syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

from jaxlstm import cells

ROOT = Path(__file__).parent.parent
FLOORS = [  # from the ground up; a module imports from floors below its own
    {"types", "data", "files", "memory", "synthetic", "packing"},
    {"series"},
    {"cells", "initializers", "dropout", "products"},
    {"step", "validation"},
    {"recurrence", "regularisers"},
    {"sequence"},
    {"model", "convolutional"},
    {"interop", "flax", "export"},  # what stands on the model and is not needed by it
    {"__init__", "language_model", "options", "readout", "reporting"},
    {"training", "checkpoints", "devices"},
    {"tasks"},
    {"diagnostics"},
    {"train"},
]
STANDS_ALONE = {"data", "files", "memory", "synthetic", "packing"}


def floor(module):
    return next(level for level, names in enumerate(FLOORS) if module in names)


def imports(path):
    """The modules of the package that a file imports anywhere in it, functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "jaxlstm":
            for alias in node.names:
                path = ROOT / "jaxlstm" / alias.name
                yield alias.name if path.is_dir() or path.with_suffix(".py").exists() else "__init__"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxlstm."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "jaxlstm":
                    yield [*alias.name.split("."), "__init__"][1]


def modules():
    yield "train", ROOT / "train.py"
    for path in sorted((ROOT / "jaxlstm").rglob("*.py")):
        yield path.relative_to(ROOT / "jaxlstm").parts[0].removesuffix(".py"), path


def test_imports_only_go_down():
    seen = 0
    for name, path in modules():
        for imported in imports(path):
            seen += 1
            within = imported == name and (ROOT / "jaxlstm" / name).is_dir()
            assert within or floor(imported) < floor(name), f"{path.name} must not import jaxlstm.{imported}"
            assert name not in STANDS_ALONE
    assert seen > 20


def at_the_top(node):
    """A syntax tree without what runs only when a function is called."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_the_top(child)


def test_no_module_imports_an_optional_or_a_heavy_package_at_the_top():
    """The library itself needs JAX, NumPy and jaxtyping; importing it touches neither optax nor matplotlib."""
    light = {"jax", "jaxlib", "jaxtyping", "numpy", "jaxlstm", *sys.stdlib_module_names}
    seen = set()
    for name, path in modules():
        if (floor(name) > floor("export") and name not in ("__init__", "options", "readout")) or name in STANDS_ALONE:
            continue
        seen.add(name)
        tree = ast.parse(path.read_text())
        # What stands on the model may import a package of its own where it is called; the others nowhere.
        for node in at_the_top(tree) if floor(name) == floor("export") else ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for imported in names:
                    top = imported.split(".")[0]
                    assert top in light or name == top == "flax", f"{path.name}: {imported}"
    assert {"model", "interop", "flax", "export"} <= seen


def test_importing_the_library_imports_no_other_framework():
    code = "import sys, jaxlstm; print(*{'flax', 'optax', 'onnx', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == []


def test_a_gate_function_fits_fifteen_lines():
    """Its docstring, which holds the equations, not counted."""
    gates = {cell.gates.__name__ for cell in (*cells.CELLS.values(), *cells.RNN.values())}
    tree = ast.parse((ROOT / "jaxlstm" / "cells.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in gates]
    assert len(functions) == len(gates) == 6
    for node in functions:
        assert node.body[-1].end_lineno - node.body[1].lineno < 15, node.name
