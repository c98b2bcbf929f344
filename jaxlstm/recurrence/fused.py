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

The two axes of a step's arrays lie one way or the other (`Static.axis`). Feature-major, ``(H, B)``, has the large
operand of each step's product, the weights, on the left, read as it lies in memory; batch-major, ``(B, H)``, has less
to move when the arrays are small.
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
from jaxlstm.types import Layer, State, Weights

CHUNK = 16  # steps whose tangents are taken together: enough for one large product, few enough to stay in the cache
SMALL = (16, 128)  # the largest batch and hidden size up to which batch-major is faster


class Static(NamedTuple):
    """What is known when the program is compiled."""

    cell: Cell
    dtype: jnp.dtype  # of products and outputs
    sums: jnp.dtype  # of sums and state
    unroll: int
    axis: int  # where the units lie in a step's arrays of two axes: 0 feature-major, 1 batch-major


class Inputs(NamedTuple):
    """What one direction reads, in the order in which it runs."""

    x: Array | None  # (T, B, I)
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
    axis = 1 if xs.shape[1] <= SMALL[0] and layer.forward.w_h.shape[0] <= cell.num_gates * SMALL[1] else 0
    static = Static(cell, jnp.dtype(dtype), state.h.dtype, unroll, axis)
    inputs = tuple(_inputs(xs, mask, resets, backward[d]) for d in directions)
    before = tuple(jax.tree.map(lambda a: jnp.moveaxis(a[d], 1, axis), state) for d in directions)  # noqa: B023

    def over_time(before: States, inputs: tuple[Inputs, ...]) -> tuple[States, tuple[Array, ...]]:
        return _recurrence(static, layer.directions, inputs, before)

    if remat is None:
        after, ys = over_time(before, inputs)
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        after, ys = chunks.over(jax.checkpoint(over_time), before, inputs, size=remat)
    if resets is not None:  # running backward, a reset on the very first step zeroes the state that is returned
        after = [_zero_where(resets[0], a, axis) if back else a for a, back in zip(after, backward)]
    ys = jnp.concatenate([jnp.flip(y, 0) if back else y for y, back in zip(ys, backward)], axis=-1)
    return ys, jax.tree.map(lambda *each: jnp.stack([jnp.moveaxis(a, axis, 1) for a in each]), *after)


def _inputs(xs: Array, mask: Array | None, resets: Array | None, backward: bool) -> Inputs:
    """The inputs of one direction; running backward, a reset zeroes the state before the step that follows it."""
    if not backward:
        return Inputs(xs, mask, resets)
    flip = partial(jnp.flip, axis=0)
    zeroed = None if resets is None else jnp.concatenate([jnp.zeros_like(resets[:1]), flip(resets)[:-1]])
    return Inputs(flip(xs), None if mask is None else flip(mask), zeroed)


def _zero_where(rows: Array | None, state: State, axis: int) -> State:
    """``state`` with the marked rows of the batch at zero."""
    if rows is None:
        return state
    return jax.tree.map(lambda a: jnp.where(jnp.expand_dims(rows, axis), 0, a), state)


def _hold(taken: Array | None, after: State, before: State, axis: int) -> State:
    """``after`` where a step is taken, else ``before``."""
    if taken is None:
        return after
    return jax.tree.map(lambda new, old: jnp.where(jnp.expand_dims(taken, axis), new, old), after, before)


