"""Reference LSTM: float64 NumPy loops over layers, sequences and steps. It shares no code with the library.

Every function accepts additional leading axes before the axes that its docstring names, so one evaluation carries many
perturbed copies of the network. `gradient` differentiates by the complex step: every operation is analytic, or branches
on the real part, so ``Im f(x + i e) / e`` with a tiny ``e`` is the derivative to machine precision, without the
cancellation of a finite difference.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def matvec(w, x):
    return np.einsum("...ij,...j->...i", w, x)


def lstm_gates(z, c, peepholes, candidate_scale, normalize):
    z_i, z_f, z_g, z_o = np.split(z, 4, axis=-1)
    c = sigmoid(z_f) * c + sigmoid(z_i) * np.tanh(z_g) * candidate_scale
    return c, sigmoid(z_o) * np.tanh(normalize(c))


def peephole_gates(z, c, peepholes, candidate_scale, normalize):
    z_i, z_f, z_g, z_o = np.split(z, 4, axis=-1)
    w_i, w_f, w_o = (peepholes[..., k, :] for k in range(3))
    new_c = sigmoid(z_f + w_f * c) * c + sigmoid(z_i + w_i * c) * np.tanh(z_g) * candidate_scale
    return new_c, sigmoid(z_o + w_o * new_c) * np.tanh(normalize(new_c))


def cifg_gates(z, c, peepholes, candidate_scale, normalize):
    z_f, z_g, z_o = np.split(z, 3, axis=-1)
    f = sigmoid(z_f)
    c = f * c + (1 - f) * np.tanh(z_g) * candidate_scale
    return c, sigmoid(z_o) * np.tanh(normalize(c))


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


def one_step(cell, weights, x, h, c, candidate_scale, zoneout_h, zoneout_c):
    """Computes the new ``h`` and ``c``.

    ``candidate_scale`` multiplies the candidate. ``zoneout_h`` and ``zoneout_c`` are the share of the old value in the
    new one: 0, 1 or a rate.
    """
    z_x, z_h = matvec(weights.w_x, x), matvec(weights.w_h, h)
    norm = weights.norm
    z = z_x + z_h if norm is None else layer_norm(z_x, norm.x) + layer_norm(z_h, norm.h)
    if weights.b is not None:
        z = z + weights.b

    def normalize(c):
        if norm is None:
            return c
        return layer_norm(c, norm.c) + (0 if norm.b_c is None else norm.b_c)

    new_c, new_h = GATES[cell](z, c, weights.w_c, candidate_scale, normalize)
    if weights.w_p is not None:
        new_h = matvec(weights.w_p, new_h)
    new_c = None if c is None else zoneout_c * c + (1 - zoneout_c) * new_c
    return zoneout_h * h + (1 - zoneout_h) * new_h, new_c


def one_sequence(cell, weights, xs, h, c, step_mask, resets, backward, restart_state, regularizers):
    """Runs one direction of one layer over one sequence: ``ys, h, c``.

    ``xs (..., T, I)``, ``h (..., P)``, ``c (..., H)`` or None; ``step_mask`` and ``resets`` are ``(T,)`` bool.
    ``restart_state`` is the state after a reset. ``regularizers`` has the last three arguments of `one_step`, each with
    a leading axis T.
    """
    num_steps = xs.shape[-2]
    ys = [None] * num_steps
    for t in reversed(range(num_steps)) if backward else range(num_steps):
        if not step_mask[t]:
            ys[t] = 0 * h
            continue
        if resets[t] and not backward:
            h, c = restart_state
        h, c = one_step(cell, weights, xs[..., t, :], h, c, *(values[t] for values in regularizers))
        ys[t] = h
        if resets[t] and backward:
            h, c = restart_state
    return np.stack(np.broadcast_arrays(*ys), axis=-2), h, c


def one_direction(cell, weights, xs, h, c, step_mask, resets, backward, restart_state, regularizers):
    """Runs `one_sequence` on every row of a batch: ``xs (..., T, B, I)``, ``h (..., B, P)``, ``c (..., B, H)``.

    ``regularizers`` has three numbers or arrays ``(T, B, .)``.
    """
    num_steps, batch_size = step_mask.shape
    rows = []
    for b in range(batch_size):
        row_regularizers = [np.full(num_steps, a) if np.isscalar(a) else a[:, b] for a in regularizers]
        row_c = None if c is None else c[..., b, :]
        row = one_sequence(
            cell, weights, xs[..., b, :], h[..., b, :], row_c, step_mask[:, b], resets[:, b], backward, restart_state,
            row_regularizers,
        )  # fmt: skip
        rows.append(row)
    ys, hs, cs = zip(*rows)
    return stack(ys, -2), stack(hs, -2), None if c is None else stack(cs, -2)


def stack(arrays, axis):
    return np.stack(np.broadcast_arrays(*arrays), axis=axis)


def network(
    params,
    xs,
    h,
    c,
    *,
    cell="lstm",
    lengths=None,
    mask=None,
    resets=None,
    reverse=False,
    layer_masks=None,
    step_masks=None,
):
    """Runs all layers: ``ys, h, c``.

    Args:
      params: `jaxlstm.Params` of NumPy arrays.
      xs: ``(..., T, B, I)``.
      h: initial state ``(..., L*D, B, P)``.
      c: initial state ``(..., L*D, B, H)``, or None.
      cell: a name in `GATES`.
      lengths: ``(B,)`` int.
      mask: ``(T, B)`` bool.
      resets: ``(T, B)`` bool.
      reverse: whether time runs backward.
      layer_masks: factors of the inputs of each layer and of the outputs of the last one; None for a factor of 1.
      step_masks: for each layer, the last three arguments of `one_step`: numbers or arrays ``(D, T, B, .)``.
    """
    num_steps, batch_size = xs.shape[-3:-1]
    step_mask = np.ones((num_steps, batch_size), bool) if mask is None else np.array(mask)
    resets = np.zeros((num_steps, batch_size), bool) if resets is None else resets
    if lengths is not None:
        step_mask &= np.arange(num_steps)[:, None] < lengths[None]
    layer_masks = [None] * (len(params.layers) + 1) if layer_masks is None else layer_masks
    step_masks = [(1.0, 0.0, 0.0)] * len(params.layers) if step_masks is None else step_masks
    last_h, last_c, k = [], [], 0
    for n, layer in enumerate(params.layers):
        if layer_masks[n] is not None:
            xs = xs * layer_masks[n]
        outputs = []
        for direction, weights in enumerate((layer.forward, layer.backward)):
            if weights is None:
                continue
            initial = h[..., k, :, :], None if c is None else c[..., k, :, :]
            if params.state is None:
                restart_state = [None if a is None else 0 * a[..., 0, :] for a in initial]
            else:
                restart_state = [None if a is None else a[..., k, :] for a in params.state]
            regularizers = [a if np.isscalar(a) else a[direction] for a in step_masks[n]]
            backward = bool(direction) != reverse
            ys, new_h, new_c = one_direction(
                cell, weights, xs, *initial, step_mask, resets, backward, restart_state, regularizers
            )
            outputs.append(ys)
            last_h.append(new_h)
            last_c.append(new_c)
            k += 1
        xs = np.concatenate(np.broadcast_arrays(*outputs), axis=-1) if len(outputs) > 1 else outputs[0]
    if layer_masks[-1] is not None:
        xs = xs * layer_masks[-1]
    return xs, stack(last_h, -3), None if c is None else stack(last_c, -3)


def gradient(function, arrays):
    """Computes the gradient of a scalar function of a list of arrays by the complex step, to machine precision.

    ``function(list)`` must carry leading axes of its arrays through to its result.
    """
    tiny = 1e-100
    flat = np.concatenate([a.reshape(-1) for a in arrays]).astype(np.float64)
    perturbed = flat + 1j * tiny * np.eye(flat.size)
    offsets = np.cumsum([0, *(a.size for a in arrays)])
    parts = [perturbed[:, n : n + a.size].reshape(-1, *a.shape) for n, a in zip(offsets, arrays)]
    slopes = function(parts).imag / tiny
    return [slopes[n : n + a.size].reshape(a.shape) for n, a in zip(offsets, arrays)]
