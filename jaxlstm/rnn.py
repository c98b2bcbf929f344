"""The general recurrent network: layers and directions of the cells in `jaxlstm.cells`, with all options."""

import math
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxlstm import cells, initializers, validation
from jaxlstm.cells import Cell, CellName
from jaxlstm.dropout import RegularizerRates, draw_masks, dropout_mask, regularizer_key
from jaxlstm.network import NO_MASKS, NO_RATES, CallArgs, RecurrentNetwork
from jaxlstm.params import Layer, Norm, State, Weights
from jaxlstm.primitives.clip_cotangent import clip_cotangent
from jaxlstm.recurrence import masking
from jaxlstm.recurrence.backends import MULTILAYER_BACKENDS, NAMES, Implementation, get_backend, load
from jaxlstm.recurrence.context import Direction, LayerInputs, Results, ScanContext
from jaxlstm.recurrence.selection import default_backend
from jaxlstm.recurrence.step import project_inputs, project_static, recurrent_step

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
class RNN(RecurrentNetwork):
    """A recurrent network of any cell, by default the vanilla one; `jaxlstm.LSTM` documents the options.

        rnn = jaxlstm.RNN(64, 256, cell="slstm", heads=4)
        params = rnn.init(jax.random.key(0))
        ys, state = rnn(params, xs)                 # xs (T, *batch, 64), ys (T, *batch, 256)

    `jaxlstm.LSTM` and `jaxlstm.GRU` are this class with another default cell.
    """

    _: KW_ONLY
    cell: CellName | Cell = "rnn"
    proj_size: int | None = None
    activation: ActivationName | None = None
    layer_norm: bool = False
    recurrent_dropout: float = 0.0
    weight_drop: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_gradient_clip: float | None = None
    heads: int = 1
    static_size: int | None = None
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
        self._set("heads", validation.positive_int("heads", self.heads))
        if self.static_size is not None:
            self._set("static_size", validation.positive_int("static_size", self.static_size))
        for name in ("recurrent_dropout", "weight_drop", "zoneout_h", "zoneout_c"):
            self._set(name, validation.rate(name, getattr(self, name)))
        if self.recurrent_gradient_clip is not None:
            clip = validation.positive_number("recurrent_gradient_clip", self.recurrent_gradient_clip)
            self._set("recurrent_gradient_clip", clip)
        if self.implementation is not None and not callable(self.implementation):
            validation.choice("implementation", self.implementation, NAMES)
        self._check_cell_options()

    def _check_cell_options(self) -> None:
        """Raises an error for options that the cell does not support."""
        cell = self.resolved_cell
        supported = {
            "recurrent_dropout": (cell.candidate is not None, "a candidate"),
            "zoneout_c": (len(cell.initial_values) == 1, "one cell state"),
            "proj_size": (not cell.reads_h, "functions that do not take h, which a projection makes of another size"),
            "static_size": (bool(cell.slabs_reading("static")), "a gate that reads static features"),
            "learned_state": (all(map(math.isfinite, cell.initial_values.values())), "finite initial states"),
        }
        for name, (is_supported, need) in supported.items():
            if getattr(self, name) and not is_supported:
                raise ValueError(f"{name}={getattr(self, name)!r} needs a cell with {need}, got cell={self.cell!r}")
        if cell.slabs_reading("static"):
            if self.static_size is None:
                raise ValueError(f"cell={self.cell!r} reads static features; set static_size to their number")
            if self.layer_norm:
                raise ValueError(f"layer_norm=True does not support a cell that reads static features: {self.cell!r}")
        if self.heads > 1:
            if cell.recurrent != "dense" or not cell.slabs_reading("h"):
                raise ValueError(f"heads={self.heads} needs a cell with dense recurrent weights, got {self.cell!r}")
            if self.proj_size is not None:
                raise ValueError(f"heads={self.heads} does not support proj_size={self.proj_size}")
            if self.hidden_size % self.heads:
                raise ValueError(f"hidden_size must be a multiple of heads={self.heads}, got {self.hidden_size}")
        if cell.recurrent == "diagonal" and self.proj_size is not None:
            raise ValueError(f"proj_size={self.proj_size} needs dense recurrent weights, got cell={self.cell!r}")

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
        cell, h, array = self.resolved_cell, self.hidden_size, self.param_shape
        rows = {source: h * len(cell.slabs_reading(source)) for source in cells.SOURCES}
        c = array(h) if len(cell.initial_values) == 1 else None
        norm = Norm(
            x=array(rows["x"]),
            h=array(rows["h"]) if rows["h"] else None,
            c=c,
            b_c=c if self.use_bias else None,
        )
        return Weights(
            w_x=array(rows["x"], input_size),
            w_h=array(rows["h"], self.output_size // self.num_heads) if rows["h"] else None,
            b=array(cell.num_gates * h) if self.use_bias else None,
            w_p=None if self.proj_size is None else array(self.output_size, h),
            w_c=array(len(cell.peepholes), h) if cell.peepholes else None,
            norm=norm if self.layer_norm else None,
            w_s=None if self.static_size is None else array(rows["static"], self.static_size),
        )

    def weight_initializers(self) -> dict[str, initializers.Initializer]:
        """Returns the initializers of the matrices."""
        cell = self.resolved_cell
        x, h, static = (len(cell.slabs_reading(source)) for source in cells.SOURCES)
        diagonal = cell.recurrent == "diagonal"
        return {
            "w_x": initializers.glorot_uniform(x),
            "w_h": jax.nn.initializers.uniform(1.0) if diagonal else initializers.orthogonal(h * self.heads),
            "w_p": initializers.glorot_uniform(1),
            "w_s": initializers.glorot_uniform(static),
        }

    @property
    def num_static(self) -> int | None:
        """S, the number of static features; None if the cell does not read them."""
        return self.static_size

    @property
    def num_heads(self) -> int:
        """Number of blocks of a block-diagonal ``W_h``: H if it is diagonal."""
        return self.hidden_size if self.resolved_cell.recurrent == "diagonal" else self.heads

    def project_static(self, layer: Layer, static: Array | None) -> Array | None:
        """Returns ``W_s s`` for each direction of a layer, ``(D, *batch, G*H)``; None without static features."""
        if static is None:
            return None
        project = partial(project_static, static=static, dtype=self.output_dtype, accum_dtype=self.state_dtype)
        return jnp.stack([project(weights) for weights in layer.directions])

    @partial(jax.jit, static_argnums=(0, 2))
    def _apply(self, args: CallArgs, reverse: bool) -> tuple[Array, State]:
        if self.implementation in MULTILAYER_BACKENDS and len(args.xs) > 0:
            return self._run_stack(args, reverse)
        return self.scan_layers(args, reverse, self.run_layer)

    def _run_stack(self, args: CallArgs, reverse: bool) -> tuple[Array, State]:
        """Runs all layers by one call of a backend for stacks.

        With dropout or residual connections between layers, there is one call per layer.
        """
        run_stack = load(MULTILAYER_BACKENDS[str(self.implementation)])
        context, key = self.scan_context(self.regularizer_rates), args.key

        def run_layers(layers: tuple[Layer, ...], xs: Array, state: State, inputs: LayerInputs) -> tuple[Array, State]:
            folded = masking.fold_batch(xs, state, inputs, batch_axes=xs.ndim - 2)
            ys, state = run_stack(self.resolved_cell, layers, *folded, context=context, reverse=reverse)
            return masking.unfold_batch(ys, state, inputs.step_mask, xs.shape[1:-1])

        if self.residual or (key is not None and self.dropout > 0.0):
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
        rates, sizes = self.regularizer_rates, (self.output_size, self.hidden_size)
        masks = draw_masks(regularizer_key(key, n, 1), rates, self.num_directions, xs, *sizes)
        return self._drop_weights(regularizer_key(key, n, 2), layer), inputs._replace(masks=masks)

    def _drop_weights(self, key: Array | None, layer: Layer) -> Layer:
        """Returns a layer with recurrent weights dropped."""
        if key is None or self.weight_drop == 0.0 or layer.forward.w_h is None:
            return layer
        keys = jax.random.split(key, self.num_directions)
        dropped = [
            w._replace(w_h=w.w_h * dropout_mask(k, self.weight_drop, w.w_h.shape, w.w_h.dtype))
            for k, w in zip(keys, layer.directions)
        ]
        return Layer(*dropped)

    def scan_context(self, rates: RegularizerRates = NO_RATES) -> ScanContext:
        """Returns the options of a backend."""
        return super().scan_context(rates)._replace(gradient_clip=self.recurrent_gradient_clip)

    def run_directions(self, directions: tuple[Direction, ...]) -> Results:
        """Runs the directions of a layer by the backend."""
        backend = get_backend(self.implementation or default_backend(jax.default_backend()))
        return backend(self.resolved_cell, directions, self.scan_context(self.regularizer_rates))

    def layer_step(self, weights: Weights, x: Array, state: State, z_static: Array | None = None) -> State:
        """Takes one step of one layer without regularizers: from its input and the state to the new state."""
        cell, dtype, rates = self.resolved_cell, self.output_dtype, self.regularizer_rates
        z_x = project_inputs(weights, x, dtype, self.state_dtype)
        state = state._replace(h=clip_cotangent(state.h, self.recurrent_gradient_clip))
        return recurrent_step(cell, weights, z_x, state, dtype, rates, NO_MASKS, z_static=z_static)
