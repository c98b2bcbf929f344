"""The LSTM and the GRU: the general recurrent network with another default cell."""

from dataclasses import KW_ONLY, dataclass

from jaxlstm.cells import Cell, CellName
from jaxlstm.rnn import RNN


@dataclass(frozen=True, repr=False)
class LSTM(RNN):
    """A recurrent network: static configuration only, frozen and hashable; parameters and state are arguments.

        lstm = jaxlstm.LSTM(64, 256, num_layers=2)
        params = lstm.init(jax.random.key(0))
        ys, state = lstm(params, xs)                # xs (T, *batch, 64), ys (T, *batch, 256)

    `jaxlstm.params` has the shape letters, `jaxlstm.cells` the equations. A ``key`` in the call turns on the random
    regularizers; dropout scales the elements it keeps by 1 / (1 - rate).

    Args:
      input_size: I.
      hidden_size: H.
      num_layers: L.
      bidirectional: adds a second direction that runs backward in time; D is 2 and outputs are concatenated.
      cell: a name in `jaxlstm.cells.CELLS`, ``"rnn"``, or a `jaxlstm.Cell`. `jaxlstm.RNN` and `jaxlstm.GRU` are this
        class with another default.
      use_bias: whether ``z`` has a bias.
      learned_state: whether the initial state is trained; resets then restart from it.
      forget_bias: initial bias of the forget gate; None for the default of the cell: 1 for the LSTM (Gers et al. 2000;
        Jozefowicz et al. 2015), a power law for ``"slstm"``.
      chrono: longest expected dependency, in steps: draws the initial biases of forget and input gate accordingly
        (Tallec & Ollivier 2018).
      dropout: dropout rate of the outputs of every layer but the last.
      input_dropout: dropout rate of the inputs, with one mask for all steps (Gal & Ghahramani 2016).
      output_dropout: dropout rate of the outputs of the last layer, with one mask for all steps.
      variational: whether ``dropout`` has one mask for all steps, too.
      dtype: dtype of matrix products and outputs; None for ``param_dtype``. Sums, gates and state are float32 or wider.
      param_dtype: dtype of the parameters.
      remat: number of steps per chunk for rematerialization: only the state between chunks is saved for the backward
        pass, the rest is recomputed.
      unroll: steps per iteration of the compiled loop.
      proj_size: P, the size to which h is projected (Sak, Senior & Beaufays 2014); None for no projection.
      activation: of ``cell="rnn"``: ``"tanh"`` (if None), ``"relu"`` or ``"sigmoid"``.
      layer_norm: normalizes ``W_x x``, ``W_h h`` and, on its way to h, c (Ba, Kiros & Hinton 2016).
      recurrent_dropout: dropout rate of the candidates (Semeniuta, Severyn & Barth 2016).
      weight_drop: dropout rate of the recurrent weights, drawn once per call (Merity et al. 2018).
      zoneout_h: rate at which units of h keep their old value: at random with a key, in expectation without (Krueger et
        al. 2017).
      zoneout_c: the same for c.
      recurrent_gradient_clip: limit of the gradient with respect to the h that a step reads, per number, in every step
        of backpropagation through time (Pöppel, Beck & Hochreiter 2024); None for no limit. The gradient of c is not
        clipped, and forward mode is exact. One exploding sequence then does not scale down the gradient of the others,
        as a limit of the global norm does.
      heads: number of blocks of a block-diagonal ``W_h``: a unit reads the h of its own block alone.
      static_size: S, number of static features, for a cell that reads them such as ``"ea"``.
      implementation: the backend of the recurrence: a name in `jaxlstm.recurrence.BACKENDS` or
        `jaxlstm.recurrence.MULTILAYER_BACKENDS`, a backend with options such as `jaxlstm.recurrence.fused.Fused`,
        or None to pick one (`jaxlstm.recurrence.explain` says which and why). A named backend runs or raises. The
        backends ``"associative"``, ``"newton"``, ``"pallas"`` and ``"cudnn"`` are experimental.

    Raises:
      ValueError, TypeError: for an option that is out of range, unknown or of the wrong type.
    """

    _: KW_ONLY
    cell: CellName | Cell = "lstm"


@dataclass(frozen=True, repr=False)
class GRU(RNN):
    """The gated recurrent unit of Cho et al. 2014; `jaxlstm.LSTM` documents the options.

        gru = jaxlstm.GRU(64, 256)
        params = gru.init(jax.random.key(0))
        ys, state = gru(params, xs)                 # state.c is None: the memory of a GRU is h

    The reset gate is applied after the product with ``W_h``, as in cuDNN, PyTorch, Flax and Keras.
    """

    _: KW_ONLY
    cell: CellName | Cell = "gru"
