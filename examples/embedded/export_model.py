"""Writes a trained character model as C code.

    python export_model.py RUN_DIR [OUT] [--int8]

The file has the step of the network with its softmax weights as readout, the embedding and the characters of the
vocabulary. `generate.c` includes it.
"""

import argparse
from pathlib import Path

import numpy as np

from jaxlstm.export import to_c
from jaxlstm.training.config import load_config
from jaxlstm.training.data.text import CharVocabulary
from jaxlstm.training.inspect_run import load_character_model


def model_code(run_dir: Path, *, int8: bool = False) -> str:
    """Returns the C code of a run's best parameters.

    Args:
      run_dir: folder of a run of ``--task charlm``.
      int8: whether matrices are 8-bit integers, a quarter of the size.
    """
    characters = CharVocabulary(load_config(run_dir, "RUN_DIR")[1]["vocabulary"]).characters
    model, params, _ = load_character_model(run_dir, characters[0])
    w_out = params.embedding if params.w_out is None else params.w_out
    quantize = "int8" if int8 else None
    network = to_c(model.lstm, params.lstm, name="model", readout=(w_out, params.b_out), quantize=quantize)
    embedding = ",\n".join(
        "{" + ", ".join(f"{x:.9e}f" for x in row) + "}" for row in np.asarray(params.embedding, float)
    )
    strings = ", ".join(c_string(character) for character in characters)
    return f"""{network}
static const float model_embedding[{len(characters)}][MODEL_INPUT_SIZE] = {{
{embedding}
}};
static const char *const model_characters[{len(characters)}] = {{{strings}}}; /* UTF-8 */
"""


def c_string(text: str) -> str:
    """Returns a C string literal of the UTF-8 bytes of a text."""
    return '"' + "".join(f"\\{byte:03o}" for byte in text.encode()) + '"'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes a trained character model as C code.")
    parser.add_argument("run_dir", type=Path, help="folder of a run of train.py")
    parser.add_argument("out", type=Path, nargs="?", default=Path("model.c"), help="file to write")
    parser.add_argument("--int8", action="store_true", help="matrices of 8-bit integers, a quarter of the size")
    arguments = parser.parse_args()
    try:
        arguments.out.write_text(model_code(arguments.run_dir, int8=arguments.int8))
    except ValueError as error:
        parser.error(str(error))
