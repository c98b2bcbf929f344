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


def lstm_gates(z, c, w, keep, norm):
    z_i, z_f, z_g, z_o = np.split(z, 4, axis=-1)
    c = sigmoid(z_f) * c + sigmoid(z_i) * np.tanh(z_g) * keep
    return c, sigmoid(z_o) * np.tanh(norm(c))


def peephole_gates(z, c, w, keep, norm):
    z_i, z_f, z_g, z_o = np.split(z, 4, axis=-1)
    w_i, w_f, w_o = w[..., 0, :], w[..., 1, :], w[..., 2, :]
    new = sigmoid(z_f + w_f * c) * c + sigmoid(z_i + w_i * c) * np.tanh(z_g) * keep
    return new, sigmoid(z_o + w_o * new) * np.tanh(norm(new))


def cifg_gates(z, c, w, keep, norm):
    z_f, z_g, z_o = np.split(z, 3, axis=-1)
    f = sigmoid(z_f)
    c = f * c + (1 - f) * np.tanh(z_g) * keep
    return c, sigmoid(z_o) * np.tanh(norm(c))


GATES = {
    "lstm": lstm_gates,
    "peephole": peephole_gates,
    "cifg": cifg_gates,
    "rnn_tanh": lambda z, c, *_: (c, np.tanh(z)),
    "rnn_relu": lambda z, c, *_: (c, np.where(z.real > 0, z, 0)),
    "rnn_sigmoid": lambda z, c, *_: (c, sigmoid(z)),
}


def layer_norm(x, gain):
    x = x - x.mean(-1, keepdims=True)
    return gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def one_step(cell, weights, x, h, c, keep, held_h, held_c):
    """``keep`` scales the candidate; ``held`` is the share of the old in the new state, 0 or 1 or a rate."""
    z_x, z_h = matvec(weights.w_x, x), matvec(weights.w_h, h)
    norm = weights.norm
    z = z_x + z_h if norm is None else layer_norm(z_x, norm.x) + layer_norm(z_h, norm.h)
    if weights.b is not None:
        z = z + weights.b

    def norm_c(c):
        if norm is None:
            return c
        return layer_norm(c, norm.c) + (0 if norm.b_c is None else norm.b_c)

    new_c, new_h = GATES[cell](z, c, weights.w_c, keep, norm_c)
    if weights.w_p is not None:
        new_h = matvec(weights.w_p, new_h)
    new_c = None if c is None else held_c * c + (1 - held_c) * new_c
    return held_h * h + (1 - held_h) * new_h, new_c


def one_sequence(cell, weights, xs, h, c, taken, resets, backward, start, noise):
    """``xs (..., T, I)``, ``h (..., P)``, ``c (..., H)`` or None; ``taken`` and ``resets`` ``(T,)`` bool.

    ``start`` is the state after a reset, ``noise`` the last three arguments of `one_step`, each with a leading T.
    """
    steps = xs.shape[-2]
    ys = [None] * steps
    for t in reversed(range(steps)) if backward else range(steps):
        if not taken[t]:
            ys[t] = 0 * h
            continue
        if resets[t] and not backward:
            h, c = start
        h, c = one_step(cell, weights, xs[..., t, :], h, c, *(n[t] for n in noise))
        ys[t] = h
        if resets[t] and backward:
            h, c = start
    return np.stack(np.broadcast_arrays(*ys), axis=-2), h, c


def network(
    params, xs, h, c, *, cell="lstm", lengths=None, mask=None, resets=None, reverse=False, between=None, noise=None
):
    """``xs (..., T, B, I)``, ``h (..., L*D, B, P)``, ``c (..., L*D, B, H)`` or None: ``ys, h, c``.

    ``between`` are masks that multiply the inputs of each layer and the outputs of the last, None for one that is not
    there; ``noise`` holds for each layer the last three arguments of `one_step`, ``(D, T, B, .)`` each or a number.
    """
    steps, batch = xs.shape[-3:-1]
    taken = np.ones((steps, batch), bool) if mask is None else np.array(mask)
    resets = np.zeros((steps, batch), bool) if resets is None else resets
    if lengths is not None:
        taken &= np.arange(steps)[:, None] < lengths[None]
    between = [None] * (len(params.layers) + 1) if between is None else between
    noise = [(1.0, 0.0, 0.0)] * len(params.layers) if noise is None else noise
    last_h, last_c, k = [], [], 0
    for n, layer in enumerate(params.layers):
        if between[n] is not None:
            xs = xs * between[n]
        outputs = []
        for backward, weights in enumerate([layer.forward, layer.backward]):
            if weights is None:
                continue
            if params.state is None:
                start = 0 * h[..., k, 0, :], None if c is None else 0 * c[..., k, 0, :]
            else:
                start = params.state.h[..., k, :], None if c is None else params.state.c[..., k, :]

            def of(part, b, backward=backward):
                return np.full(steps, part) if np.isscalar(part) else part[backward, :, b]

            rows = [
                one_sequence(
                    cell, weights, xs[..., b, :], h[..., k, b, :], None if c is None else c[..., k, b, :],
                    taken[:, b], resets[:, b], bool(backward) != reverse, start, [of(part, b) for part in noise[n]],
                )
                for b in range(batch)
            ]  # fmt: skip
            ys, hs, cs = zip(*rows)
            outputs.append(np.stack(np.broadcast_arrays(*ys), axis=-2))
            last_h.append(np.stack(np.broadcast_arrays(*hs), axis=-2))
            last_c.append(None if c is None else np.stack(np.broadcast_arrays(*cs), axis=-2))
            k += 1
        xs = np.concatenate(np.broadcast_arrays(*outputs), axis=-1) if len(outputs) > 1 else outputs[0]
    if between[-1] is not None:
        xs = xs * between[-1]
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
