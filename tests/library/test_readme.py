"""The code in the README runs."""

import re
from pathlib import Path

import jax
import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent.parent / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python(block):
    names: dict = {}
    with jax.enable_x64(False):
        exec(block, names)
    network = names.get("lstm", names.get("conv"))
    assert names["ys"].shape[-1] == network.hidden_size


def test_there_is_code():
    assert len(BLOCKS) >= 2
