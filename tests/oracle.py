"""The LSTM once more, as slowly and plainly as possible: float64 NumPy loops that share no code with the library.

Every function takes arrays with any leading axes in front of those named, so that one evaluation can carry many
perturbed copies of the network. Gradients come by the complex step: every operation here is analytic (or picks by the
real part), so ``Im f(x + i e) / e`` with a tiny ``e`` is the derivative to the last digit, without subtraction.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def matvec(w, x):
    return np.einsum("...ij,...j->...i", w, x)


def lstm_gates(z, c):
    z_i, z_f, z_g, z_o = np.split(z, 4, axis=-1)
    c = sigmoid(z_f) * c + sigmoid(z_i) * np.tanh(z_g)
    return c, sigmoid(z_o) * np.tanh(c)


GATES = {
    "lstm": lstm_gates,
    "rnn_tanh": lambda z, c: (c, np.tanh(z)),
    "rnn_relu": lambda z, c: (c, np.where(z.real > 0, z, 0)),
    "rnn_sigmoid": lambda z, c: (c, sigmoid(z)),
}


def one_step(cell, weights, x, h, c):
    z = matvec(weights.w_x, x) + matvec(weights.w_h, h)
    if weights.b is not None:
        z = z + weights.b
    c, h = GATES[cell](z, c)
    return (h if weights.w_p is None else matvec(weights.w_p, h)), c


def one_sequence(cell, weights, xs, h, c, taken, resets, backward):
    """``xs (..., T, I)``, ``h (..., P)``, ``c (..., H)`` or None; ``taken`` and ``resets`` ``(T,)`` bool."""
    steps = xs.shape[-2]
    ys = [None] * steps
    for t in reversed(range(steps)) if backward else range(steps):
        if not taken[t]:
            ys[t] = 0 * h
            continue
        if resets[t] and not backward:
            h, c = 0 * h, None if c is None else 0 * c
        h, c = one_step(cell, weights, xs[..., t, :], h, c)
        ys[t] = h
        if resets[t] and backward:
            h, c = 0 * h, None if c is None else 0 * c
    return np.stack(np.broadcast_arrays(*ys), axis=-2), h, c


def network(params, xs, h, c, *, cell="lstm", lengths=None, mask=None, resets=None, reverse=False, between=None):
    """``xs (..., T, B, I)``, ``h (..., L*D, B, P)``, ``c (..., L*D, B, H)`` or None: ``ys, h, c``.

    ``between`` are masks that multiply the outputs of each layer but the last.
    """
    steps, batch = xs.shape[-3:-1]
    taken = np.ones((steps, batch), bool) if mask is None else np.array(mask)
    resets = np.zeros((steps, batch), bool) if resets is None else resets
    if lengths is not None:
        taken &= np.arange(steps)[:, None] < lengths[None]
    last_h, last_c, k = [], [], 0
    for n, layer in enumerate(params.layers):
        if n > 0 and between is not None:
            xs = xs * between[n - 1]
        outputs = []
        for backward, weights in enumerate([layer.forward, layer.backward]):
            if weights is None:
                continue
            rows = [
                one_sequence(
                    cell, weights, xs[..., b, :], h[..., k, b, :], None if c is None else c[..., k, b, :],
                    taken[:, b], resets[:, b], bool(backward) != reverse,
                )
                for b in range(batch)
            ]  # fmt: skip
            ys, hs, cs = zip(*rows)
            outputs.append(np.stack(np.broadcast_arrays(*ys), axis=-2))
            last_h.append(np.stack(np.broadcast_arrays(*hs), axis=-2))
            last_c.append(None if c is None else np.stack(np.broadcast_arrays(*cs), axis=-2))
            k += 1
        xs = np.concatenate(np.broadcast_arrays(*outputs), axis=-1) if len(outputs) > 1 else outputs[0]
    h = np.stack(np.broadcast_arrays(*last_h), axis=-3)
    c = None if c is None else np.stack(np.broadcast_arrays(*last_c), axis=-3)
    return xs, h, c


def gradient(function, arrays):
    """Gradient of a scalar function of a list of arrays, to the last digit, by the complex step.

    ``function(list)`` must carry leading axes of its arrays through to its result.
    """
    tiny = 1e-100
    flat = np.concatenate([a.reshape(-1) for a in arrays]).astype(np.float64)
    perturbed = flat + 1j * tiny * np.eye(flat.size)
    pieces, start = [], 0
    for a in arrays:
        pieces.append(perturbed[:, start : start + a.size].reshape(-1, *a.shape))
        start += a.size
    slopes = function(pieces).imag / tiny
    result, start = [], 0
    for a in arrays:
        result.append(slopes[start : start + a.size].reshape(a.shape))
        start += a.size
    return result
