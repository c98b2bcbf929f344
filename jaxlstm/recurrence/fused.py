r"""The same recurrence, arranged for speed: both directions in one scan, and a derivative of its own.

The tangent rule, for one direction (`jaxlstm.cells` has the equations)::

    dz_t         = [ W_x dx_t + dW_x x_t + dW_h h_{t-1} + db ] + W_h dh_{t-1}
    (dc_t, dm_t) = d gates(z_t, c_{t-1}) . (dz_t, dc_{t-1})
    dh_t         = [ dW_p m_t ] + W_p dm_t                          with a projection; else dh_t = dm_t

The brackets do not wait for the step before. They are matrix products over many steps at once, and so are their
transposes: the gradient of a weight is one product per chunk of time, not one product and one addition of a
weight-sized array per step. The rule is linear in the tangents and written in JAX, so JAX transposes it into
backpropagation through time, and forward mode and second derivatives work as everywhere else. The partials of ``gates``
are taken by `jax.jvp`, again in the backward pass: what is kept of a step is ``z``, ``c`` and the output, 6 arrays of
H numbers for an LSTM.

How a step's arrays lie in memory, and when the product of the input is taken, is `jaxlstm.recurrence.layout`'s to say.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from jaxlstm.cells import Cell
from jaxlstm.recurrence import chunks
from jaxlstm.recurrence.layout import Layout
from jaxlstm.types import Layer, State, Weights

CHUNK = 16  # steps whose tangents are taken together: enough for one large product, few enough to stay in the cache


class Static(NamedTuple):
    """What is known when the program is compiled."""

    cell: Cell
    layout: Layout
    unroll: int


class Inputs(NamedTuple):
    """What one direction reads, in the order in which it runs."""

    x: Any  # (T, B, I); None where only the flow of the state matters
    taken: Array | None  # (T, B) bool: where False the state is held
    zeroed: Array | None  # (T, B) bool: where True the state is zero before the step


class Saved(NamedTuple):
    """What the derivative needs of a step besides the outputs. Here B stands for either order of axes."""

    z: Array  # (T, G*H, B)
    c: Array | None  # (T, H, B), as the step saw it
    m: Array | None  # (T, H, B), with a projection


States = tuple[State, ...]  # one for each direction


def run(
    cell: Cell,
    layer: Layer,
    xs: Float[Array, "T B I"],
    state: State,
    *,
    mask: Bool[Array, "T B"] | None,
    resets: Bool[Array, "T B"] | None,
    reverse: bool,
    dtype: DTypeLike,
    unroll: int,
    remat: int | None,
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, its directions side by side. The signature is that of `jaxlstm.recurrence`."""
    directions = range(len(layer.directions))
    backward = [reverse ^ (d == 1) for d in directions]
    units = layer.forward.w_h.shape[0] // cell.num_gates
    layout = Layout.choose(xs.shape[1], units, jnp.dtype(dtype), state.h.dtype)
    static = Static(cell, layout, unroll)
    inputs = tuple(_inputs(xs, mask, resets, backward[d]) for d in directions)
    before = tuple(jax.tree.map(lambda a: layout.from_batch_major(a[d]), state) for d in directions)  # noqa: B023

    def over_time(before: States, inputs: tuple[Inputs, ...]) -> tuple[States, tuple[Array, ...]]:
        return _recurrence(static, layer.directions, inputs, before)

    if remat is None:
        after, ys = over_time(before, inputs)
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        after, ys = chunks.over(jax.checkpoint(over_time), before, inputs, size=remat)
    if resets is not None:  # running backward, a reset on the very first step zeroes the state that is returned
        after = [_zero_where(layout, resets[0], a) if back else a for a, back in zip(after, backward)]
    ys = jnp.concatenate([jnp.flip(y, 0) if back else y for y, back in zip(ys, backward)], axis=-1)
    return ys, jax.tree.map(lambda *each: jnp.stack([layout.to_batch_major(a) for a in each]), *after)


