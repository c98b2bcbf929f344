"""The base class of recurrent networks: options, initialization, the call, the step and the loop over layers.

`jaxlstm.RNN` and `jaxlstm.ConvLSTM` add the shapes of their parameters, the dense part of a step and their options.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlstm import initializers, validation
from jaxlstm.cells import CELLS, Cell, CellName
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, dropout, regularizer_key
from jaxlstm.params import Layer, Norm, Params, Residual, State, Weights, output_dtype, state_dtype
from jaxlstm.primitives.pytrees import tree_concatenate, tree_index, tree_stack
from jaxlstm.recurrence import masking
from jaxlstm.recurrence.context import Direction, LayerInputs, Results, ScanContext

NO_RATES, NO_MASKS = RegularizerRates(), RegularizerMasks()


class CallArgs(NamedTuple):
    """Arguments of a call, validated."""

    params: Params
    xs: Array  # (T, *batch, *features)
    state: State | None  # initial state; None for zeros or the learned one
    lengths: Array | None  # (*batch,) int
    mask: Array | None  # (T, *batch) bool
    resets: Array | None  # (T, *batch) bool
    key: Array | None
    static: Array | None = None  # (*batch, S), static features


# (layer, xs, state, inputs, reverse) -> (ys, new state): one layer over time
RunLayer = Callable[[Layer, Array, State, LayerInputs, bool], tuple[Any, State]]
StepLayer = Callable[[int, Array], State]  # (index of the layer, x) -> new state of the layer


@dataclass(frozen=True, repr=False)
class RecurrentNetwork(ABC):
    """Base class of recurrent networks; `jaxlstm.LSTM` documents the options.

    A subclass implements `feature_shape`, `weight_shapes`, `weight_initializers`, `run_layer` and `layer_step`.
    """

    input_size: int
    hidden_size: int
    _: KW_ONLY
    num_layers: int = 1
    bidirectional: bool = False
    cell: CellName | Cell = "lstm"
    use_bias: bool = True
    learned_state: bool = False
    forget_bias: float | None = None
    chrono: int | None = None
    dropout: float = 0.0
    input_dropout: float = 0.0
    output_dropout: float = 0.0
    variational: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: int | None = None
    unroll: int = 1

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "num_layers", "unroll"):
            self._set(name, validation.positive_int(name, getattr(self, name)))
        for name in ("bidirectional", "use_bias", "learned_state", "variational"):
            self._set(name, validation.flag(name, getattr(self, name)))
        for name in ("dropout", "input_dropout", "output_dropout"):
            self._set(name, validation.rate(name, getattr(self, name)))
        self._set("param_dtype", validation.float_dtype("param_dtype", self.param_dtype))
        if self.dtype is not None:
            self._set("dtype", validation.float_dtype("dtype", self.dtype))
        if self.remat is not None:
            self._set("remat", validation.positive_int("remat", self.remat))
        if isinstance(self.cell, Cell):
            validation.cell(self.cell)
        elif callable(self.cell):
            raise TypeError(
                "cell must be a name or a jaxlstm.Cell, got a function; declare it: jaxlstm.Cell(gates, output, update)"
            )
        else:
            validation.choice("cell", self.cell, self.cell_names)
        self._check_forget_gate()
        if not self.residual:
            validation.warn_unused_dropout(self.dropout, self.num_layers, self.variational)

    def _set(self, name: str, value: Any) -> None:
        """Normalizes a field once, so that equal configurations compare equal."""
        object.__setattr__(self, name, value)

    def _check_forget_gate(self) -> None:
        """Checks the options that set the initial bias of the forget gate."""
        for name in ("forget_bias", "chrono"):
            value = getattr(self, name)
            if value is not None and self.resolved_cell.forget_gate is None:
                raise ValueError(f"{name}={value!r} needs a cell with a forget gate, got cell={self.cell!r}")
            if value is not None and not self.use_bias:
                raise ValueError(f"{name}={value!r} needs a bias, got use_bias=False")
        if self.forget_bias is not None:
            self._set("forget_bias", validation.number("forget_bias", self.forget_bias))
        if self.chrono is not None:
            self._set("chrono", validation.int_at_least("chrono", self.chrono, 3))
            if self.forget_bias is not None:
                raise ValueError("chrono and forget_bias both set the bias of the forget gate: give one of them")

    def __repr__(self) -> str:
        """Shows the sizes and the options that differ from their defaults."""
        parts = [repr(getattr(self, field.name)) for field in fields(self) if field.default is MISSING]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING:
                continue
            if value != self._normalized_default(field.name, field.default):
                is_dtype = field.name in ("dtype", "param_dtype")
                parts.append(f"{field.name}={jnp.dtype(value).name if is_dtype else repr(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _normalized_default(self, name: str, default: Any) -> Any:
        """Returns the default of a field in the form in which the field holds it."""
        del name
        return default

    # Shapes and dtypes

    @property
    def cell_names(self) -> tuple[str, ...]:
        """The names that ``cell`` may have."""
        return tuple(CELLS)

    @property
    def resolved_cell(self) -> Cell:
        """The `jaxlstm.Cell` that ``cell`` names."""
        return self.cell if isinstance(self.cell, Cell) else CELLS[self.cell]

    @property
    def output_size(self) -> int:
        """P, the size of h."""
        return self.hidden_size

    @property
    def residual(self) -> bool:
        """Whether layers add to their inputs; False but for a `jaxlstm.ResidualStack`."""
        return False

    @property
    def layer_input_sizes(self) -> tuple[int, ...]:
        """Input size of each layer."""
        return (self.input_size, *[self.num_directions * self.output_size] * (self.num_layers - 1))

    @property
    def num_directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    @property
    def output_dtype(self) -> jnp.dtype:
        """Dtype of matrix products and outputs."""
        return output_dtype(self.dtype, self.param_dtype)

    @property
    def state_dtype(self) -> jnp.dtype:
        """Dtype of the state, the gates and all sums: float32 or wider."""
        return state_dtype(self.dtype, self.param_dtype)

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(self.param_shapes()))

    @abstractmethod
    def feature_shape(self, size: int) -> tuple[int, ...]:
        """Returns the axes of an array with ``size`` features that follow the batch axes."""

    @abstractmethod
    def weight_shapes(self, input_size: int) -> Weights:
        """Returns the shape and dtype of the weights of one direction of a layer with this input size."""

    def residual_shapes(self) -> Residual | None:
        """Returns the shape and dtype of the parameters around the layers; None for a network without them."""
        return None

    def param_shape(self, *shape: int) -> Any:
        """Returns a parameter's shape and dtype, a `jax.ShapeDtypeStruct`."""
        return jax.ShapeDtypeStruct(shape, self.param_dtype)

    @abstractmethod
    def weight_initializers(self) -> Mapping[str, initializers.Initializer]:
        """Returns the initializers of the random arrays by the names of `Weights`; those of ``b`` are added."""

    def param_shapes(self) -> Params:
        """Returns the shape and dtype of every parameter, as `jax.ShapeDtypeStruct`."""
        return _param_shapes(self)

    def state_shapes(self, batch_shape: tuple[int, ...] = ()) -> State:
        """Returns the shape and dtype of the state for these batch axes, as `jax.ShapeDtypeStruct`."""
        return _state_shapes(self, batch_shape)

    def summary(self) -> None:
        """Prints every parameter array with its shape and number of elements, and the total."""
        rows = []
        for path, a in jax.tree_util.tree_flatten_with_path(self.param_shapes())[0]:
            rows.append((jax.tree_util.keystr(path).lstrip("."), str(a.shape), f"{int(np.prod(a.shape)):,}"))
        rows.append(("total", str(jnp.dtype(self.param_dtype).name), f"{self.num_parameters:,}"))
        widths = [max(len(row[n]) for row in rows) for n in range(3)]
        print(self)
        for name, shape, count in rows:
            print(f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}")

    # Initialization

    def init(self, key: Array) -> Params:
        """Initializes the parameters, in ``param_dtype``.

        Input weights and projections are Glorot-uniform and recurrent weights orthogonal, separately for each gate.
        Biases are zero, except that the forget gate's is ``forget_bias`` or 1; with ``chrono`` the biases of forget and
        input gate are drawn. Gains of layer normalization are 1. Peepholes and a learned state are zero.

        Args:
          key: PRNG key.
        """
        validation.key(key)
        self._check_dtypes()
        shapes = self.param_shapes()
        initialize = {**self.weight_initializers(), "b": None}
        names = [name for name in Weights._fields if name in initialize]
        weights = [w for layer in shapes.layers for w in layer.directions]
        keys = iter(jax.random.split(key, sum(getattr(w, name) is not None for w in weights for name in names)))

        def init_weights(shapes: Weights, n: int) -> Weights:
            arrays = {name: getattr(shapes, name) for name in names}
            drawn = {
                name: (initialize[name] or self._bias_initializer(n))(next(keys), a.shape, a.dtype)
                for name, a in arrays.items()
                if a is not None
            }
            return shapes._replace(**{"w_c": _zeros(shapes.w_c), "norm": _init_norm(shapes.norm)} | drawn)

        layers = tuple(Layer(*(init_weights(w, n) for w in layer.directions)) for n, layer in enumerate(shapes.layers))
        return Params(layers, None if shapes.state is None else self._fill_state(shapes.state))

    def _bias_initializer(self, n: int) -> initializers.Initializer:
        """Returns the initializer of the bias of layer ``n``."""
        cell = self.resolved_cell
        forget_gate = cell.slab(cell.forget_gate)
        if self.chrono is not None and forget_gate is not None:
            return initializers.chrono(cell.num_gates, forget_gate, cell.slab(cell.input_gate), self.chrono)
        value = cell.forget_bias if self.forget_bias is None else self.forget_bias
        if isinstance(value, str) and forget_gate is not None:
            depth = n / max(self.num_layers - 1, 1)
            return initializers.power_law_forget_bias(cell.num_gates, forget_gate, self.num_heads, depth)
        return initializers.forget_bias(cell.num_gates, forget_gate, float(value))

    def _fill_state(self, shapes: State) -> State:
        """Returns the state at its initial values: zeros, but for a cell that declares others."""
        cell, h = self.resolved_cell, _zeros(shapes.h)
        states, values = cell.states_by_name(shapes.c), cell.initial_values
        filled = {name: jnp.full(a.shape, values[name], a.dtype) for name, a in states.items()}
        return State(h, cell.pack_states(filled))

    def initial_state(self, batch_shape: int | tuple[int, ...] = (), params: Params | None = None) -> State:
        """Returns the state before the first step: the initial values of the cell (zeros), or the learned state.

        Args:
          batch_shape: the batch axes; an int for one axis.
          params: from `init`; needed if the initial state is learned, ignored otherwise.

        Returns:
          h ``(L*D, *batch, P)`` and c ``(L*D, *batch, H)`` (None for a cell without it, a dict for a cell with several
          states), float32 or wider; for a convolutional network with the spatial axes before the channels.

        Raises:
          ValueError, TypeError: if the state is learned and ``params`` is missing or not of this configuration.
        """
        self._check_dtypes()
        batch = validation.sizes("batch_shape", batch_shape)
        if self.learned_state:
            if params is None:
                raise ValueError("initial_state needs params, which hold the state with learned_state=True")
            self.check_params(params)
        return self._initial_state(batch, params)

    def _initial_state(self, batch: tuple[int, ...], params: Params | None) -> State:
        shapes = self.state_shapes(batch)
        if params is None or params.state is None:
            return self._fill_state(shapes)

        def over_batch(a: Array, like: Any) -> Array:
            a = a.reshape(a.shape[0], *[1] * len(batch), *a.shape[1:])
            return jnp.broadcast_to(a, like.shape).astype(like.dtype)

        return jax.tree.map(over_batch, params.state, shapes)

    # Running

    def __call__(
        self,
        params: Params,
        xs: Float[ArrayLike, "T *batch_and_features"],
        state: State | tuple[Any, Any] | None = None,
        *,
        lengths: Int[ArrayLike, "*batch"] | None = None,
        mask: Bool[ArrayLike, "T *batch"] | None = None,
        resets: Bool[ArrayLike, "T *batch"] | None = None,
        reverse: bool = False,
        key: Array | None = None,
        static: Float[ArrayLike, "*batch S"] | None = None,
    ) -> tuple[Float[Array, "T *batch_and_outputs"], State]:
        """Runs all layers over a sequence.

        ``lengths``, ``mask`` and ``resets`` combine. A skipped step does not exist: its input is never read, not even
        for gradients, its output is zero, the state passes it unchanged, and a reset marked on it has no effect. For a
        convolutional network they apply to whole fields.

        Args:
          params: from `init`.
          xs: inputs ``(T, *batch, I)``; for a convolutional network ``(T, *batch, *spatial, I)``. They are cast to
            ``dtype`` before a matrix product.
          state: initial state, a `State` or a tuple ``(h, c)``; if None zeros, or the learned state.
          lengths: steps at and past the length are skipped; length 0 returns the initial state.
          mask: steps where it is False are skipped.
          resets: True marks the first step of a new sequence: the state is zero, or the learned one, before it; in a
            direction that runs backward, after it.
          reverse: time runs backward from each sequence's own last step; outputs stay aligned with inputs.
          key: PRNG key that turns the random regularizers on; without it the call is deterministic, and zoneout takes
            its expectation.
          static: features of each sequence that do not change over time, for a cell that reads them.

        Returns:
          ``(ys, state)``: outputs of the last layer ``(T, *batch, D*P)`` in ``dtype``, and the state after the last
          step.

        Raises:
          ValueError, TypeError: while tracing, for a wrong shape, size, dtype or type.
        """
        args = self.check_call(params, xs, state, lengths=lengths, mask=mask, resets=resets, key=key, static=static)
        return self._apply(args, validation.flag("reverse", reverse))

    def step(
        self,
        params: Params,
        state: State | tuple[Any, Any],
        x: Float[ArrayLike, "*batch_and_features"],
        *,
        reset: Bool[ArrayLike, "*batch"] | None = None,
        static: Float[ArrayLike, "*batch S"] | None = None,
    ) -> tuple[State, Float[Array, "*batch_and_outputs"]]:
        """Takes one step of all layers, without regularizers, for streaming and reinforcement learning.

        It computes the equations directly, whichever ``implementation`` is set: backends run whole sequences. The
        result is in the order of a `jax.lax.scan` body: ``jax.lax.scan(partial(lstm.step, params), state, xs)``.

        Args:
          params: from `init`.
          state: from `initial_state`, from a call or from the previous step. The new state is a `State`; a scan
            needs one to start from.
          x: input of this step.
          reset: the state is zero, or the learned one, before this step where it is True.
          static: as in the call.

        Returns:
          ``(state, y)``.

        Raises:
          ValueError, TypeError: while tracing, for a wrong shape, size, dtype or type, or a bidirectional network.
        """
        if self.bidirectional:
            raise ValueError(
                "step does not support bidirectional=True: the backward direction needs the whole sequence"
            )
        self._check_dtypes()
        self.check_params(params)
        if isinstance(x, tuple) and not isinstance(state, tuple):
            raise TypeError(
                "step takes params, state and x in this order, "
                f"got state={validation.describe(state)} and x={validation.describe(x)}"
            )
        x = validation.inputs("x", x, self.feature_shape(self.input_size), "*batch")
        batch = x.shape[: x.ndim - self._num_feature_axes]
        why = f" (x, of shape {list(x.shape)}, is one step; calling the network takes a sequence)"
        state = validation.state(state, self.state_shapes(batch), why)
        reset = None if reset is None else validation.array("reset", reset, jnp.bool_, batch)
        return self._step(params, state, x, reset, self._check_static(static, batch))

    def check_params(self, params: Any) -> None:
        """Raises a ValueError or TypeError if ``params`` are not parameters of this configuration."""
        validation.params(params, self.param_shapes(), self.state_dtype)

    def check_call(
        self,
        params: Params,
        xs: Any,
        state: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        resets: Any = None,
        key: Array | None = None,
        static: Any = None,
    ) -> CallArgs:
        """Validates the arguments of a call.

        Raises:
          ValueError, TypeError: for a wrong shape, size, dtype or type.
        """
        self._check_dtypes()
        self.check_params(params)
        xs = validation.inputs("xs", xs, self.feature_shape(self.input_size), "T, *batch")
        num_steps, *axes = xs.shape[: xs.ndim - self._num_feature_axes]
        batch = tuple(axes)
        if state is not None:
            state = validation.state(state, self.state_shapes(batch), f" (xs has shape {list(xs.shape)})")
        masks = validation.step_masks(lengths, mask, resets, num_steps, batch)
        if key is not None:
            validation.key(key)
        return CallArgs(params, xs, state, *masks, key, self._check_static(static, batch))

    def _check_static(self, static: Any, batch: tuple[Any, ...]) -> Array | None:
        """Returns the static features ``(*batch, S)``; None for a network without them."""
        if (static is None) != (self.num_static is None):
            expected = "no static features" if self.num_static is None else f"shape {[*batch, self.num_static]}"
            raise ValueError(
                f"static must have {expected} with cell={self.cell!r}, got "
                f"{'none' if static is None else validation.describe(static)}"
            )
        if static is None or self.num_static is None:
            return None
        return validation.array("static", static, jnp.floating, (*batch, self.num_static))

    @partial(jax.jit, static_argnums=(0, 2))
    def _apply(self, args: CallArgs, reverse: bool) -> tuple[Array, State]:
        # Compiled here, so that a call outside of `jit` also compiles once per shape.
        return self.scan_layers(args, reverse, self.run_layer)

    def scan_layers(self, args: CallArgs, reverse: bool, run_layer: RunLayer) -> tuple[Any, State]:
        """Runs the layers one after the other, with dropout before, between and after them.

        Args:
          args: from `check_call`.
          reverse: whether time runs backward.
          run_layer: runs one layer over time; `run_layer` of this network, or a function that also records.

        Returns:
          outputs of the last layer, and the final state of all layers.
        """
        key = args.key
        state, inputs = self.prepare_layers(args)
        ys = self.drop_inputs(key, args.xs)
        last = []
        for n in range(self.num_layers):
            if n > 0:
                between = None if key is None else jax.random.fold_in(key, n)
                ys = dropout(between, self.dropout, ys, over_time=not self.variational)
            ys, new_state = self.scan_layer(n, args, ys, state, inputs, reverse, run_layer)
            last.append(new_state)
        return self.drop_outputs(key, ys), tree_concatenate(last)

    def scan_layer(
        self,
        n: int,
        args: CallArgs,
        xs: Array,
        state: State,
        inputs: LayerInputs,
        reverse: bool,
        run_layer: RunLayer,
    ) -> tuple[Any, State]:
        """Runs layer ``n``.

        Args:
          n: index of the layer.
          args: from `check_call`.
          xs: inputs of the layer.
          state: initial state of all layers, from `prepare_layers`.
          inputs: masks of all layers, from `prepare_layers`.
          reverse: whether time runs backward.
          run_layer: runs one layer over time.

        Returns:
          outputs of the layer, and its final state.
        """
        rows = slice(n * self.num_directions, (n + 1) * self.num_directions)
        inputs = inputs._replace(restart_state=tree_index(inputs.restart_state, rows))
        layer, inputs = self.regularize_layer(n, args.params.layers[n], inputs, xs, args.key)
        inputs = inputs._replace(z_static=self.project_static(layer, args.static))
        return run_layer(layer, xs, tree_index(state, rows), inputs, reverse)

    def drop_inputs(self, key: Array | None, xs: Array) -> Array:
        """Returns the inputs of the first layer: cast to ``dtype``, with ``input_dropout``."""
        return dropout(regularizer_key(key, 0, 3), self.input_dropout, xs.astype(self.output_dtype), over_time=False)

    def drop_outputs(self, key: Array | None, ys: Any) -> Any:
        """Returns the outputs of the last layer with ``output_dropout``."""
        return dropout(regularizer_key(key, 0, 4), self.output_dropout, ys, over_time=False)

    def prepare_layers(self, args: CallArgs) -> tuple[State, LayerInputs]:
        """Returns the initial state and the masks of all layers."""
        params, xs, state, lengths, mask, resets, *_ = args
        num_steps, *axes = xs.shape[: xs.ndim - self._num_feature_axes]
        if state is None:
            state = masking.match_sharding(xs, self._initial_state(tuple(axes), params))
        state = masking.match_vma(args._replace(state=None), state)
        restart_state = None if resets is None else self._restart_state(params)
        step_mask = masking.step_mask(num_steps, lengths, mask)
        return state, LayerInputs(step_mask, resets, lengths if mask is None else None, restart_state)

    def _restart_state(self, params: Params) -> State | None:
        """Returns the state after a reset, of all layers, ``(L*D, *units)``; None for zeros."""
        if params.state is not None:
            return jax.tree.map(lambda a: a.astype(self.state_dtype), params.state)
        return self._fill_state(self.state_shapes()) if any(self.resolved_cell.initial_values.values()) else None

    @property
    def num_static(self) -> int | None:
        """S, the number of static features; None if the cell does not read them."""
        return None

    @property
    def num_heads(self) -> int:
        """Number of blocks of a block-diagonal ``W_h``."""
        return 1

    def project_static(self, layer: Layer, static: Array | None) -> Array | None:
        """Returns ``W_s s`` for each direction of a layer, ``(D, *batch, G*H)``; None without static features."""
        del layer, static
        return None

    def regularize_layer(
        self, n: int, layer: Layer, inputs: LayerInputs, xs: Array, key: Array | None
    ) -> tuple[Layer, LayerInputs]:
        """Returns a layer and its inputs with the random masks of the regularizers inside the recurrence."""
        del n, xs, key
        return layer, inputs

    def run_layer(
        self, layer: Layer, xs: Array, state: State, inputs: LayerInputs, reverse: bool
    ) -> tuple[Array, State]:
        """Runs one layer over time.

        Args:
          layer: its weights.
          xs: inputs ``(T, *batch, *features)``.
          state: initial state ``(D, *batch, *features)``.
          inputs: masks and resets.
          reverse: whether time runs backward.

        Returns:
          outputs ``(T, *batch, *features)`` of all directions, concatenated, and the final state.
        """
        if xs.shape[0] == 0:
            return masking.empty_sequence(state, self.output_dtype)
        return masking.scan_masked(
            self.run_directions,
            layer,
            xs,
            state,
            inputs,
            reverse=reverse,
            batch_axes=xs.ndim - 1 - self._num_feature_axes,
            merge=masking.concat_directions(self.output_dtype),
        )

    @abstractmethod
    def run_directions(self, directions: tuple[Direction, ...]) -> Results:
        """Runs the directions of a layer forward in time; see `jaxlstm.recurrence.context`."""

    @abstractmethod
    def layer_step(self, weights: Weights, x: Array, state: State, z_static: Array | None = None) -> State:
        """Takes one step of one layer without regularizers: from its input and the state to the new state."""

    @partial(jax.jit, static_argnums=0)
    def _step(
        self, params: Params, state: State, x: Array, reset: Array | None, static: Array | None
    ) -> tuple[State, Array]:
        return self.step_layers(params, x, partial(self.step_layer, params, state, reset, static))

    def step_layers(self, params: Params, x: Array, step_layer: StepLayer) -> tuple[State, Array]:
        """Takes one step of all layers.

        Args:
          params: parameters.
          x: input of the step.
          step_layer: takes one step of one layer; `step_layer` with the other arguments of the step.

        Returns:
          the new state, and the output.
        """
        del params
        y = x.astype(self.output_dtype)
        new_states = []
        for n in range(self.num_layers):
            new_states.append(step_layer(n, y))
            y = new_states[-1].h.astype(self.output_dtype)
        return tree_stack(new_states), y

    def step_layer(
        self, params: Params, state: State, reset: Array | None, static: Array | None, n: int, x: Array
    ) -> State:
        """Takes one step of layer ``n`` from its input and the state of all layers; returns its new state."""
        layer, layer_state = params.layers[n], tree_index(state, n)
        if reset is not None:
            layer_state = masking.restart(reset, tree_index(self._restart_state(params), n), layer_state)
        z_static = tree_index(self.project_static(layer, static), 0)
        return self.layer_step(layer.forward, x, layer_state, z_static)

    def scan_context(self, rates: RegularizerRates = NO_RATES) -> ScanContext:
        """Returns the options of a backend."""
        return ScanContext(rates, self.output_dtype, self.state_dtype, self.unroll, self.remat)

    @property
    def _num_feature_axes(self) -> int:
        return len(self.feature_shape(self.input_size))

    def _check_dtypes(self) -> None:
        validation.available("param_dtype", jnp.dtype(self.param_dtype))
        validation.available("dtype", self.output_dtype)


@lru_cache(maxsize=256)
def _param_shapes(network: RecurrentNetwork) -> Params:
    layers = tuple(Layer(*[network.weight_shapes(size)] * network.num_directions) for size in network.layer_input_sizes)
    state = jax.tree.map(lambda a: network.param_shape(*a.shape), network.state_shapes())
    return Params(layers, state if network.learned_state else None, network.residual_shapes())


@lru_cache(maxsize=256)
def _state_shapes(network: RecurrentNetwork, batch_shape: tuple[int, ...]) -> State:
    def array(size: int) -> Any:
        leading = (network.num_layers * network.num_directions, *batch_shape)
        return jax.ShapeDtypeStruct((*leading, *network.feature_shape(size)), network.state_dtype)

    cell = network.resolved_cell
    states = {name: array(network.hidden_size) for name in cell.initial_values}
    return State(array(network.output_size), cell.pack_states(states))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def _init_norm(shapes: Norm | None) -> Norm | None:
    """Returns gains of 1 and a shift of 0."""
    if shapes is None:
        return None
    norm = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes)
    return norm if norm.b_c is None else norm._replace(b_c=jnp.zeros_like(norm.b_c))
