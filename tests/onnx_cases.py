"""Outputs of ONNX Runtime for models of `jaxlstm.interop`; run this file to record them again.

pip install -e '.[onnx]' && python tests/onnx_cases.py
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlstm

RECORDED = Path(__file__).parent / "vectors" / "onnx.npz"
STEPS, BATCH, INPUT, HIDDEN = 6, 3, 4, 5
LENGTHS = [6, 4, 1]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "state": {"with_state": True},
    "layers": {"num_layers": 3, "with_lengths": True},
    "no bias": {"use_bias": False, "num_layers": 2},
    "everything": {"num_layers": 2, "bidirectional": True, "with_state": True, "with_lengths": True},
    "peephole": {"cell": "peephole", "num_layers": 2, "bidirectional": True, "with_state": True},
    "cifg": {"cell": "cifg", "num_layers": 2, "bidirectional": True, "with_state": True, "with_lengths": True},
    "gru": {"cell": "gru", "num_layers": 2, "bidirectional": True, "with_state": True, "with_lengths": True},
    "gru no bias": {"cell": "gru", "use_bias": False},
    "rnn": {"cell": "rnn", "num_layers": 2, "bidirectional": True, "with_state": True},
    "rnn relu": {"cell": "rnn", "activation": "relu", "bidirectional": True, "with_lengths": True},
    "rnn sigmoid": {"cell": "rnn", "activation": "sigmoid", "num_layers": 2, "with_state": True},
}


def network(name: str) -> tuple[jaxlstm.LSTM, dict[str, bool]]:
    """Returns the configuration of a case, and the options of `to_onnx` for its inputs."""
    options = dict(CASES[name])
    model_options = {key: options.pop(key, False) for key in ("with_state", "with_lengths")}
    return jaxlstm.LSTM(INPUT, HIDDEN, **options), model_options


def random_params(lstm: jaxlstm.LSTM, rng: np.random.Generator) -> jaxlstm.Params:
    """Returns weights of standard deviation 0.5, biases included, in the dtype of the configuration."""
    return jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(a.dtype), lstm.param_shapes())


def random_model(name: str) -> Any:
    """Returns a model with random weights, including both biases."""
    import onnx

    from jaxlstm.interop import to_onnx

    lstm, model_options = network(name)
    rng = np.random.default_rng(len(name))
    # Other exporters write a nonzero second bias; take it from the bias of another network.
    model, other_model = (to_onnx(lstm, random_params(lstm, rng), **model_options) for _ in range(2))
    for tensor, other_tensor in zip(model.graph.initializer, other_model.graph.initializer):
        if tensor.name.startswith("B."):
            biases = onnx.numpy_helper.to_array(tensor).copy()
            other_biases = onnx.numpy_helper.to_array(other_tensor)
            half = biases.shape[1] // 2
            biases[:, half:] = other_biases[:, :half]
            tensor.CopyFrom(onnx.numpy_helper.from_array(biases, tensor.name))
    return model


def inputs(name: str, steps: int = STEPS, batch: int = BATCH) -> dict[str, np.ndarray]:
    """Returns random inputs of the model of a case."""
    lstm, model_options = network(name)
    rng = np.random.default_rng(1000 + len(name))
    arrays = {"xs": rng.standard_normal((steps, batch, INPUT)).astype(np.float32)}
    if model_options["with_state"]:
        state = lstm.initial_state((batch,))
        for key in ("h", "c") if state.c is not None else ("h",):
            arrays[f"initial_{key}"] = rng.standard_normal(state.h.shape).astype(np.float32)
    if model_options["with_lengths"]:
        arrays["lengths"] = np.resize(np.array(LENGTHS, np.int32), batch).clip(max=steps)
    return arrays


def compute(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the outputs of ONNX Runtime: ``ys``, ``h`` and, for a cell that has it, ``c``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, arrays)))


if __name__ == "__main__":
    import onnx

    recorded = {}
    for name in CASES:
        model, arrays = random_model(name), inputs(name)
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        all_arrays = {**weights, **arrays, **compute(model, arrays)}
        recorded |= {f"{name}/{key}": value for key, value in all_arrays.items()}
    RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED, allow_pickle=False, **recorded)
    print(f"{RECORDED}: {len(recorded)} arrays, {RECORDED.stat().st_size:,} bytes")
