"""Tests that the Python code in README.md runs and that its table of extras is complete."""

import re
import tomllib
from pathlib import Path

import jax

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_python_blocks_print_what_they_say(capsys):
    printed = []
    for block in BLOCKS:
        with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # the defaults of a user
            exec(block, {})
        printed.append(capsys.readouterr().out.splitlines())
    training, shapes = printed
    assert float(training[0]) < 5 * float(re.search(r"print\(value\) .* to (\S+)$", BLOCKS[0], re.MULTILINE)[1])
    assert f"print(ys.shape, last.shape)  # {shapes[0]}" in BLOCKS[1]


def test_readme_table_lists_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = README.partition("| extra | for | packages |")[2].partition("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed == set(project["optional-dependencies"])
