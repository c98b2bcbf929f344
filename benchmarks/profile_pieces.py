"""Time the parts of the fused backend separately, at one shape.

python benchmarks/profile_pieces.py 128 32 128 256
python benchmarks/profile_pieces.py 128 32 128 256 --dtype bfloat16 --json pieces.json
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import report
import tyro
from machine import describe_machine
from peers import Shape, random_inputs
from rich.console import Console
from timing import time_interleaved

import jaxlstm
from jaxlstm.recurrence import gate_derivatives
from jaxlstm.recurrence.gates import evaluate_cell
from jaxlstm.recurrence.layout import LayerSizes, choose_layout
from jaxlstm.training.metrics import write_json


@dataclass(frozen=True)
class Options:
    """Time the parts of the fused backend separately, at one shape."""

    steps: Annotated[int, tyro.conf.Positional]
    """T, the number of time steps."""
    batch_size: Annotated[int, tyro.conf.Positional]
    """B, the number of sequences."""
    input_size: Annotated[int, tyro.conf.Positional]
    """I, the input size."""
    hidden_size: Annotated[int, tyro.conf.Positional]
    """H, the number of hidden units."""
    rounds: int = 21
    """Calls of each part, interleaved."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products."""
    unroll: int = 1
    """Steps per iteration of the compiled loop."""
    remat: int | None = None
    """Store the state only every REMAT steps."""
    json: Path | None = None
    """File to write the results to."""