def _inputs(xs: Array, mask: Array | None, resets: Array | None, backward: bool) -> Inputs:
    """The inputs of one direction; running backward, a reset zeroes the state before the step that follows it."""
    if not backward:
        return Inputs(xs, mask, resets)
    flip = partial(jnp.flip, axis=0)
    zeroed = None if resets is None else jnp.concatenate([jnp.zeros_like(resets[:1]), flip(resets)[:-1]])
    return Inputs(flip(xs), None if mask is None else flip(mask), zeroed)


def _zero_where(layout: Layout, rows: Array | None, state: State) -> State:
    """``state`` with the marked rows of the batch at zero."""
    if rows is None:
        return state
    return jax.tree.map(lambda a: jnp.where(layout.along_batch(rows), 0, a), state)


def _hold(layout: Layout, taken: Array | None, after: State, before: State) -> State:
    """``after`` where a step is taken, else ``before``."""
    if taken is None:
        return after
    return jax.tree.map(lambda new, old: jnp.where(layout.along_batch(taken), new, old), after, before)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recurrence(
    static: Static, weights: tuple[Weights, ...], inputs: tuple[Inputs, ...], state: States
) -> tuple[States, tuple[Array, ...]]:
    """All directions over time: the states after it, and ``(T, B, P)`` outputs; where no step is taken, the held h."""
    after, (ys, _) = _forward(static, weights, inputs, state, save=False)
    return after, ys


def _forward(
    static: Static, weights: tuple[Weights, ...], inputs: tuple[Inputs, ...], state: States, *, save: bool
) -> tuple[States, tuple[tuple[Array, ...], tuple[Saved | None, ...]]]:
    """The scan over time, with what the derivative needs if ``save``."""
    cell, layout, _ = static

    def step(w: Weights, recurrent: Array, before: State, now: Inputs) -> tuple[State, Any]:
        before = _zero_where(layout, now.zeroed, before)
        x = layout.from_batch_major(now.x)
        if layout.hoisted:
            z = x + layout.times(recurrent, before.h)
        else:
            z = layout.times(recurrent, jnp.concatenate([x.astype(layout.sums), before.h], layout.axis))
            z = _add_bias(layout, w.b, z)
        c, m = cell.gates(layout.slabs(z, cell.num_gates), before.c)
        h = m if w.w_p is None else layout.times(layout.prepare(w.w_p), m)
        after = _hold(layout, now.taken, State(h, c), before)
        saved = Saved(z, before.c, None if w.w_p is None else m) if save else None
        return after, (layout.to_batch_major(after.h), saved)

    def body(before: States, now: tuple[Inputs, ...]) -> tuple[States, Any]:
        after, kept = zip(*map(step, weights, recurrent, before, now))
        return after, tuple(zip(*kept))

    if layout.hoisted:
        recurrent = [layout.prepare(w.w_h) for w in weights]
        inputs = tuple(i._replace(x=_input_part(layout, w, i.x)) for w, i in zip(weights, inputs))
    else:  # one product for x and h
        recurrent = [layout.prepare(jnp.concatenate([w.w_x, w.w_h], axis=1)) for w in weights]
    after, (ys, saved) = lax.scan(body, state, inputs, unroll=static.unroll)
    # Rounded here and not in the loop: XLA on a CPU passes over a whole bfloat16 array to write one step into it.
    return after, (tuple(y.astype(layout.dtype) for y in ys), saved)


