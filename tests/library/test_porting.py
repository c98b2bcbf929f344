"""The code in docs/porting.md runs: ours everywhere, the pairs where the other library is installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxlstm.interop

ROOT = Path(__file__).parent.parent.parent
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "porting.md").read_text(), flags=re.MULTILINE)[1:]
BLOCK = re.compile(r"^```python ?(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)  # the library that a block is for
BY_NAME = {section.split("\n")[0]: BLOCK.findall(section) for section in SECTIONS}
NEEDS = {
    "PyTorch": ("torch", "from_torch"),
    "Keras": ("keras", "from_keras"),
    "Flax nnx": ("flax", "from_flax_nnx"),
    "Flax linen": ("flax", "from_flax_linen"),
    "haiku": ("haiku", "from_haiku"),
}


def pair(name):
    library, function = NEEDS[name]
    there = importlib.util.find_spec(library) is not None and hasattr(jaxlstm.interop, function)
    marks = [pytest.mark.skipif(not there, reason=f"{library} or jaxlstm.interop.{function} is not there")]
    return pytest.param(name, marks=[*marks, pytest.mark.slow])


def test_every_section_has_both_sides_and_ends_with_both():
    assert set(BY_NAME) == set(NEEDS)
    for name, blocks in BY_NAME.items():
        libraries = [library for library, _ in blocks]
        assert libraries[0] == libraries[-1] == NEEDS[name][0]
        assert set(libraries) == {"", NEEDS[name][0]}
        assert NEEDS[name][1] in blocks[-1][1]
        assert "assert_allclose" in blocks[-1][1]


@pytest.mark.parametrize("name", NEEDS)
def test_our_side(name):
    names: dict = {}
    with jax.enable_x64(False):
        for library, code in BY_NAME[name]:
            if not library:
                exec(code, names)
    assert names["ys"].shape[-1] == names["lstm"].num_directions * names["lstm"].hidden_size


@pytest.mark.parametrize("name", [pair(name) for name in NEEDS])
def test_both_sides(name):
    """In a process of its own: Keras reads its backend from the environment, and strictness is only for our code."""
    code = "\n".join(code for _, code in BY_NAME[name])
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
