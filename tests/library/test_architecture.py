"""The structure of the package: import rules checked on the syntax trees of all files."""

import ast
import subprocess
import sys
from pathlib import Path

from jaxlstm import cells

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "jaxlstm"
LEVELS = [  # lowest first; a module imports from its own subpackage and from lower levels
    {"errors"},
    {"params", "packing", "atomic_write", "regular_file", "json_types"},
    {"cells", "primitives", "initializers", "dropout", "checksum"},
    {"validation"},
    {"activation_regularization", "outputs", "recurrence"},
    {"network"},
    {"rnn", "conv_lstm"},
    {"lstm", "residual"},
    {"autotuning"},
    {"interop", "flax", "export", "experimental", "rl"},
    {"diagnostics"},
    {"__init__"},
    {"training"},
]
LIBRARY_PACKAGES = {"jax", "jaxlib", "jaxtyping", "numpy", "jaxlstm", *sys.stdlib_module_names}
SHARED_BY_BACKENDS = {"masking", "context", "step", "chunked_scan"}
RECURRENCE_BACKENDS = {"scan", "fused", "tensor_parallel"}
BACKENDS = [
    *(PACKAGE / "recurrence" / f"{name}.py" for name in sorted(RECURRENCE_BACKENDS)),
    PACKAGE / "experimental" / "associative.py",
    PACKAGE / "experimental" / "cudnn.py",
    PACKAGE / "experimental" / "newton.py",
    *sorted((PACKAGE / "experimental" / "pallas").glob("*.py")),
]
# Modules that belong to one backend alone.
PARTS = {"fused": {"layout", "gate_derivatives", "cpu_activations"}, "newton": {"newton_jacobian"}}
# Modules that import others by name, while the program runs.
IMPORT_BY_NAME = {"__init__", "experimental", "interop.onnx", "recurrence", "recurrence.backends", "training.commands"}


def name_of(path):
    """The dotted name of a module, without the package's name: ``recurrence.scan``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def is_program(path):
    """``__main__`` starts the application and is imported by nothing, so the levels do not apply to it."""
    return path.name == "__main__.py"


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if not is_program(path)]


def parse(path):
    """Returns the syntax tree of a file without the imports that only type checkers see."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


def imports(path):
    """Dotted names of the modules that a file imports anywhere in it, functions included."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                as_file = ROOT / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = as_file.is_dir() or as_file.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own_imports(path):
    """The same for modules of the package, without its name; the package itself is ``__init__``."""
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "jaxlstm":
            yield rest or "__init__"


def level(name):
    return next(n for n, names in enumerate(LEVELS) if name.split(".")[0] in names)


def at_import(node):
    """The nodes of a syntax tree that run when the module is imported."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(child)


def test_imports_only_go_down():
    for path in FILES:
        name = name_of(path)
        for imported in own_imports(path):
            same_package = imported.split(".")[0] == name.split(".")[0] and (PACKAGE / name.split(".")[0]).is_dir()
            assert same_package or level(imported) < level(name), f"jaxlstm.{name} must not import jaxlstm.{imported}"


def test_levels_name_every_module():
    top_level = {name_of(path).split(".")[0] for path in FILES}
    assert top_level == set.union(*LEVELS)
    assert len(FILES) > 50


