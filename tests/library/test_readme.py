"""Tests that the Python code in README.md runs and that its table of extras is complete."""

import re
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_readme_python_block_runs(block):
    names: dict = {}
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # the defaults of a user
        exec(block, names)
    network = names.get("lstm", names.get("conv"))
    assert names["ys"].shape[-1] == network.hidden_size


def test_readme_has_python_blocks():
    assert len(BLOCKS) >= 2


def test_readme_table_lists_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = README.partition("| extra | for | packages |")[2].partition("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed == set(project["optional-dependencies"])