class Piece(NamedTuple):
    """A compiled function with its arguments."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    flops: int = 0  # operations in matrix products, 0 if the function has none

    def execute(self) -> Any:
        """Calls the function and waits for its result."""
        return jax.block_until_ready(self.call(*self.args))


def layer_pieces(options: Options, shape: Shape) -> dict[str, Piece]:
    """Returns the training step of one layer, its forward pass and its backward pass."""
    lstm = jaxlstm.LSTM(
        shape.input_size,
        shape.hidden_size,
        dtype=options.dtype,
        unroll=options.unroll,
        remat=options.remat,
        implementation="fused",
    )
    params, xs = lstm.init(jax.random.key(0)), random_inputs(shape).astype(options.dtype)
    num_weights = 4 * shape.hidden_size * (shape.input_size + shape.hidden_size)
    forward_flops = 2 * num_weights * shape.num_steps * shape.batch_size

    def forward(params: jaxlstm.Params, xs: jax.Array) -> jax.Array:
        return lstm(params, xs)[0]

    def loss(params: jaxlstm.Params, xs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(params, xs).astype(jnp.float32)))

    forward_with_residuals = jax.jit(lambda params, xs: jax.vjp(forward, params, xs))
    ys, vjp_fn = forward_with_residuals(params, xs)
    train_step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return {
        "forward, inference": Piece(jax.jit(forward), (params, xs), forward_flops),
        "forward with residuals": Piece(forward_with_residuals, (params, xs), forward_flops),
        "backward": Piece(jax.jit(lambda vjp_fn, d_ys: vjp_fn(d_ys)), (vjp_fn, 2 * ys), 2 * forward_flops),
        "training step": Piece(train_step, (params, xs), 3 * forward_flops),
    }


def backward_pieces(dtype: str, shape: Shape) -> dict[str, Piece]:
    """Returns the elementwise part and the scan of the backward pass, without the products over a chunk of time.

    All chunks share the gate derivatives and cotangents of one chunk. Arrays have the layout of the fused backend.
    """
    layout = choose_layout(LayerSizes(*shape[1:]), jnp.dtype(dtype), jnp.dtype("float32"))
    chunk_size = min(layout.chunk_size, shape.num_steps)
    num_chunks, gates_size = shape.num_steps // chunk_size, 4 * shape.hidden_size
    keys = iter(jax.random.split(jax.random.key(1), 4))

    def normal(size: int, *leading: int) -> jax.Array:
        return layout.from_batch_major(jax.random.normal(next(keys), (*leading, shape.batch_size, size)))

    z, c = normal(gates_size, num_chunks, chunk_size), normal(shape.hidden_size, num_chunks, chunk_size)
    w_h = jax.random.normal(next(keys), (gates_size, shape.hidden_size)) / shape.hidden_size**0.5
    d_ys = normal(shape.hidden_size, chunk_size)

    def chunk_derivatives(z: jax.Array, c: jax.Array) -> gate_derivatives.GateJacobian:
        return gate_derivatives.gate_jacobian(jaxlstm.cells.LSTM, z, c, None, None, layout.units_axis)

    def all_derivatives(z: jax.Array, c: jax.Array) -> gate_derivatives.GateJacobian:
        """Computes the derivatives chunk by chunk; only the last result is returned, so they are not stored."""
        init = chunk_derivatives(z[0], c[0])
        return jax.lax.scan(lambda _, chunk: (chunk_derivatives(*chunk), None), init, (z[1:], c[1:]))[0]

    def backward_scan(w_h: jax.Array, derivatives: gate_derivatives.GateJacobian, d_ys: jax.Array) -> jax.Array:
        """Returns the gradient of ``z``, summed over chunks."""
        recurrent = layout.prepare_for_vjp(w_h)

        def tangent_step(tangents: Any, inputs_t: Any) -> Any:
            dc, dh = tangents
            derivatives_t, dz = inputs_t
            dz = dz + layout.dot_for_vjp(recurrent, dh)
            dc, dh = gate_derivatives.apply_jacobian(jaxlstm.cells.LSTM, derivatives_t, dz, dc, None, layout.units_axis)
            return (dc, dh), dh

        def tangent_scan(dz: jax.Array) -> jax.Array:
            init = jnp.zeros(c.shape[2:]), jnp.zeros(c.shape[2:])
            scan_chunk = partial(jax.lax.scan, tangent_step, xs=(derivatives, dz))
            return jax.lax.scan(lambda tangents, _: scan_chunk(tangents), init, None, length=num_chunks)[1]

        return jax.linear_transpose(tangent_scan, z[0])(jnp.broadcast_to(d_ys, (num_chunks, *d_ys.shape)))[0]

    derivatives = jax.jit(chunk_derivatives)(z[0], c[0])
    flops = 2 * gates_size * shape.hidden_size * shape.batch_size * num_chunks * chunk_size
    return {
        "partials alone, in chunks": Piece(jax.jit(all_derivatives), (z, c)),
        "backward scan alone, partials at hand": Piece(jax.jit(backward_scan), (w_h, derivatives, d_ys), flops),
    }


def reference_pieces(dtype: str, shape: Shape) -> dict[str, Piece]:
    """Returns the matrix products and the gates of a training step, each by itself: a lower bound of its time."""
    num_steps, batch_size, input_size, hidden_size = shape
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*sizes: int, dtype: str = dtype) -> jax.Array:
        return jax.random.normal(next(keys), sizes).astype(dtype)

    gates_size, joined_size, num_columns = 4 * hidden_size, input_size + hidden_size, num_steps * batch_size
    w_h, h = normal(gates_size, hidden_size) / hidden_size**0.5, normal(hidden_size, batch_size)
    w, xs = normal(gates_size, joined_size) / joined_size**0.5, normal(num_steps, batch_size, input_size)
    d_z, xh = normal(gates_size, num_columns), normal(num_columns, joined_size)
    z = normal(num_steps, 4, hidden_size, batch_size, dtype="float32")
    c = normal(num_steps, hidden_size, batch_size, dtype="float32")

    def scan_h(w: jax.Array, h: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (_product_as_state(w, h), None), h, None, length=num_steps)[0]

    def scan_xh(w: jax.Array, h: jax.Array, xs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, x: (_product_as_state(w, jnp.concatenate([x.T, h])), None), h, xs)[0]

    @jax.jit
    def weight_gradient(d_z: jax.Array, xh: jax.Array) -> jax.Array:
        return jnp.matmul(d_z, xh, preferred_element_type=jnp.float32)

    joined_flops = 2 * gates_size * joined_size * num_columns
    return {
        "scan of W_h h alone": Piece(jax.jit(scan_h), (w_h, h), 2 * gates_size * hidden_size * num_columns),
        "scan of W [x; h] alone": Piece(jax.jit(scan_xh), (w, h, xs), joined_flops),
        "weight gradient alone": Piece(weight_gradient, (d_z, xh), joined_flops),
        "gates alone, all steps at once": Piece(jax.jit(jax.vmap(partial(evaluate_cell, jaxlstm.cells.LSTM))), (z, c)),
    }


def _product_as_state(w: jax.Array, h: jax.Array) -> jax.Array:
    """Reduces the product ``(4H, B)`` to a bounded state ``(H, B)`` that depends on all of it, at little cost."""
    z = jnp.matmul(w, h, preferred_element_type=jnp.float32)
    return jnp.clip(z.reshape(4, -1, z.shape[1]).max(0), -1, 1).astype(h.dtype)


def residual_bytes(forward_with_residuals: Piece) -> int:
    """Returns the size of the residuals, parameters and inputs included."""
    _, vjp_fn = forward_with_residuals.execute()
    return sum(a.nbytes for a in jax.tree.leaves(vjp_fn))


def main(options: Options, console: Console) -> None:
    """Measures all parts, prints a table and writes the results."""
    path = options.json and report.prepare_output(options.json)
    shape = Shape.parse(f"{options.steps},{options.batch_size},{options.input_size},{options.hidden_size}")
    pieces = layer_pieces(options, shape) | backward_pieces(options.dtype, shape)
    pieces |= reference_pieces(options.dtype, shape)
    for piece in pieces.values():
        piece.execute()
    times: dict[str, Any] = time_interleaved({name: piece.execute for name, piece in pieces.items()}, options.rounds)
    train_step_ms = times["training step"]["median_ms"]
    for name, row in times.items():
        flops = pieces[name].flops
        row["gflops"] = round(1e-6 * flops / row["median_ms"], 2) if flops else None
        row["of_training_step"] = round(row["median_ms"] / train_step_ms, 4)
    rows = [
        (n, t["median_ms"], f"{t['q1_ms']:.2f} to {t['q3_ms']:.2f}", t["of_training_step"], t["gflops"])
        for n, t in times.items()
    ]
    title = f"T,B,I,H = {shape}, {options.dtype}, {jax.devices()[0].device_kind}"
    report.print_table(console, title, ("", "median ms", "quartiles ms", "/ training step", "GFLOP/s"), rows)
    num_bytes = residual_bytes(pieces["forward with residuals"])
    arrays = num_bytes / (4 * shape.num_steps * shape.batch_size * shape.hidden_size)
    report.print_line(console, f"residuals: {num_bytes / 2**20:.1f} MiB, {arrays:.2f} arrays of T*B*H float32")
    if path is not None:
        result = {"machine": describe_machine(), "shape": dict(zip("TBIH", shape)), "dtype": options.dtype}
        write_json(path, result | {"pieces": times, "rounds": options.rounds, "residual_bytes": num_bytes})


if __name__ == "__main__":
    report.run_cli(main, Options)