def _dot(static: Static, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Product over one axis of each of two arrays: operands in ``dtype``, sums and result in ``sums``."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a.astype(static.dtype), b.astype(static.dtype), axes, preferred_element_type=static.sums)


def _times(static: Static, w: Array, x: Array) -> Array:
    """``W x`` for one step, with ``W`` as `_laid_out` gives it: each operand is read in order."""
    return _dot(static, w, x, (1, 0)) if static.axis == 0 else _dot(static, x, w, (1, 0))


def _laid_out(static: Static, w: Array) -> Array:
    """A matrix for `_times`: ``W`` for the left of a feature-major array, or its transpose for the right."""
    return jnp.moveaxis(w, 0, static.axis).astype(static.dtype)


def _times_over_time(static: Static, w: Array, xs: Array) -> Array:
    """``W x`` for many steps at once; ``xs (T, ...)``."""
    if static.axis == 0:
        return jnp.moveaxis(_dot(static, w, xs, (1, 1)), 0, 1)
    return _dot(static, xs, w, (2, 1))


def _slabs(static: Static, z: Array) -> Array:
    """The pre-activations of a step with the gate axis in front: ``(G, H, B)``."""
    gates = static.cell.num_gates
    shape = list(z.shape)
    shape[static.axis : static.axis + 1] = [gates, z.shape[static.axis] // gates]
    return jnp.moveaxis(z.reshape(shape), static.axis, 0)


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
    axis = static.axis

    def step(w: Weights, wide: Array, before: State, now: Any) -> tuple[State, Array, Saved | None]:
        before = _zero_where(now.zeroed, before, axis)
        x = jnp.moveaxis(now.x, 1, axis)
        z = _times(static, wide, jnp.concatenate([x.astype(static.dtype), before.h.astype(static.dtype)], axis))
        if w.b is not None:
            z = z + jnp.broadcast_to(jnp.expand_dims(w.b.astype(static.sums), 1 - axis), z.shape)
        c, m = static.cell.gates(_slabs(static, z), before.c)
        h = m if w.w_p is None else _times(static, _laid_out(static, w.w_p), m)
        after = _hold(now.taken, State(h, c), before, axis)
        saved = Saved(z, before.c, None if w.w_p is None else m) if save else None
        return after, jnp.moveaxis(after.h, axis, 1).astype(static.dtype), saved

    def body(before: States, now: tuple[Inputs, ...]) -> tuple[States, Any]:
        after, ys, saved = zip(*map(step, weights, wide, before, now))
        return after, (ys, saved)

    wide = [_laid_out(static, jnp.concatenate([w.w_x, w.w_h], axis=1)) for w in weights]  # one product for x and h
    return lax.scan(body, state, inputs, unroll=static.unroll)


@partial(_recurrence.defjvp, symbolic_zeros=True)
def _tangent(static: Static, primals: Any, tangents: Any) -> Any:
    """The rule above, in chunks of time."""
    weights, inputs, state = primals
    d_weights, d_xs = _known(tangents[0]), tuple(_known(d.x) for d in tangents[1])
    d_before = jax.tree.map(lambda a, d: _dense(d, a), state, tangents[2])
    axis = static.axis
    after, (ys, saved) = _forward(static, weights, inputs, state, save=True)
    # Laid out for the transpose of their product, which is the backward pass: there both operands are read in order.
    recurrent = [jnp.moveaxis(w.w_h, 1, axis).astype(static.dtype) for w in weights]

    @jax.checkpoint  # or x and h of all steps would be kept side by side
    def lead(
        w: Weights, dw: Weights, dx: Array | None, now: Any, saved: Saved, ys: Array, y: Array
    ) -> tuple[Array, Array | None]:
        """The brackets of a chunk, for z and for h; ``y`` is the output before its first step."""
        dz = jnp.zeros(saved.z.shape, static.sums)
        if dx is not None:
            dz = dz + _times_over_time(static, w.w_x, jnp.moveaxis(dx, 2, 1 + axis))
        if dw.w_x is not None or dw.w_h is not None:
            d_wide = jnp.concatenate([_dense(dw.w_x, w.w_x), _dense(dw.w_h, w.w_h)], axis=1)
            h = jnp.concatenate([y[None], ys[:-1]])
            h = h if now.zeroed is None else jnp.where(now.zeroed[:, :, None], 0, h)
            x_and_h = jnp.moveaxis(jnp.concatenate([now.x.astype(static.dtype), h], axis=2), 2, 1 + axis)
            dz = dz + _times_over_time(static, d_wide, x_and_h)
        if dw.b is not None:
            dz = dz + jnp.broadcast_to(jnp.expand_dims(dw.b.astype(static.sums), (0, 2 - axis)), dz.shape)
        if saved.m is None or dw.w_p is None:
            return dz, None
        return dz, _times_over_time(static, dw.w_p, saved.m)

    def step(w: Weights, w_h: Array, before: State, now: Any, saved: Saved, lead: Any) -> tuple[State, Array]:
        before = _zero_where(now.zeroed, before, axis)
        dz = lead[0] + (_dot(static, w_h, before.h, (0, 0)) if axis == 0 else _dot(static, before.h, w_h, (1, 1)))
        dc, dh = jax.jvp(static.cell.gates, (_slabs(static, saved.z), saved.c), (_slabs(static, dz), before.c))[1]
        if w.w_p is not None:
            dh = _times(static, _laid_out(static, w.w_p), dh)
        if lead[1] is not None:
            dh = dh + lead[1]
        after = _hold(now.taken, State(dh, dc), before, axis)
        return after, jnp.moveaxis(after.h, axis, 1).astype(static.dtype)

    @partial(jax.checkpoint, prevent_cse=False)  # or the partials of all steps would be kept
    def body(before: States, now: Any) -> tuple[States, tuple[Array, ...]]:
        d_after, d_ys = zip(*map(step, weights, recurrent, before, *now))
        return d_after, d_ys

    def over_chunk(carry: Any, chunk: Any) -> tuple[Any, tuple[Array, ...]]:
        before, y = carry
        d_xs, now, saved, ys = chunk
        leads = tuple(map(lead, weights, d_weights, d_xs, now, saved, ys, y))
        now = tuple(i._replace(x=None) for i in now)
        after, d_ys = lax.scan(body, before, (now, saved, leads), unroll=static.unroll)
        return (after, tuple(each[-1] for each in ys)), d_ys

    y = tuple(jnp.moveaxis(s.h, axis, 1).astype(static.dtype) for s in state)
    (d_after, _), d_ys = chunks.over(over_chunk, (d_before, y), (d_xs, inputs, saved, ys), size=CHUNK)
    return (after, ys), (d_after, d_ys)


def _known(tangents: Any) -> Any:
    """Tangents with None for those that are zero whatever happens."""
    return jax.tree.map(lambda d: None if isinstance(d, SymbolicZero) else d, tangents)


def _dense(tangent: Any, like: Array) -> Array:
    """A tangent as an array, zeros where it is known to be zero."""
    return jnp.zeros_like(like) if tangent is None or isinstance(tangent, SymbolicZero) else tangent
