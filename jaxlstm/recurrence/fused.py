r"""The same recurrence, arranged for speed: both directions in one scan, and a derivative of its own.

The tangent rule, for one direction (`jaxlstm.cells` has the equations)::

    dz_t         = [ W_x dx_t + dW_x x_t + dW_h h_{t-1} + db ] + W_h dh_{t-1}
    (dc_t, dm_t) = d gates(z_t, c_{t-1}) . (dz_t, dc_{t-1})
    dh_t         = [ dW_p m_t ] + W_p dm_t                          with a projection; else dh_t = dm_t

With layer normalisation ``z`` is two arrays, ``W_x x`` and ``W_h h``, each with its bracket; peepholes and gains have
their tangents inside the step.

The brackets do not wait for the step before. They are matrix products over many steps at once, and so are their
transposes: the gradient of a weight is one product per chunk of time, not one product and one addition of a
weight-sized array per step. The rule is linear in the tangents and written in JAX, so JAX transposes it into
backpropagation through time, and forward mode and second derivatives work as everywhere else. The partials of ``gates``
are taken by `jax.jvp`, or for the LSTM as `jaxlstm.recurrence.gate_derivatives` arranges them, again in the backward
pass: what is kept of a step is ``z``, ``c`` and the output, 6 arrays of H numbers for an LSTM.

How a step's arrays lie in memory, and when the product of the input is taken, is `jaxlstm.recurrence.layout`'s to say;
that sequences mapped one by one are worked on as a batch, `jaxlstm.primitives.batch_folding`'s doing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, apply_zoneout
from jaxlstm.params import Layer, Size, State, Weights
from jaxlstm.primitives import batch_folding
from jaxlstm.recurrence import chunked_scan, cpu_activations, gate_derivatives
from jaxlstm.recurrence.context import How
from jaxlstm.recurrence.gate_derivatives import Partials
from jaxlstm.recurrence.layout import Layout
from jaxlstm.recurrence.step import advance, candidate_scale, input_part, slabs


class Static(NamedTuple):
    """What is known when the program is compiled."""

    cell: Cell
    rates: RegularizerRates
    unroll: int
    units: Size
    dtype: jnp.dtype  # of the operands of products, and of outputs
    sums: jnp.dtype  # of sums and state
    normalised: bool  # whether W_x x and W_h h are normalised apart
    smooth: bool = False  # whether all that is computed has a derivative, not only what is linear in tangents

    @property
    def arranged(self) -> bool:
        """Whether the derivative of the gates is that of `jaxlstm.recurrence.gate_derivatives`."""
        return self.cell.gates in gate_derivatives.ARRANGED and not self.normalised

    def layout(self, rows: Size) -> Layout:
        """The layout for a batch of ``rows``."""
        layout = Layout.choose(rows, self.units, self.dtype, self.sums)
        return layout._replace(hoisted=layout.hoisted or self.normalised, bits=layout.bits and not self.smooth)


class Inputs(NamedTuple):
    """What one direction reads, in the order in which it runs."""

    x: Any  # (T, B, I); None where only the flow of the state matters
    taken: Array | None  # (T, B) bool: where False the state is held
    fresh: Array | None  # (T, B) bool: where True the state starts anew before the step
    noise: RegularizerMasks  # (T, B, .)


class Saved(NamedTuple):
    """What the derivative needs of a step besides the outputs. Here B stands for either order of axes."""

    z: Array  # (T, G*H, B)
    z_h: Array | None  # (T, G*H, B), with layer normalisation
    c: Array | None  # (T, H, B), as the step saw it
    m: Array | None  # (T, H, B), with a projection


class Brackets(NamedTuple):
    """The brackets of the rule, for many steps; None for one that is zero."""

    z: Array
    z_h: Array | None  # with layer normalisation
    h: Array | None


class Parts(NamedTuple):
    """What work over a batch is given and gives, by where the batch is."""

    shared: Any = None  # nowhere
    state: Any = None  # (H, B) or (B, H), as the layout has it
    over_time: Any = None  # (T, B, .)
    saved: Any = None  # (T, H, B) or (T, B, H), as the layout has it


States = tuple[State, ...]  # one for each direction
Fresh = tuple[State | None, ...]  # the state at a fresh start for each direction, zeros where None


def run(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, its directions side by side. The signature is that of `jaxlstm.recurrence`."""
    directions = range(len(layer.directions))
    backward = [how.reverse ^ (d == 1) for d in directions]
    units, normalised = layer.forward.w_h.shape[0] // cell.num_gates, layer.forward.norm is not None
    static = Static(cell, how.rates, how.unroll, units, jnp.dtype(how.dtype), state.h.dtype, normalised)
    layout = static.layout(xs.shape[1])
    inputs = tuple(_inputs(xs, how, d, backward[d]) for d in directions)
    before = tuple(jax.tree.map(lambda a: layout.from_batch_major(a[d]), state) for d in directions)  # noqa: B023
    fresh = tuple(jax.tree.map(lambda a: a[d], how.start) for d in directions)  # noqa: B023

    def over_time(before: States, inputs: tuple[Inputs, ...]) -> tuple[States, tuple[Array, ...]]:
        return _recurrence(static, layer.directions, inputs, before, fresh)

    if how.remat is None:
        after, ys = over_time(before, inputs)
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        after, ys = chunked_scan.over(jax.checkpoint(over_time), before, inputs, size=how.remat)
    if how.resets is not None:  # running backward, a reset on the very first step is one of the state that is returned
        first = how.resets[0]
        after = [_restart(layout, first, f, a) if back else a for a, f, back in zip(after, fresh, backward)]
    ys = jnp.concatenate([jnp.flip(y, 0) if back else y for y, back in zip(ys, backward)], axis=-1)
    return ys, jax.tree.map(lambda *each: jnp.stack([layout.to_batch_major(a) for a in each]), *after)


