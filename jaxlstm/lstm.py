"""The LSTM: layers and directions of the cells in `jaxlstm.cells`, with all options."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Literal

import jax
from jax import Array

from jaxlstm import cells, initializers, validation
from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerRates, draw_masks, dropout_mask, regularizer_key
from jaxlstm.network import NO_MASKS, CallArgs, RecurrentNetwork
from jaxlstm.params import Layer, Norm, State, Weights
from jaxlstm.recurrence import masking
from jaxlstm.recurrence.backends import MULTILAYER_BACKENDS, NAMES, Implementation, get_backend, load
from jaxlstm.recurrence.context import Direction, LayerInputs, Results
from jaxlstm.recurrence.selection import default_backend
from jaxlstm.recurrence.step import project_inputs, recurrent_step

ActivationName = Literal["tanh", "relu", "sigmoid"]
RATES = (
    "dropout",
    "input_dropout",
    "output_dropout",
    "recurrent_dropout",
    "weight_drop",
    "zoneout_h",
    "zoneout_c",
)


@dataclass(frozen=True, repr=False)
class LSTM(RecurrentNetwork):
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
      cell: ``"lstm"``, ``"peephole"``, ``"cifg"``, ``"rnn"``, or a `jaxlstm.Cell`.
      use_bias: whether ``z`` has a bias.
      learned_state: whether the initial state is trained; resets then restart from it.
      forget_bias: initial bias of the forget gate; None for 1 (Gers et al. 2000; Jozefowicz et al. 2015).
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
      implementation: the backend of the recurrence: a name in `jaxlstm.recurrence.BACKENDS` or
        `jaxlstm.recurrence.MULTILAYER_BACKENDS`, a backend with options such as `jaxlstm.recurrence.fused.Fused`,
        or None to pick one (`jaxlstm.recurrence.explain` says which and why). A named backend runs or raises. The
        backends ``"newton"``, ``"pallas"`` and ``"cudnn"`` are experimental.

    Raises:
      ValueError, TypeError: for an option that is out of range, unknown or of the wrong type.
    """

    _: KW_ONLY
    proj_size: int | None = None
    activation: ActivationName | None = None
    layer_norm: bool = False
    recurrent_dropout: float = 0.0
    weight_drop: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        if self.activation is not None:
            if self.cell != "rnn":
                raise ValueError(f"activation={self.activation!r} belongs to cell='rnn', got cell={self.cell!r}")
            validation.choice("activation", self.activation, cells.RNN)
        super().__post_init__()
        if self.proj_size is not None:
            self._set("proj_size", validation.positive_int("proj_size", self.proj_size))
        self._set("layer_norm", validation.flag("layer_norm", self.layer_norm))
        for name in ("recurrent_dropout", "weight_drop", "zoneout_h", "zoneout_c"):
            self._set(name, validation.rate(name, getattr(self, name)))
        if self.implementation is not None and not callable(self.implementation):
            validation.choice("implementation", self.implementation, NAMES)
        self._check_cell_options()

    def _check_cell_options(self) -> None:
        """Raises an error for options that the cell does not support."""
        cell = self.resolved_cell
        supported = {
            "recurrent_dropout": (cell.candidate is not None, "a candidate"),
            "zoneout_c": (cell.has_cell_state, "a cell state"),
        }
        for name, (is_supported, need) in supported.items():
            if getattr(self, name) and not is_supported:
                raise ValueError(f"{name}={getattr(self, name)!r} needs a cell with {need}, got cell={self.cell!r}")

    @property
    def cell_names(self) -> tuple[str, ...]:
        """The names that ``cell`` may have."""
        return (*cells.CELLS, "rnn")

    @property
    def resolved_cell(self) -> Cell:
        """The `jaxlstm.Cell` that ``cell`` and ``activation`` name."""
        return cells.RNN[self.activation or "tanh"] if self.cell == "rnn" else super().resolved_cell

    @property
    def output_size(self) -> int:
        """P, the size of h."""
        return self.hidden_size if self.proj_size is None else self.proj_size

    @property
    def regularizer_rates(self) -> RegularizerRates:
        """Rates of the regularizers inside the recurrence."""
        return RegularizerRates(self.recurrent_dropout, self.zoneout_h, self.zoneout_c)

    def feature_shape(self, size: int) -> tuple[int, ...]:
        """Returns ``(size,)``."""
        return (size,)

    def weight_shapes(self, input_size: int) -> Weights:
        """Returns the shape and dtype of the weights of one direction of a layer with this input size."""
        cell, h, p, array = self.resolved_cell, self.hidden_size, self.output_size, self.param_shape
        rows = cell.num_gates * h
        c = array(h) if cell.has_cell_state else None
        norm = Norm(x=array(rows), h=array(rows), c=c, b_c=c if self.use_bias else None)
        return Weights(
            w_x=array(rows, input_size),
            w_h=array(rows, p),
            b=array(rows) if self.use_bias else None,
            w_p=None if self.proj_size is None else array(p, h),
            w_c=array(len(cell.peepholes), h) if cell.peepholes else None,
            norm=norm if self.layer_norm else None,
        )

    def weight_initializers(self) -> dict[str, initializers.Initializer]:
        """Returns the initializers of ``w_x``, ``w_h`` and ``w_p``."""
        num_gates = self.resolved_cell.num_gates
        return {
            "w_x": initializers.glorot_uniform(num_gates),
            "w_h": initializers.orthogonal(num_gates),
            "w_p": initializers.glorot_uniform(1),
        }

    @partial(jax.jit, static_argnums=(0, 2))
    def _apply(self, args: CallArgs, reverse: bool) -> tuple[Array, State]:
        if self.implementation in MULTILAYER_BACKENDS and len(args.xs) > 0:
            return self._run_stack(args, reverse)
        return self.scan_layers(args, reverse, self.run_layer)

    def _run_stack(self, args: CallArgs, reverse: bool) -> tuple[Array, State]:
        """Runs all layers by one call of a backend for stacks; with dropout between layers, by one call per layer."""
        run_stack = load(MULTILAYER_BACKENDS[str(self.implementation)])
        context, key = self.scan_context(self.regularizer_rates), args.key

        def run_layers(layers: tuple[Layer, ...], xs: Array, state: State, inputs: LayerInputs) -> tuple[Array, State]:
            folded = masking.fold_batch(xs, state, inputs, batch_axes=xs.ndim - 2)
            ys, state = run_stack(self.resolved_cell, layers, *folded, context=context, reverse=reverse)
            return masking.unfold_batch(ys, state, inputs.step_mask, xs.shape[1:-1])

        if key is not None and self.dropout > 0.0:
            return self.scan_layers(
                args, reverse, lambda layer, xs, state, inputs, _: run_layers((layer,), xs, state, inputs)
            )
        state, inputs = self.prepare_layers(args)
        xs = self.drop_inputs(key, args.xs)
        layers = [self.regularize_layer(n, layer, inputs, xs, key) for n, layer in enumerate(args.params.layers)]
        ys, state = run_layers(tuple(layer for layer, _ in layers), xs, state, layers[0][1])
        return self.drop_outputs(key, ys), state

    def regularize_layer(
        self, n: int, layer: Layer, inputs: LayerInputs, xs: Array, key: Array | None
    ) -> tuple[Layer, LayerInputs]:
        """Returns a layer with dropped recurrent weights, and its inputs with the masks of the regularizers."""
        leading = (self.num_directions, *xs.shape[:-1])
        c_size = self.hidden_size if self.resolved_cell.has_cell_state else None
        masks = draw_masks(regularizer_key(key, n, 1), self.regularizer_rates, leading, self.output_size, c_size)
        return self._drop_weights(regularizer_key(key, n, 2), layer), inputs._replace(masks=masks)

    def _drop_weights(self, key: Array | None, layer: Layer) -> Layer:
        """Returns a layer with recurrent weights dropped."""
        if key is None or self.weight_drop == 0.0:
            return layer
        keys = jax.random.split(key, self.num_directions)
        dropped = [
            w._replace(w_h=w.w_h * dropout_mask(k, self.weight_drop, w.w_h.shape, w.w_h.dtype))
            for k, w in zip(keys, layer.directions)
        ]
        return Layer(*dropped)

    def run_directions(self, directions: tuple[Direction, ...]) -> Results:
        """Runs the directions of a layer by the backend."""
        backend = get_backend(self.implementation or default_backend(jax.default_backend()))
        return backend(self.resolved_cell, directions, self.scan_context(self.regularizer_rates))

    def layer_step(self, weights: Weights, x: Array, state: State) -> State:
        """Takes one step of one layer without regularizers: from its input and the state to the new state."""
        dtype = self.output_dtype
        z_x = project_inputs(weights, x, dtype, self.state_dtype)
        return recurrent_step(self.resolved_cell, weights, z_x, state, dtype, self.regularizer_rates, NO_MASKS)
