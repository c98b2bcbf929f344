"""Outputs and gradients of `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`; run this file to record them again.

pip install torch==2.13.0 && python tests/torch_cases.py
"""

from pathlib import Path
from typing import Any

import numpy as np

RECORDED = Path(__file__).parent / "vectors" / "torch.npz"
STEPS, BATCH, INPUT, HIDDEN = 6, 3, 4, 5
LENGTHS = [6, 4, 1]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 3},
    "no bias": {"bias": False},
    "everything": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    "packed": {"packed": True},
    "packed everything": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "packed": True},
    "rnn": {"nonlinearity": "tanh", "num_layers": 2, "bidirectional": True},
    "rnn relu packed": {"nonlinearity": "relu", "packed": True, "bidirectional": True},
    "gru": {"module": "GRU", "num_layers": 2, "bidirectional": True},
    "gru no bias packed": {"module": "GRU", "bias": False, "packed": True},
}


def compute(name: str) -> dict[str, np.ndarray]:
    """Returns weights, inputs, outputs and gradients of ``sum(y * dy) + sum(h * dh) + sum(c * dc)``, in float64."""
    import torch

    options = dict(CASES[name])
    packed = options.pop("packed", False)
    torch.manual_seed(len(name))
    default_module = "RNN" if "nonlinearity" in options else "LSTM"
    module_class = getattr(torch.nn, options.pop("module", default_module))
    module = module_class(INPUT, HIDDEN, dtype=torch.float64, **options)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    num_cells = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    arrays = {
        "xs": torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64),
        "h0": torch.randn(num_cells, BATCH, options.get("proj_size", HIDDEN), dtype=torch.float64),
    }
    if module_class is torch.nn.LSTM:
        arrays["c0"] = torch.randn(num_cells, BATCH, HIDDEN, dtype=torch.float64)
    for array in arrays.values():
        array.requires_grad_()
    state = (arrays["h0"], arrays["c0"]) if "c0" in arrays else arrays["h0"]
    if packed:
        inputs = torch.nn.utils.rnn.pack_padded_sequence(arrays["xs"], torch.tensor(LENGTHS))
        packed_ys, new_state = module(inputs, state)
        ys, _ = torch.nn.utils.rnn.pad_packed_sequence(packed_ys, total_length=STEPS)
    else:
        ys, new_state = module(arrays["xs"], state)
    results = dict(zip(("ys", "h", "c"), (ys, *new_state) if "c0" in arrays else (ys, new_state)))
    cotangents = {f"d{key}": torch.randn_like(value) for key, value in results.items()}
    sum((value * cotangents[f"d{key}"]).sum() for key, value in results.items()).backward()
    weights = dict(module.named_parameters())
    gradients = {f"grad.{key}": value.grad for key, value in {**arrays, **weights}.items()}
    all_arrays = {**weights, **arrays, **results, **cotangents, **gradients}
    return {key: value.detach().numpy() for key, value in all_arrays.items()}


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    recorded = {f"{name}/{key}": value for name in CASES for key, value in compute(name).items()}
    np.savez_compressed(RECORDED, allow_pickle=False, **recorded)
    print(f"{RECORDED}: {len(recorded)} arrays, {RECORDED.stat().st_size:,} bytes")
