"""The convolutional LSTM once more, as plainly as possible: float64 NumPy loops over layers, sequences, steps and taps.

It shares no code with the library. As in `oracle`, arrays may have any leading axes in front of those named, so that
one evaluation carries many perturbed copies of the network for the complex step. ``axes`` counts those of space.
"""

import itertools

import numpy as np
from oracle import sigmoid


def convolve(w, x, axes):
    """``w (..., *kernel, m, n)``, ``x (..., *spatial, m)``: one product for each tap of the kernel, shifted."""
    kernel, spatial = w.shape[-2 - axes : -2], x.shape[-1 - axes : -1]
    border = [(size // 2, size // 2) for size in kernel]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1 - axes) + border + [(0, 0)])
    total = 0
    for tap in itertools.product(*map(range, kernel)):
        seen = padded[(..., *(slice(t, t + size) for t, size in zip(tap, spatial)), slice(None))]
        rows = seen.reshape(*seen.shape[: -1 - axes], -1, seen.shape[-1])
        total = total + rows @ w[(..., *tap, slice(None), slice(None))]
    return total.reshape(*total.shape[:-2], *spatial, w.shape[-1])


def over_space(b, axes):
    """``b (..., n)`` with an axis for each of space."""
    return b.reshape(*b.shape[:-1], *[1] * axes, b.shape[-1])


def one_step(weights, x, h, c, axes):
    """``x (..., *spatial, I)``, ``h`` and ``c (..., *spatial, H)``, after Shi et al. 2015, equation 3."""
    z = convolve(weights.w_x, x, axes) + convolve(weights.w_h, h, axes)
    if weights.b is not None:
        z = z + over_space(weights.b, axes)
    i, f, g, o = np.split(z, 4, axis=-1)
    w_ci = w_cf = w_co = 0
    if weights.w_c is not None:
        w_ci, w_cf, w_co = (np.take(weights.w_c, k, axis=-2 - axes) for k in range(3))
    i = sigmoid(i + w_ci * c)
    f = sigmoid(f + w_cf * c)
    c = f * c + i * np.tanh(g)
    o = sigmoid(o + w_co * c)
    return o * np.tanh(c), c


def one_sequence(weights, xs, h, c, taken, resets, backward, axes):
    """``xs``: T fields ``(..., *spatial, I)``; ``taken`` and ``resets`` ``(T,)`` bool: as many fields, h and c."""
    ys = [None] * len(xs)
    for t in reversed(range(len(xs))) if backward else range(len(xs)):
        if not taken[t]:
            ys[t] = 0 * h
            continue
        if resets[t] and not backward:
            h, c = 0 * h, 0 * c
        h, c = one_step(weights, xs[t], h, c, axes)
        ys[t] = h
        if resets[t] and backward:
            h, c = 0 * h, 0 * c
    return ys, h, c


def network(params, xs, h, c, *, axes, lengths=None, mask=None, resets=None, reverse=False, between=None):
    """``xs (..., T, B, *spatial, I)``, ``h`` and ``c (..., L*D, B, *spatial, H)``: ``ys, h, c``.

    ``between`` are masks that multiply the outputs of each layer but the last.
    """
    steps, batch = xs.shape[-3 - axes : -1 - axes]
    taken = np.ones((steps, batch), bool) if mask is None else np.array(mask)
    resets = np.zeros((steps, batch), bool) if resets is None else resets
    if lengths is not None:
        taken &= np.arange(steps)[:, None] < lengths[None]

    def field(a, n, b):
        return a[(..., n, b, *[slice(None)] * (axes + 1))]

    def stack(fields):
        """Rows of fields as one array ``(..., n, B, *spatial, channels)``."""
        rows = [np.stack(np.broadcast_arrays(*row), axis=-2 - axes) for row in fields]
        return np.stack(np.broadcast_arrays(*rows), axis=-3 - axes)

    last_h, last_c = [], []
    for n, layer in enumerate(params.layers):
        if n > 0 and between is not None:
            xs = xs * between[n - 1]
        outputs = []
        for weights, backward in [(layer.forward, reverse), (layer.backward, not reverse)]:
            if weights is None:
                continue
            k, rows = len(last_h), []
            for b in range(batch):
                inputs = [field(xs, t, b) for t in range(steps)]
                start = field(h, k, b), field(c, k, b)
                rows.append(one_sequence(weights, inputs, *start, taken[:, b], resets[:, b], backward, axes))
            ys, hs, cs = zip(*rows)
            outputs.append(stack(zip(*ys)))
            last_h.append(hs)
            last_c.append(cs)
        xs = np.concatenate(np.broadcast_arrays(*outputs), axis=-1) if len(outputs) > 1 else outputs[0]
    return xs, stack(last_h), stack(last_c)
