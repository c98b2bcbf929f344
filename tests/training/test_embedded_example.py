"""The example in examples/embedded: a trained character model that generates text in C."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import ENVIRONMENT, ROOT, SMALL, TEXT, default_jax, run_command

from jaxlstm.training.inspect_run import load_character_model

needs_make = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("make")), reason="no C compiler or make")


def most_probable_text(run, prompt, length):
    """Continues a prompt by the most probable character at each step."""
    model, params, tokens = load_character_model(run, prompt)
    params = jax.tree.map(jnp.asarray, params)
    characters = sorted(set(TEXT))
    state = model.lstm.initial_state(())
    for token in tokens:
        state, logits = model.step(params, state, token)
    text = prompt
    for _ in range(length):
        token = int(jnp.argmax(logits))
        text += characters[token]
        state, logits = model.step(params, state, np.int32(token))
    return text


@pytest.mark.slow
@needs_make
def test_embedded_example_continues_a_prompt_as_the_model_does(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    run_command("--data", "text.txt", "--run-dir", "run", "--max-steps", "60", *SMALL, cwd=tmp_path)
    example = tmp_path / "example"
    shutil.copytree(ROOT / "examples" / "embedded", example, ignore=shutil.ignore_patterns("model.c", "generate"))
    environment = ENVIRONMENT | {"CFLAGS": "-std=c99 -O2 -Wall -Wextra -Werror -pedantic -fsanitize=address,undefined"}
    command = ["make", "-C", example, f"RUN={tmp_path / 'run'}", f"PYTHON={sys.executable}"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

    def generate(*arguments):
        return subprocess.run([example / "generate", *arguments], capture_output=True, text=True, env=os.environ)

    with default_jax():
        expected = most_probable_text(tmp_path / "run", "Привет", 80)
    assert generate("Привет", "80", "0").stdout == expected + "\n"
    drawn = [generate("мир", "40", "1.5", seed).stdout for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    failed = generate("Q")
    assert (failed.returncode, failed.stderr) == (1, 'generate: the model has no character for "Q"\n')