def _inputs(xs: Array, how: How, direction: int, backward: bool) -> Inputs:
    """The inputs of one direction; running backward, a reset is a fresh start before the step that follows it."""
    inputs = Inputs(xs, how.mask, how.resets, jax.tree.map(lambda a: a[direction], how.noise))
    if not backward:
        return inputs
    inputs = jax.tree.map(partial(jnp.flip, axis=0), inputs)
    if inputs.fresh is None:
        return inputs
    return inputs._replace(fresh=jnp.concatenate([jnp.zeros_like(inputs.fresh[:1]), inputs.fresh[:-1]]))


def _restart(layout: Layout, rows: Array | None, fresh: State | None, state: State) -> State:
    """``state`` with the marked rows of the batch at ``fresh``, zeros where that is None."""
    if rows is None:
        return state
    at = layout.along_batch(rows)
    if fresh is None:
        return jax.tree.map(lambda a: jnp.where(at, 0, a), state)
    return jax.tree.map(lambda a, b: jnp.where(at, jnp.broadcast_to(layout.along_units(b), a.shape), a), state, fresh)


def _keep(static: Static, layout: Layout, now: Inputs, after: State, before: State) -> State:
    """The state after a step, but for what zoneout or the mask leaves as it was."""
    after = apply_zoneout(static.rates, jax.tree.map(layout.from_batch_major, now.noise), after, before)
    if now.taken is None:
        return after
    taken = layout.along_batch(now.taken)
    return jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, before)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recurrence(
    static: Static, weights: tuple[Weights, ...], inputs: tuple[Inputs, ...], before: States, fresh: Fresh
) -> tuple[States, tuple[Array, ...]]:
    """All directions over time: the states after it, and ``(T, B, P)`` outputs; where no step is taken, the held h."""
    found = _over_batch(static, partial(_forward, save=False), Parts((weights, fresh), before, inputs))
    return found.state, found.over_time


def _over_batch(static: Static, run: Callable[[Static, Size, Parts], Parts], given: Parts) -> Parts:
    """``run(static, B, given)`` as work that can take an axis of `jax.vmap` into its batch."""

    def axes(rows: Size) -> Parts:
        batch = 1 - static.layout(rows).axis
        return Parts(batch_folding.SHARED, batch, 1, 1 + batch)

    rows = jax.tree.leaves(given.over_time)[0].shape[1]
    smooth = partial(run, static._replace(smooth=True))
    return batch_folding.call(partial(run, static), rows, (given,), lambda rows: (axes(rows),), axes, smooth)


