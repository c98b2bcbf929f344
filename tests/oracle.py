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


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def gru_gates(z, h):
    z_r, z_u, n_x, n_h = np.split(z, 4, axis=-1)
    u = sigmoid(z_u)
    return (1 - u) * np.tanh(n_x + sigmoid(z_r) * n_h) + u * h


def minlstm_gates(z, h, candidate_scale):
    z_i, z_f, g = np.split(z, 3, axis=-1)
    i, f = sigmoid(z_i), sigmoid(z_f)
    return (f * h + i * g * candidate_scale) / (f + i)


def mingru_gates(z, h, candidate_scale):
    z_u, g = np.split(z, 2, axis=-1)
    u = sigmoid(z_u)
    return (1 - u) * h + u * g * candidate_scale


def slstm_gates(z, c, peepholes, candidate_scale, normalize):
    """The equations of the paper without the stabilizer, by sums of exponentials scaled by exp(m)."""
    z_i, z_f, z_g, z_o = np.split(z, 4, axis=-1)
    c, n, m = c["c"], c["n"], c["m"]
    scaled = log_sigmoid(z_f) + m
    new_m = np.where(scaled.real > z_i.real, scaled, z_i)
    keep, add = np.exp(scaled - new_m), np.exp(z_i - new_m)
    new_c, new_n = keep * c + add * np.tanh(z_g) * candidate_scale, keep * n + add
    return {"c": new_c, "n": new_n, "m": new_m}, sigmoid(z_o) * new_c / new_n


# By cell: the gates that read h and those that read x, if not all; functions of (z, h, candidate_scale).
READS = {
    "gru": ([0, 1, 2], [0, 1, 3], []),
    "minlstm": ([0, 1, 2], [], []),
    "mingru": ([0, 1], [], []),
    "ea": ([1, 2, 3], [1, 2, 3], [0]),
}
NUM_GATES = {"gru": 4, "minlstm": 3, "mingru": 2, "ea": 4}
FROM_H = {
    "gru": lambda z, h, scale: gru_gates(z, h),
    "minlstm": minlstm_gates,
    "mingru": mingru_gates,
}


def paralstm_gates(z, c, peepholes, candidate_scale, normalize):
    z_f, z_g, z_o = np.split(z, 3, axis=-1)
    w_f, w_o = (peepholes[..., k, :] for k in range(2))
    f = sigmoid(z_f + w_f * c)
    new_c = f * c + (1 - f) * np.tanh(z_g) * candidate_scale
    return new_c, sigmoid(z_o + w_o * new_c) * np.tanh(normalize(new_c))


