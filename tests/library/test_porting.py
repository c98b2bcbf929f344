"""The code in docs/porting.md runs: this library's blocks always, both sides where the other library is installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent.parent
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "porting.md").read_text(), flags=re.MULTILINE)[1:]
CODE_BLOCK = re.compile(r"^```python ?(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)  # (library or "", code)
CODE_BLOCKS = {section.split("\n")[0]: CODE_BLOCK.findall(section) for section in SECTIONS}
# Section: library that its blocks need, and the conversion of the weights.
LIBRARIES = {
    "PyTorch": ("torch", "from_torch"),
    "Keras": ("keras", "from_keras"),
    "Flax nnx": ("flax", "from_flax_nnx"),
    "Flax linen": ("flax", "from_flax_linen"),
    "Haiku": ("haiku", "from_haiku"),
    "Equinox": ("equinox", "from_equinox"),
}


def test_porting_sections_have_code_of_both_libraries_and_a_comparison():
    assert set(CODE_BLOCKS) == set(LIBRARIES)
    for section, blocks in CODE_BLOCKS.items():
        library, conversion = LIBRARIES[section]
        libraries = [name for name, _ in blocks]
        assert libraries[0] == libraries[-1] == library
        assert set(libraries) == {"", library}
        comparison = blocks[-1][1]
        assert conversion in comparison
        assert "assert_allclose" in comparison


@pytest.mark.slow
@pytest.mark.parametrize("section", LIBRARIES)
def test_porting_code_of_this_library_runs(section):
    names: dict = {}
    with jax.enable_x64(False):
        for library, code in CODE_BLOCKS[section]:
            if not library:
                exec(code, names)
    assert names["ys"].shape[-1] == names["lstm"].num_directions * names["lstm"].hidden_size


@pytest.mark.slow
@pytest.mark.parametrize("section", LIBRARIES)
def test_porting_code_of_both_libraries_agrees(section):
    """Runs in a subprocess, because Keras reads its backend when it is imported and Flax fails strict promotion."""
    library, _ = LIBRARIES[section]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    code = "\n".join(code for _, code in CODE_BLOCKS[section])
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment["PYTHONPATH"] = str(ROOT)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert process.returncode == 0, process.stderr