def _forward(static: Static, rows: Size, given: Parts, *, save: bool) -> Parts:
    """The scan over time, of ``((weights, fresh), states, inputs)``; with what the derivative needs if ``save``."""
    (weights, fresh), begin, inputs = given.shared, given.state, given.over_time
    layout = static.layout(rows)

    def step(w: Weights, recurrent: Any, fresh: State | None, before: State, now: Inputs) -> tuple[State, Any]:
        start = _restart(layout, now.fresh, fresh, before)
        x = now.x if layout.bits and not layout.hoisted else layout.from_batch_major(now.x)
        z_h = None
        if w.norm is not None:
            z, z_h = x, layout.times(recurrent, start.h)
        elif layout.hoisted:
            z = x + layout.times(recurrent, start.h)
        else:
            z = _add_bias(layout, w.b, layout.times_both(recurrent, x, start.h, save=save))
        c, m = _advance(static, layout, now.noise, w, z, z_h, start.c)
        h = m if w.w_p is None else layout.times(layout.prepare(w.w_p), m)
        after = _keep(static, layout, now, State(h, c), start)
        saved = Saved(z, z_h, start.c, None if w.w_p is None else m) if save else None
        y = layout.to_batch_major(after.h)
        return after, (layout.pack(y) if layout.bits else y, saved)

    def body(before: States, now: tuple[Inputs, ...]) -> tuple[States, Any]:
        after, kept = zip(*map(step, weights, recurrent, fresh, before, now))
        return after, tuple(zip(*kept))

    if layout.hoisted:
        recurrent = [layout.prepare(w.w_h) for w in weights]
        inputs = tuple(i._replace(x=input_part(w, i.x, layout.dtype, layout.sums)) for w, i in zip(weights, inputs))
    else:
        recurrent = [layout.prepare_both(w.w_x, w.w_h) for w in weights]
        if layout.bits:
            inputs = tuple(i._replace(x=layout.from_batch_major(layout.pack(i.x))) for i in inputs)
    after, (ys, saved) = lax.scan(body, begin, inputs, unroll=static.unroll)
    # If not moved as bits, rounded here and not in the loop: XLA passes over a whole bfloat16 array to write one step.
    return Parts(None, after, tuple(layout.unpack(y).astype(layout.dtype) for y in ys), saved)


def _advance(
    static: Static, layout: Layout, noise: RegularizerMasks, w: Weights, z: Array, z_h: Array | None, c: Array | None
) -> tuple[Array | None, Array]:
    """`jaxlstm.step.advance` in this layout."""
    gates = static.cell.num_gates
    kept = None if noise.candidate_mask is None else layout.from_batch_major(noise.candidate_mask)
    z_h = None if z_h is None else slabs(z_h, gates, layout.axis)
    z, activated = slabs(z, gates, layout.axis), cpu_activations.activated if layout.threads else None
    return advance(static.cell, w, z, z_h, c, kept, static.rates, layout.axis, activated=activated)


@partial(_recurrence.defjvp, symbolic_zeros=True)
def _(static: Static, primals: Any, tangents: Any) -> Any:
    weights, inputs, before, fresh = primals
    d_weights = _known(tangents[0])
    d_xs = tuple(None if (dx := _known(d.x)) is None else dx.astype(static.sums) for d in tangents[1])
    # What `advance` uses of the weights goes with the step, the rest into the brackets.
    d_inner = tuple(
        jax.tree.map(lambda a, d: _dense(d, a), _inner(w, w), _inner(w, d)) for w, d in zip(weights, tangents[0])
    )
    d_before, d_fresh = jax.tree.map(lambda a, d: _dense(d, a), (before, fresh), tangents[2:])
    found = _over_batch(static, partial(_forward, save=True), Parts((weights, fresh), before, inputs))
    shared = (weights, d_weights, d_inner, fresh, d_fresh)
    moved = _over_batch(
        static, _tangent, Parts(shared, (before, d_before), (inputs, d_xs, found.over_time), found.saved)
    )
    return (found.state, found.over_time), (moved.state, moved.over_time)


def _tangent(static: Static, rows: Size, given: Parts) -> Parts:
    """The rule above, in chunks of time."""
    weights, d_weights, d_inner, fresh, d_fresh = given.shared
    (begin, d_begin), (inputs, d_xs, ys) = given.state, given.over_time
    layout = static.layout(rows)
    recurrent = [layout.prepare_for_transpose(w.w_h) for w in weights]

    @partial(jax.checkpoint, prevent_cse=False)  # or the partials of all steps would be kept
    def body(before: States, now: Any) -> tuple[States, tuple[Array, ...]]:
        step = partial(_tangent_step, static, layout)
        d_after = tuple(map(step, weights, d_inner, recurrent, d_fresh, before, *now))
        return d_after, tuple(s.h for s in d_after)

    @partial(jax.checkpoint, prevent_cse=False)  # or what a chunk is computed from would be kept, side by side
    def over_chunk(before: States, chunk: Any) -> tuple[States, tuple[Array, ...]]:
        t, d_xs, now, saved, y = chunk
        h = tuple(map(partial(_outputs_before, layout, t[0]), begin, ys, y))
        brackets = tuple(map(partial(_brackets, layout), weights, fresh, d_weights, d_xs, now, saved, h))
        needed = tuple(map(partial(_partials, static, layout), now, saved)) if static.arranged else saved
        now = tuple(i._replace(x=None) for i in now)
        after, d_ys = lax.scan(body, before, (now, needed, brackets), unroll=static.unroll)
        return after, tuple(map(layout.to_batch_major, d_ys))

    inputs = tuple(i._replace(x=None if i.x is None else layout.pack(i.x)) for i in inputs)
    ys = tuple(map(layout.pack, ys))
    over_time = (jnp.arange(ys[0].shape[0]), d_xs, inputs, given.saved, ys)
    d_after, d_ys = chunked_scan.over(over_chunk, d_begin, over_time, size=layout.chunk)
    return Parts(None, d_after, tuple(d.astype(layout.dtype) for d in d_ys))