def test_library_imports_optional_packages_only_where_used():
    """At import the library needs JAX, NumPy and jaxtyping; the modules of `jaxlstm.flax` need Flax as well."""
    for path in FILES:
        name = name_of(path)
        if level(name) >= level("training"):
            continue
        allowed = LIBRARY_PACKAGES | ({"flax"} if name.startswith("flax.") else set())
        for node in at_import(parse(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for imported in names:
                    assert imported.split(".")[0] in allowed, f"jaxlstm.{name} imports {imported} at its top"


def test_experimental_and_training_are_imported_by_nothing_below():
    for path in FILES:
        name = name_of(path)
        for storey in ("experimental", "training"):
            if name.split(".")[0] not in (storey, "training"):
                assert not [i for i in own_imports(path) if i.split(".")[0] == storey], name


PRIVATE = {"processes": ["jax._src.clusters"]}  # no public function gives the settings of a cluster


def test_imports_are_absolute_and_public():
    for path in [*FILES, *PACKAGE.rglob("__main__.py"), ROOT / "train.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno} is relative"
            if "_src" in ".".join(names).split("."):
                module = [name for name in names if "_src" in name]
                assert module == PRIVATE.get(path.stem), f"{path}:{node.lineno} imports a private module of JAX"


def test_modules_are_imported_by_name_in_few_places():
    for path in FILES:
        by_name = {"importlib", "__import__", "exec", "eval"} & {
            node.id for node in ast.walk(parse(path)) if isinstance(node, ast.Name)
        }
        assert not by_name or name_of(path) in IMPORT_BY_NAME, f"{path} uses {by_name}"


def test_backends_are_loaded_by_the_registry_alone():
    """A module of `jaxlstm.recurrence`, a network or an experimental backend imports no backend."""
    for path in FILES:
        name = name_of(path)
        if name.split(".")[0] in ("recurrence", "network", "lstm", "conv_lstm", "experimental"):
            for imported in own_imports(path):
                package, _, module = imported.partition(".")
                is_backend = package == "recurrence" and module in RECURRENCE_BACKENDS
                assert not is_backend, f"{name} imports jaxlstm.{imported}"


def test_primitives_know_nothing_about_recurrent_networks():
    for path in FILES:
        if name_of(path).startswith("primitives."):
            assert {i.split(".")[0] for i in own_imports(path)} <= {"primitives", "errors"}, path


def test_backends_import_no_other_backend():
    """From `jaxlstm.recurrence` a backend takes the shared modules and the parts that are its own."""
    for path in BACKENDS:
        own = PARTS.get(path.stem, set())
        for imported in own_imports(path):
            package, _, module = imported.partition(".")
            message = f"{name_of(path)} imports jaxlstm.{imported}"
            if package == "recurrence":
                assert module in SHARED_BY_BACKENDS | own, message
            if package == "experimental":
                in_pallas = name_of(path).startswith("experimental.pallas")
                assert module.startswith("pallas") if in_pallas else module in own, message


def test_no_private_name_is_read_from_another_module():
    for path in [*FILES, ROOT / "train.py"]:
        for node in private_names_of_others(ast.parse(path.read_text())):
            raise AssertionError(f"{path}:{node.lineno} reads {ast.unparse(node)}")


def private_names_of_others(tree):
    """Imports and attributes with a leading underscore that the file itself does not define."""
    modules = set()  # names that stand for modules of the package in this file
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxlstm"):
            if any(alias.name.startswith("_") and alias.name != "__version__" for alias in node.names):
                yield node
            modules |= {alias.asname or alias.name for alias in node.names}
    own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and is_name(node.target)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            of_module = is_name(node.value) and node.value.id in modules
            if node.attr not in ("_replace", "_asdict", "_fields", "_exit") and (node.attr not in own or of_module):
                yield node


def test_private_names_of_others_are_found():
    tree = ast.parse(
        "from jaxlstm import lstm\nfrom jaxlstm.dropout import _mix\nlstm._run()\nnetwork._cell\nx._replace()"
    )
    found = {ast.unparse(node) for node in private_names_of_others(tree)}
    assert found == {"from jaxlstm.dropout import _mix", "lstm._run", "network._cell"}


def is_name(node):
    return isinstance(node, ast.Name)


def is_self(node):
    return is_name(node) and node.id in ("self", "cls")


def test_import_loads_no_other_framework():
    code = "import sys, jaxlstm; print(*{'flax', 'optax', 'onnx', 'torch', 'tyro', 'rich'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == []


def test_cell_functions_fit_fifteen_lines():
    every_cell = (*cells.CELLS.values(), *cells.RNN.values())
    names = {f.__name__ for cell in every_cell for f in (cell.update, cell.output) if f is not None}
    tree = ast.parse((PACKAGE / "cells.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(functions) == len(names) == 9
    for node in functions:
        assert node.end_lineno - node.lineno < 15, node.name