@partial(_recurrence.defjvp, symbolic_zeros=True)
def _tangent(static: Static, primals: Any, tangents: Any) -> Any:
    """The rule above, in chunks of time."""
    weights, inputs, state = primals
    layout = static.layout
    d_weights = _known(tangents[0])
    d_xs = tuple(None if (dx := _known(d.x)) is None else dx.astype(layout.sums) for d in tangents[1])
    d_before = jax.tree.map(lambda a, d: _dense(d, a), state, tangents[2])
    after, (ys, saved) = _forward(static, weights, inputs, state, save=True)
    recurrent = [layout.prepare_for_transpose(w.w_h) for w in weights]

    @partial(jax.checkpoint, prevent_cse=False)  # or the partials of all steps would be kept
    def body(before: States, now: Any) -> tuple[States, tuple[Array, ...]]:
        d_after = tuple(map(partial(_tangent_step, static), weights, recurrent, before, *now))
        return d_after, tuple(layout.to_batch_major(s.h) for s in d_after)

    def over_chunk(carry: Any, chunk: Any) -> tuple[Any, tuple[Array, ...]]:
        before, y = carry
        d_xs, now, saved, ys = chunk
        brackets = tuple(map(partial(_brackets, layout), weights, d_weights, d_xs, now, saved, ys, y))
        now = tuple(i._replace(x=None) for i in now)
        after, d_ys = lax.scan(body, before, (now, saved, brackets), unroll=static.unroll)
        return (after, tuple(each[-1] for each in ys)), d_ys

    y = tuple(layout.to_batch_major(s.h).astype(layout.dtype) for s in state)
    (d_after, _), d_ys = chunks.over(over_chunk, (d_before, y), (d_xs, inputs, saved, ys), size=CHUNK)
    return (after, ys), (d_after, tuple(d.astype(layout.dtype) for d in d_ys))


@partial(jax.checkpoint, static_argnums=0)  # or x and h of all steps would be kept side by side
def _brackets(
    layout: Layout, w: Weights, dw: Weights, dx: Array | None, now: Inputs, saved: Saved, ys: Array, y: Array
) -> tuple[Array, Array | None]:
    """The brackets of a chunk, for z and for h; ``y`` is the output before its first step."""
    dz = jnp.zeros(saved.z.shape, layout.sums)
    if dx is not None:
        dz = dz + layout.times_over_time(w.w_x, layout.from_batch_major(dx))
    if dw.w_x is not None or dw.w_h is not None:
        d_wide = jnp.concatenate([_dense(dw.w_x, w.w_x), _dense(dw.w_h, w.w_h)], axis=1)
        h = jnp.concatenate([y[None], ys[:-1]])
        h = h if now.zeroed is None else jnp.where(now.zeroed[:, :, None], 0, h)
        x_and_h = jnp.concatenate([now.x.astype(layout.dtype), h], axis=2)
        dz = dz + layout.times_over_time(d_wide, layout.from_batch_major(x_and_h))
    dz = _add_bias(layout, dw.b, dz)
    if saved.m is None or dw.w_p is None:
        return dz, None
    return dz, layout.times_over_time(dw.w_p, saved.m)


def _tangent_step(
    static: Static, w: Weights, recurrent: Array, before: State, now: Inputs, saved: Saved, brackets: Any
) -> State:
    """The tangent of the state after a step, from that before it."""
    cell, layout, _ = static
    before = _zero_where(layout, now.zeroed, before)
    dz = brackets[0] + layout.times_in_transpose(recurrent, before.h)
    z, dz = (layout.slabs(a, cell.num_gates) for a in (saved.z, dz))
    dc, dh = jax.jvp(cell.gates, (z, saved.c), (dz, before.c))[1]
    if w.w_p is not None:
        dh = layout.times(layout.prepare(w.w_p), dh)
    if brackets[1] is not None:
        dh = dh + brackets[1]
    return _hold(layout, now.taken, State(dh, dc), before)


def _input_part(layout: Layout, w: Weights, xs: Array) -> Array:
    """``W_x x + b`` for all steps, batch-major."""
    z = Layout(layout.dtype, layout.sums, 1, True).times_over_time(w.w_x, xs)
    return z if w.b is None else z + jnp.broadcast_to(w.b.astype(z.dtype), z.shape)


def _add_bias(layout: Layout, b: Array | None, z: Array) -> Array:
    """``z + b``, over any number of leading axes."""
    if b is None:
        return z
    b = layout.along_units(b.astype(layout.sums))
    return z + jnp.broadcast_to(jnp.expand_dims(b, range(z.ndim - 2)), z.shape)


def _known(tangents: Any) -> Any:
    """Tangents with None for those that are zero whatever happens."""
    return jax.tree.map(lambda d: None if isinstance(d, SymbolicZero) else d, tangents)


def _dense(tangent: Any, like: Array) -> Array:
    """A tangent as an array, zeros where it is known to be zero."""
    return jnp.zeros_like(like) if tangent is None or isinstance(tangent, SymbolicZero) else tangent