def _outputs_before(layout: Layout, t: Array, begin: State, ys: Array, y: Array) -> Array:
    """The output before each step of the chunk ``y`` of ``ys`` that begins at step ``t``."""
    first = layout.pack(layout.to_batch_major(begin.h))
    first = jnp.where(t == 0, first, lax.dynamic_index_in_dim(ys, jnp.maximum(t - 1, 0), keepdims=False))
    return jnp.concatenate([first[None], y[:-1]])


def _inner(w: Weights, like: Weights) -> Weights:
    """Those of ``like`` that `advance` uses with the weights ``w``."""
    return Weights(None, None, None if w.norm is None else like.b, None, like.w_c, like.norm)  # pyright: ignore


def _partials(static: Static, layout: Layout, now: Inputs, saved: Saved) -> Partials:
    """The partials of the gates in a chunk."""
    kept, c = now.noise.candidate_mask, saved.c
    keep = 1.0 if kept is None else layout.from_batch_major(candidate_scale(kept, static.rates, layout.sums))
    return gate_derivatives.of(static.cell.gates, saved.z, c, keep, layout.axis)  # pyright: ignore[reportArgumentType]


def _brackets(
    layout: Layout,
    w: Weights,
    fresh: State | None,
    dw: Weights,
    dx: Array | None,
    now: Inputs,
    saved: Saved,
    h: Array,
) -> Brackets:
    """The brackets of a chunk; ``h`` are the outputs before its steps."""
    z = jnp.zeros(saved.z.shape, layout.sums)
    z_h = None
    if dx is not None:
        z = z + layout.times_over_time(w.w_x, layout.from_batch_major(dx))
    if now.fresh is not None:
        anew = 0 if fresh is None else jnp.broadcast_to(layout.pack(fresh.h), h.shape)
        h = jnp.where(now.fresh[:, :, None], anew, h)
    if w.norm is not None:
        if dw.w_x is not None:
            z = z + layout.times_over_time(dw.w_x, layout.from_batch_major(layout.unpack(now.x)))
        z_h = jnp.zeros(saved.z.shape, layout.sums)
        if dw.w_h is not None:
            z_h = layout.times_over_time(dw.w_h, layout.from_batch_major(layout.unpack(h)))
    elif dw.w_x is not None or dw.w_h is not None:
        d_wide = jnp.concatenate([_dense(dw.w_x, w.w_x), _dense(dw.w_h, w.w_h)], axis=1)
        x_and_h = layout.unpack(jnp.concatenate([now.x, h], axis=2))
        z = z + layout.times_over_time(d_wide, layout.from_batch_major(x_and_h))
    if w.norm is None:
        z = _add_bias(layout, dw.b, z)
    if saved.m is None or dw.w_p is None:
        return Brackets(z, z_h, None)
    return Brackets(z, z_h, layout.times_over_time(dw.w_p, saved.m))


def _tangent_step(
    static: Static,
    layout: Layout,
    w: Weights,
    d_inner: Weights,
    recurrent: Array,
    d_fresh: State | None,
    before: State,
    now: Inputs,
    saved: Saved | Partials,
    brackets: Brackets,
) -> State:
    """The tangent of the state after a step, from that before it."""
    before = _restart(layout, now.fresh, d_fresh, before)
    dz, dz_h = brackets.z, brackets.z_h
    if dz_h is None:
        dz = dz + layout.times_in_transpose(recurrent, before.h)
    else:
        dz_h = dz_h + layout.times_in_transpose(recurrent, before.h)
    if isinstance(saved, Partials):
        dc, dh = gate_derivatives.step(saved, dz, before.c, layout.axis)  # pyright: ignore[reportArgumentType]
    else:
        primals = (_inner(w, w), saved.z, saved.z_h, saved.c)
        dc, dh = jax.jvp(partial(_advance, static, layout, now.noise), primals, (d_inner, dz, dz_h, before.c))[1]
    if w.w_p is not None:
        dh = layout.times(layout.prepare(w.w_p), dh)
    if brackets.h is not None:
        dh = dh + brackets.h
    return _keep(static, layout, now, State(dh, dc), before)


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