GATES = {
    "slstm": slstm_gates,
    "paralstm": paralstm_gates,
    "ea": lstm_gates,
    "indrnn": lambda z, c, *_: (c, np.where(z.real > 0, z, 0)),
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


def block_diagonal(w, size):
    """Returns the dense matrix of recurrent weights ``(G*size, block)``."""
    block = w.shape[-1]
    if block == size:
        return w
    dense = np.zeros((*w.shape[:-1], size), w.dtype)
    for row in range(w.shape[-2]):
        start = row % size // block * block
        dense[..., row, start : start + block] = w[..., row, :]
    return dense


def one_step(cell, weights, x, h, c, candidate_scale, zoneout_h, zoneout_c, static=None):
    """Computes the new ``h`` and ``c``.

    ``candidate_scale`` multiplies the candidate. ``zoneout_h`` and ``zoneout_c`` are the share of the old value in the
    new one: 0, 1 or a rate.
    """
    z_x = matvec(weights.w_x, x)
    z_h = None if weights.w_h is None else matvec(block_diagonal(weights.w_h, h.shape[-1]), h)
    norm = weights.norm
    if norm is not None:
        z_x = layer_norm(z_x, norm.x)
        z_h = None if z_h is None else layer_norm(z_h, norm.h)
    if cell in READS:
        size = z_x.shape[-1] // len(READS[cell][0])
        slabs = [0] * NUM_GATES[cell]
        for rows, part in zip(READS[cell], (z_x, z_h, None if static is None else matvec(weights.w_s, static))):
            for k, gate in enumerate(rows):
                slabs[gate] = slabs[gate] + part[..., k * size : (k + 1) * size]
        z = np.concatenate(np.broadcast_arrays(*slabs), axis=-1)
    else:
        z = z_x + z_h
    if weights.b is not None:
        z = z + weights.b

    def normalize(c):
        if norm is None or norm.c is None:
            return c
        return layer_norm(c, norm.c) + (0 if norm.b_c is None else norm.b_c)

    if cell in FROM_H:
        new_c, new_h = None, FROM_H[cell](z, h, candidate_scale)
    else:
        new_c, new_h = GATES[cell](z, c, weights.w_c, candidate_scale, normalize)
    if weights.w_p is not None:
        new_h = matvec(weights.w_p, new_h)
    if c is not None and not isinstance(c, dict):
        new_c = zoneout_c * c + (1 - zoneout_c) * new_c
    return zoneout_h * h + (1 - zoneout_h) * new_h, new_c


def one_sequence(cell, weights, xs, h, c, step_mask, resets, backward, restart_state, regularizers, static=None):
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
        h, c = one_step(cell, weights, xs[..., t, :], h, c, *(values[t] for values in regularizers), static)
        ys[t] = h
        if resets[t] and backward:
            h, c = restart_state
    return np.stack(np.broadcast_arrays(*ys), axis=-2), h, c


def one_direction(cell, weights, xs, h, c, step_mask, resets, backward, restart_state, regularizers, static=None):
    """Runs `one_sequence` on every row of a batch: ``xs (..., T, B, I)``, ``h (..., B, P)``, ``c (..., B, H)``.

    ``regularizers`` has three numbers or arrays ``(T, B, .)``.
    """
    num_steps, batch_size = step_mask.shape
    rows = []
    for b in range(batch_size):
        row_regularizers = [np.full(num_steps, a) if np.isscalar(a) else a[:, b] for a in regularizers]
        row_c = each_state(lambda a, b=b: a[..., b, :], c)
        row = one_sequence(
            cell, weights, xs[..., b, :], h[..., b, :], row_c, step_mask[:, b], resets[:, b], backward, restart_state,
            row_regularizers, None if static is None else static[..., b, :],
        )  # fmt: skip
        rows.append(row)
    ys, hs, cs = zip(*rows)
    return stack(ys, -2), stack(hs, -2), stack_states(cs, -2)


def each_state(function, c):
    """Applies a function to the cell state, to each of several states by name, or to none."""
    if isinstance(c, dict):
        return {name: function(a) for name, a in c.items()}
    return None if c is None else function(c)


def stack_states(cs, axis):
    if isinstance(cs[0], dict):
        return {name: stack([c[name] for c in cs], axis) for name in cs[0]}
    return None if cs[0] is None else stack(cs, axis)


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
    static=None,
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
      static: ``(..., B, S)``, static features.
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
            initial = h[..., k, :, :], each_state(lambda a, k=k: a[..., k, :, :], c)
            if params.state is None:
                restart_state = [0 * initial[0][..., 0, :], each_state(lambda a: 0 * a[..., 0, :], initial[1])]
                if cell == "slstm":
                    restart_state[1]["m"] = np.full_like(restart_state[1]["n"], -np.inf)
            else:
                restart_state = [None if a is None else a[..., k, :] for a in params.state]
            regularizers = [a if np.isscalar(a) else a[direction] for a in step_masks[n]]
            backward = bool(direction) != reverse
            ys, new_h, new_c = one_direction(
                cell, weights, xs, *initial, step_mask, resets, backward, restart_state, regularizers, static
            )
            outputs.append(ys)
            last_h.append(new_h)
            last_c.append(new_c)
            k += 1
        xs = np.concatenate(np.broadcast_arrays(*outputs), axis=-1) if len(outputs) > 1 else outputs[0]
    if layer_masks[-1] is not None:
        xs = xs * layer_masks[-1]
    return xs, stack(last_h, -3), stack_states(last_c, -3)


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
