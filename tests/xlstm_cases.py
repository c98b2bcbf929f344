"""Outputs and gradients of the sLSTM layer of the package xlstm; run this file to record them again.

pip install torch==2.13.0 && pip install --no-deps xlstm==2.0.6 && python tests/xlstm_cases.py
"""

from pathlib import Path
from typing import Any

import numpy as np

RECORDED = Path(__file__).parent / "vectors" / "xlstm.npz"
STEPS, BATCH, HIDDEN = 6, 3, 6
STATES = ("h", "c", "n", "m")  # in the order of the package

CASES: dict[str, dict[str, Any]] = {
    "one head": {"num_heads": 1},
    "heads": {"num_heads": 3},
    "from a state": {"num_heads": 2, "with_state": True},
}


def compute(name: str) -> dict[str, np.ndarray]:
    """Returns weights, inputs, outputs and gradients of the layer's cell, in float64, and the weights for CUDA.

    The gradients are of ``sum(y * dy) + sum(state * dstate)``.
    """
    import torch
    from xlstm import sLSTMLayer, sLSTMLayerConfig
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda

    num_heads, with_state = CASES[name]["num_heads"], CASES[name].get("with_state", False)
    torch.manual_seed(len(name))
    options = {"embedding_dim": HIDDEN, "num_heads": num_heads, "conv1d_kernel_size": 0, "dtype": "float32"}
    layer = sLSTMLayer(sLSTMLayerConfig(backend="vanilla", **options)).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    xs = torch.randn(STEPS, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
    state = torch.zeros(len(STATES), BATCH, HIDDEN, dtype=torch.float64)
    if with_state:
        state = torch.randn_like(state)
        state[2] = state[2].abs() + 0.5  # the normalizer is positive
    state.requires_grad_()
    gates = [gate(xs.swapaxes(0, 1)) for gate in (layer.igate, layer.fgate, layer.zgate, layer.ogate)]
    by_head, new_state = layer.slstm_cell(torch.cat(gates, dim=-1), state=state)  # (B, heads, T, H / heads)
    ys = by_head.permute(2, 0, 1, 3).reshape(STEPS, BATCH, HIDDEN)
    results = {"ys": ys, **dict(zip(STATES, new_state[:, None]))}
    cotangents = {f"d{key}": torch.randn_like(value) for key, value in results.items()}
    sum((value * cotangents[f"d{key}"]).sum() for key, value in results.items()).backward()
    weights = {key: value for key, value in layer.named_parameters() if not key.startswith("group_norm")}
    gradients = {f"grad.{key}": value.grad for key, value in {**weights, "xs": xs}.items()}
    arrays = {**weights, "xs": xs, **results, **cotangents, **gradients}
    if with_state:
        arrays |= {f"{key}0": value for key, value in zip(STATES, state[:, None])}
        arrays |= {f"grad.{key}0": value for key, value in zip(STATES, state.grad[:, None])}
    cuda = sLSTMCell_cuda(sLSTMLayerConfig(backend="cuda", **options), skip_backend_init=True)
    cell = layer.slstm_cell
    arrays["cuda._recurrent_kernel_"] = cuda._recurrent_kernel_ext2int(
        cell._recurrent_kernel_int2ext(cell._recurrent_kernel_)
    )
    arrays["cuda._bias_"] = cuda._bias_ext2int(cell._bias_int2ext(cell._bias_))
    return {key: value.detach().numpy() for key, value in arrays.items()}


if __name__ == "__main__":
    recorded = {f"{name}/{key}": value for name in CASES for key, value in compute(name).items()}
    np.savez_compressed(RECORDED, allow_pickle=False, **recorded)
    print(f"{RECORDED}: {len(recorded)} arrays, {RECORDED.stat().st_size:,} bytes")
