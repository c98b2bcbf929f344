"""Profile the fused recurrence at one configuration, piece by piece.

python benchmarks/profile_pieces.py 128 32 128 256
python benchmarks/profile_pieces.py 128 32 128 256 --dtype bfloat16 --json pieces.json
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import report
import tyro
from measuring import interleaved, machine
from peers import Shape, inputs
from rich.console import Console

import jaxlstm
from jaxlstm.recurrence import gate_derivatives
from jaxlstm.recurrence.layout import Layout
from jaxlstm.training.metrics import write_json


@dataclass(frozen=True)
class Options:
    """Profile the fused recurrence at one configuration, piece by piece."""

    steps: Annotated[int, tyro.conf.Positional]
    """T."""
    rows: Annotated[int, tyro.conf.Positional]
    """B."""
    inputs: Annotated[int, tyro.conf.Positional]
    """I."""
    units: Annotated[int, tyro.conf.Positional]
    """H."""
    rounds: int = 21
    """Times that each piece is called, in turns."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products."""
    unroll: int = 1
    """Steps per iteration of the compiled loop."""
    remat: int | None = None
    """Keep only the state every so many steps."""
    json: Path | None = None
    """Where to write the figures."""


class Piece(NamedTuple):
    """A compiled function and its arguments."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: int = 0  # of its matrix products; 0 where there are none

    def run(self) -> Any:
        """Call it, and wait for the result."""
        return jax.block_until_ready(self.call(*self.arguments))


def layer_pieces(options: Options, shape: Shape) -> dict[str, Piece]:
    """What a training step of the layer consists of, and the whole."""
    lstm = jaxlstm.LSTM(
        shape.inputs,
        shape.units,
        dtype=options.dtype,
        unroll=options.unroll,
        remat=options.remat,
        implementation="fused",
    )
    params, xs = lstm.init(jax.random.key(0)), inputs(shape).astype(options.dtype)
    dense = 2 * 4 * shape.units * (shape.inputs + shape.units) * shape.steps * shape.rows

    def forward(params: jaxlstm.Params, xs: jax.Array) -> jax.Array:
        return lstm(params, xs)[0]

    def loss(params: jaxlstm.Params, xs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(params, xs).astype(jnp.float32)))

    with_residuals = jax.jit(lambda params, xs: jax.vjp(forward, params, xs))
    ys, pull_back = with_residuals(params, xs)
    return {
        "forward, inference": Piece(jax.jit(forward), (params, xs), dense),
        "forward with residuals": Piece(with_residuals, (params, xs), dense),
        "backward": Piece(jax.jit(lambda pull_back, d_ys: pull_back(d_ys)), (pull_back, 2 * ys), 2 * dense),
        "training step": Piece(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), (params, xs), 3 * dense),
    }


def backward_pieces(dtype: str, shape: Shape) -> dict[str, Piece]:
    """The backward pass without its products over time, in chunks; gradients of outputs lie as ``h`` does."""
    layout = Layout.choose(shape.rows, shape.units, jnp.dtype(dtype), jnp.dtype("float32"))
    size = min(layout.chunk, shape.steps)
    chunks, gates = shape.steps // size, 4 * shape.units
    keys = iter(jax.random.split(jax.random.key(1), 4))

    def normal(units: int, *over: int) -> jax.Array:
        return layout.from_batch_major(jax.random.normal(next(keys), (*over, shape.rows, units)))

    z, c = normal(gates, chunks, size), normal(shape.units, chunks, size)
    w_h, d_ys = jax.random.normal(next(keys), (gates, shape.units)) / shape.units**0.5, normal(shape.units, size)

    def found(z: jax.Array, c: jax.Array) -> gate_derivatives.Partials:
        return gate_derivatives.of(jaxlstm.cells.lstm, z, c, 1.0, layout.axis)

    def all_found(z: jax.Array, c: jax.Array) -> gate_derivatives.Partials:
        """Those of the last chunk, each written over the ones before."""
        return jax.lax.scan(lambda _, now: (found(*now), None), found(z[0], c[0]), (z[1:], c[1:]))[0]

    def back(w_h: jax.Array, needed: gate_derivatives.Partials, d_ys: jax.Array) -> jax.Array:
        """The gradient of ``z`` summed over chunks, of which each has the partials and cotangents of the same one."""
        recurrent = layout.prepare_for_transpose(w_h)

        def step(before: Any, now: Any) -> Any:
            p, dz = now
            dc, dh = gate_derivatives.step(
                p, dz + layout.times_in_transpose(recurrent, before[1]), before[0], layout.axis
            )
            return (dc, dh), dh

        def over_time(dz: jax.Array) -> jax.Array:
            begin = jnp.zeros(c.shape[2:]), jnp.zeros(c.shape[2:])
            _, ys = jax.lax.scan(lambda s, _: jax.lax.scan(step, s, (needed, dz)), begin, None, length=chunks)
            return ys

        return jax.linear_transpose(over_time, z[0])(jnp.broadcast_to(d_ys, (chunks, *d_ys.shape)))[0]

    flops = 2 * gates * shape.units * shape.rows * chunks * size
    return {
        "partials alone, in chunks": Piece(jax.jit(all_found), (z, c)),
        "backward scan alone, partials at hand": Piece(jax.jit(back), (w_h, jax.jit(found)(z[0], c[0]), d_ys), flops),
    }


def reference_pieces(dtype: str, shape: Shape) -> dict[str, Piece]:
    """What the same work costs at least: its products and its gates, each alone."""
    steps, rows, features, units = shape
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*sizes: int, dtype: str = dtype) -> jax.Array:
        return jax.random.normal(next(keys), sizes).astype(dtype)

    columns = steps * rows
    w_h, h = normal(4 * units, units) / units**0.5, normal(units, rows)
    wide, xs = normal(4 * units, features + units) / (features + units) ** 0.5, normal(steps, rows, features)
    d_z, x_and_h = normal(4 * units, columns), normal(columns, features + units)
    z, c = normal(steps, 4, units, rows, dtype="float32"), normal(steps, units, rows, dtype="float32")

    def over_h(w: jax.Array, h: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (_narrow(w, h), None), h, None, length=steps)[0]

    def over_x_and_h(w: jax.Array, h: jax.Array, xs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, x: (_narrow(w, jnp.concatenate([x.T, h])), None), h, xs)[0]

    return {
        "scan of W_h h alone": Piece(jax.jit(over_h), (w_h, h), 2 * 4 * units * units * columns),
        "scan of W [x; h] alone": Piece(
            jax.jit(over_x_and_h), (wide, h, xs), 2 * 4 * units * (features + units) * columns
        ),
        "weight gradient alone": Piece(
            jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)),
            (d_z, x_and_h),
            2 * 4 * units * (features + units) * columns,
        ),
        "gates alone, all steps at once": Piece(jax.jit(jax.vmap(jaxlstm.cells.lstm)), (z, c)),
    }


def _narrow(w: jax.Array, h: jax.Array) -> jax.Array:
    """The product ``(4H, B)`` brought to ``(H, B)`` by next to nothing, all of it used, and kept from vanishing."""
    z = jnp.matmul(w, h, preferred_element_type=jnp.float32)
    return jnp.clip(z.reshape(4, -1, z.shape[1]).max(0), -1, 1).astype(h.dtype)


def residual_bytes(piece: Piece) -> int:
    """Bytes that the forward pass leaves to the backward pass, parameters and inputs included."""
    _, pull_back = piece.run()
    return sum(a.nbytes for a in jax.tree.leaves(pull_back))


def main(options: Options, console: Console) -> None:
    """Measure, show, write."""
    path = options.json and report.to_be_written(options.json)
    shape = Shape.parse(f"{options.steps},{options.rows},{options.inputs},{options.units}")
    pieces = layer_pieces(options, shape) | backward_pieces(options.dtype, shape)
    pieces |= reference_pieces(options.dtype, shape)
    for piece in pieces.values():
        piece.run()
    times: dict[str, Any] = interleaved({name: piece.run for name, piece in pieces.items()}, options.rounds)
    whole = times["training step"]["median_ms"]
    for name, row in times.items():
        flops = pieces[name].flops
        row["gflops"] = round(1e-6 * flops / row["median_ms"], 2) if flops else None
        row["of_training_step"] = round(row["median_ms"] / whole, 4)
    rows = [
        (n, t["median_ms"], f"{t['q1_ms']:.2f} to {t['q3_ms']:.2f}", t["of_training_step"], t["gflops"])
        for n, t in times.items()
    ]
    title = f"T,B,I,H = {shape}, {options.dtype}, {jax.devices()[0].device_kind}"
    report.table(console, title, ("", "median ms", "quartiles ms", "/ training step", "GFLOP/s"), rows)
    kept = residual_bytes(pieces["forward with residuals"])
    arrays = kept / (4 * shape.steps * shape.rows * shape.units)
    console.print(f"kept for the backward pass: {kept / 2**20:.1f} MiB, {arrays:.2f} arrays of T*B*H float32")
    if path is not None:
        found = {"machine": machine(), "shape": dict(zip("TBIH", shape)), "dtype": options.dtype, "pieces": times}
        write_json(path, found | {"rounds": options.rounds, "residual_bytes": kept})


if __name__ == "__main__":
    report.obey(main, Options)
