"""Reference convolutional LSTM: float64 NumPy loops over layers, sequences, steps and taps of the kernel.

It shares no code with the library. As in `oracle`, every function accepts additional leading axes before the axes that
its docstring names, so one evaluation carries many perturbed copies of the network for the complex step. ``axes`` is
the number of spatial axes.
"""

import itertools

import numpy as np
from oracle import sigmoid, stack


def convolve(w, x, axes):
    """Convolves ``x (..., *spatial, m)`` with ``w (..., *kernel, m, n)``: one shifted product per tap."""
    kernel, spatial = w.shape[-2 - axes : -2], x.shape[-1 - axes : -1]
    padding = [(size // 2, size // 2) for size in kernel]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1 - axes) + padding + [(0, 0)])
    total = 0
    for tap in itertools.product(*map(range, kernel)):
        shifted = padded[(..., *(slice(t, t + size) for t, size in zip(tap, spatial)), slice(None))]
        positions = shifted.reshape(*shifted.shape[: -1 - axes], -1, shifted.shape[-1])
        total = total + positions @ w[(..., *tap, slice(None), slice(None))]
    return total.reshape(*total.shape[:-2], *spatial, w.shape[-1])


def one_step(weights, x, h, c, axes):
    """Computes the new ``h`` and ``c`` by equation 3 of Shi et al. 2015.

    ``x (..., *spatial, I)``, ``h`` and ``c (..., *spatial, H)``.
    """
    z = convolve(weights.w_x, x, axes) + convolve(weights.w_h, h, axes)
    if weights.b is not None:
        z = z + weights.b.reshape(*weights.b.shape[:-1], *[1] * axes, weights.b.shape[-1])
    z_i, z_f, z_g, z_o = np.split(z, 4, axis=-1)
    w_i = w_f = w_o = 0
    if weights.w_c is not None:
        w_i, w_f, w_o = (np.take(weights.w_c, k, axis=-2 - axes) for k in range(3))
    c = sigmoid(z_f + w_f * c) * c + sigmoid(z_i + w_i * c) * np.tanh(z_g)
    return sigmoid(z_o + w_o * c) * np.tanh(c), c


def one_sequence(weights, xs, h, c, step_mask, resets, backward, restart_state, axes):
    """Runs one direction of one layer over one sequence: a list of T outputs, ``h``, ``c``.

    ``xs`` has T fields ``(..., *spatial, I)``; ``step_mask`` and ``resets`` are ``(T,)`` bool; ``restart_state`` is the
    state after a reset.
    """
    ys = [None] * len(xs)
    for t in reversed(range(len(xs))) if backward else range(len(xs)):
        if not step_mask[t]:
            ys[t] = 0 * h
            continue
        if resets[t] and not backward:
            h, c = restart_state
        h, c = one_step(weights, xs[t], h, c, axes)
        ys[t] = h
        if resets[t] and backward:
            h, c = restart_state
    return ys, h, c


def network(params, xs, h, c, *, axes, lengths=None, mask=None, resets=None, reverse=False, layer_masks=None):
    """Runs all layers: ``ys, h, c``.

    Args:
      params: `jaxlstm.Params` of NumPy arrays.
      xs: ``(..., T, B, *spatial, I)``.
      h: initial state ``(..., L*D, B, *spatial, H)``.
      c: initial state, of the same shape.
      axes: number of spatial axes.
      lengths: ``(B,)`` int.
      mask: ``(T, B)`` bool.
      resets: ``(T, B)`` bool.
      reverse: whether time runs backward.
      layer_masks: factors of the inputs of each layer and of the outputs of the last one; None for a factor of 1.
    """
    num_steps, batch_size = xs.shape[-3 - axes : -1 - axes]
    step_mask = np.ones((num_steps, batch_size), bool) if mask is None else np.array(mask)
    resets = np.zeros((num_steps, batch_size), bool) if resets is None else resets
    if lengths is not None:
        step_mask &= np.arange(num_steps)[:, None] < lengths[None]
    layer_masks = [None] * (len(params.layers) + 1) if layer_masks is None else layer_masks

    def field(a, *index):
        """Selects fields ``(..., *spatial, channels)`` by the index of the axes before them."""
        return a[(..., *index, *[slice(None)] * (axes + 1))]

    def stack_fields(rows):
        """Stacks nested lists of fields as ``(..., n, B, *spatial, channels)``."""
        return stack([stack(row, -2 - axes) for row in rows], -3 - axes)

    last_h, last_c = [], []
    for n, layer in enumerate(params.layers):
        if layer_masks[n] is not None:
            xs = xs * layer_masks[n]
        outputs = []
        for weights, backward in ((layer.forward, reverse), (layer.backward, not reverse)):
            if weights is None:
                continue
            k, rows = len(last_h), []
            for b in range(batch_size):
                inputs = [field(xs, t, b) for t in range(num_steps)]
                initial = field(h, k, b), field(c, k, b)
                if params.state is None:
                    restart_state = 0 * initial[0], 0 * initial[1]
                else:
                    restart_state = field(params.state.h, k), field(params.state.c, k)
                rows.append(
                    one_sequence(
                        weights, inputs, *initial, step_mask[:, b], resets[:, b], backward, restart_state, axes
                    )
                )
            ys, hs, cs = zip(*rows)
            outputs.append(stack_fields(zip(*ys)))
            last_h.append(hs)
            last_c.append(cs)
        xs = np.concatenate(np.broadcast_arrays(*outputs), axis=-1) if len(outputs) > 1 else outputs[0]
    if layer_masks[-1] is not None:
        xs = xs * layer_masks[-1]
    return xs, stack_fields(last_h), stack_fields(last_c)
