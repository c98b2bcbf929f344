"""Layers and directions, stacked."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlstm import cells, initializers, validation
from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, draw_masks, dropout, dropout_mask
from jaxlstm.params import Layer, Norm, Params, State, Weights, output_dtype, state_dtype
from jaxlstm.recurrence import IMPLEMENTATIONS, OF_LAYERS, OVER_DEVICES, Implementation, Newton, masking
from jaxlstm.recurrence.context import How
from jaxlstm.recurrence.step import input_part, step

RATES = (
    "dropout",
    "input_dropout",
    "output_dropout",
    "recurrent_dropout",
    "weight_drop",
    "zoneout_h",
    "zoneout_c",
)


class CallArgs(NamedTuple):
    """Those of a call, validated."""

    params: Params
    xs: Array  # (T, *batch, I)
    state: State  # before the first step
    lengths: Array | None  # (*batch,) int
    mask: Array | None  # (T, *batch) bool
    resets: Array | None  # (T, *batch) bool
    key: Array | None


@dataclass(frozen=True)
class LSTM:
    """A recurrent network: static configuration only, frozen and hashable; parameters and state are arguments.

        lstm = jaxlstm.LSTM(64, 256, num_layers=2)
        params = lstm.init(jax.random.key(0))
        ys, state = lstm(params, xs)                # xs (T, *batch, 64), ys (T, *batch, 256)

    The letters of shapes are in `jaxlstm.params`, the equations in `jaxlstm.cells`. The rates are of regularizers that
    a ``key`` turns on; what dropout keeps is scaled up by 1 / (1 - rate).

    Args:
      input_size: I.
      hidden_size: H.
      num_layers: L.
      bidirectional: a second direction that runs backward in time; D is 2 and outputs are concatenated.
      proj_size: P, the size to which h is projected (Sak, Senior & Beaufays 2014); None for no projection.
      cell: ``"lstm"``, ``"peephole"``, ``"cifg"``, ``"rnn"``, or a `jaxlstm.Cell`.
      activation: of ``cell="rnn"``: ``"tanh"`` (taken where None), ``"relu"`` or ``"sigmoid"``.
      layer_norm: normalise ``W_x x``, ``W_h h`` and, on its way to h, c (Ba, Kiros & Hinton 2016).
      use_bias: whether ``z`` has a bias.
      learned_state: whether the initial state is trained; a reset then starts from it too.
      forget_bias: initial bias of the forget gate; 1 where None (Gers et al. 2000; Jozefowicz et al. 2015).
      chrono: longest dependency expected, in steps: draws the initial biases of forget and input gate for it (Tallec
        & Ollivier 2018).
      dropout: rate at which the outputs of every layer but the last are dropped.
      input_dropout: rate at which the inputs are dropped, by one mask for all of time (Gal & Ghahramani 2016).
      output_dropout: the same of the outputs of the last layer.
      variational: whether ``dropout`` too has one mask for all of time.
      recurrent_dropout: rate at which candidates are dropped (Semeniuta, Severyn & Barth 2016).
      weight_drop: rate at which elements of the recurrent weights are dropped, once a call (Merity et al. 2018).
      zoneout_h: rate at which units of h stay as they were, with a key by chance, without one by expectation (Krueger
        et al. 2017).
      zoneout_c: the same of c.
      dtype: of matrix products and outputs; None for ``param_dtype``. Sums, gates and state are float32 or wider.
      param_dtype: of the parameters.
      remat: keep only the state every so many steps for the backward pass, and compute the rest again.
      unroll: steps per iteration of the compiled loop.
      implementation: of the recurrence, a name in `jaxlstm.recurrence`, or a `jaxlstm.recurrence.Newton` of options;
        None picks (`jaxlstm.recurrence.explain` says what and why), a name is obeyed or refused.

    Raises:
      ValueError, TypeError: for an option that is out of range, unknown or of the wrong type.
    """

    input_size: int
    hidden_size: int
    _: KW_ONLY
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int | None = None
    cell: str | Cell = "lstm"
    activation: str | None = None
    layer_norm: bool = False
    use_bias: bool = True
    learned_state: bool = False
    forget_bias: float | None = None
    chrono: int | None = None
    dropout: float = 0.0
    input_dropout: float = 0.0
    output_dropout: float = 0.0
    variational: bool = False
    recurrent_dropout: float = 0.0
    weight_drop: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: int | None = None
    unroll: int = 1
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # normalised once, so that equal configurations compare equal

        for name in ("input_size", "hidden_size", "num_layers", "unroll"):
            put(name, validation.positive_int(name, getattr(self, name)))
        for name in ("proj_size", "remat"):
            if getattr(self, name) is not None:
                put(name, validation.positive_int(name, getattr(self, name)))
        for name in ("bidirectional", "layer_norm", "use_bias", "learned_state", "variational"):
            validation.flag(name, getattr(self, name))
        for name in RATES:
            put(name, validation.rate(name, getattr(self, name)))
        put("param_dtype", validation.float_dtype("param_dtype", self.param_dtype))
        if self.dtype is not None:
            put("dtype", validation.float_dtype("dtype", self.dtype))
        if not isinstance(self.cell, Cell):
            validation.choice("cell", self.cell, (*cells.CELLS, "rnn"))
        if self.activation is not None:
            if self.cell != "rnn":
                raise ValueError(f"activation={self.activation!r} belongs to cell='rnn', got cell={self.cell!r}")
            validation.choice("activation", self.activation, cells.RNN)
        if self.implementation is not None and not isinstance(self.implementation, Newton):
            validation.choice("implementation", self.implementation, IMPLEMENTATIONS | OVER_DEVICES)
        self._check_cell()

    def _check_cell(self) -> None:
        """Refuse options that the cell has no place for."""
        cell = self.resolved_cell
        if not isinstance(self.cell, str):
            validation.cell(cell)
        lacking = {
            "recurrent_dropout": None if cell.takes("keep") else "gates that take `keep`, the scale of a candidate",
            "zoneout_c": None if cell.has_cell_state else "a cell state",
            "layer_norm": None
            if cell.takes("norm") or not cell.has_cell_state
            else "gates that take `norm`, a function of the cell state",
            "forget_bias": "a forget gate" if cell.forget_gate is None else None,
            "chrono": "a forget gate" if cell.forget_gate is None else None,
        }
        for name, need in lacking.items():
            value = getattr(self, name)
            if need is not None and value is not None and value is not False and (value or name == "forget_bias"):
                raise ValueError(f"{name}={value!r} needs {need}, which cell={self.cell!r} has not")
        for name in ("forget_bias", "chrono"):
            if getattr(self, name) is not None and not self.use_bias:
                raise ValueError(f"{name}={getattr(self, name)!r} needs a bias, got use_bias=False")
        if self.forget_bias is not None:
            object.__setattr__(self, "forget_bias", validation.number("forget_bias", self.forget_bias))
        if self.chrono is not None:
            object.__setattr__(self, "chrono", validation.positive_int("chrono", self.chrono))
            if self.chrono < 3 or self.forget_bias is not None:
                raise ValueError(f"chrono must be at least 3 and without forget_bias, got chrono={self.chrono}")

    @property
    def output_size(self) -> int:
        """P, the size of h."""
        return self.hidden_size if self.proj_size is None else self.proj_size

    @property
    def num_directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    def init(self, key: Array) -> Params:
        """Parameters in ``param_dtype``.

        Input weights and projection are Glorot-uniform, recurrent weights orthogonal, each gate apart; biases are zero
        but for the forget gate's, which is 1 where no option says otherwise; gains are 1; peepholes and a learned
        state are zero.

        Args:
          key: PRNG key.
        """
        validation.key(key)
        self._check_dtypes()
        expected = self.param_shapes()
        weights = [w for layer in expected.layers for w in layer.directions]
        drawn = ("w_x", "w_h", "b", "w_p")
        keys = iter(jax.random.split(key, sum(getattr(w, name) is not None for w in weights for name in drawn)))
        cell, gates = self.resolved_cell, self.resolved_cell.num_gates
        if self.chrono is None:
            bias = initializers.forget_bias(
                gates, cell.forget_gate, 1.0 if self.forget_bias is None else self.forget_bias
            )
        else:
            assert cell.forget_gate is not None
            bias = initializers.chrono(gates, cell.forget_gate, cell.input_gate, self.chrono)
        initializer: dict[str, Any] = {
            "w_x": initializers.glorot_uniform(gates),
            "w_h": initializers.orthogonal(gates),
            "b": bias,
            "w_p": initializers.glorot_uniform(1),
        }

        def draw(shapes: Weights) -> Weights:
            arrays = {name: a for name in drawn if (a := getattr(shapes, name)) is not None}
            random = {name: initializer[name](next(keys), a.shape, a.dtype) for name, a in arrays.items()}
            peepholes = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes.w_c)
            norm = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes.norm)
            if norm is not None and norm.b_c is not None:
                norm = norm._replace(b_c=jnp.zeros_like(norm.b_c))
            return Weights(**random, w_c=peepholes, norm=norm)

        layers = tuple(Layer(*(draw(w) for w in layer.directions)) for layer in expected.layers)
        return Params(layers, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), expected.state))

    def initial_state(self, batch_shape: int | tuple[int, ...] = (), params: Params | None = None) -> State:
        """The state before the first step: zeros, or the learned one.

        Args:
          batch_shape: the batch axes of the inputs to come; an int for one axis.
          params: as made by `init`; needed where the initial state is learned, and else not used.

        Returns:
          h ``(L*D, *batch, P)`` and c ``(L*D, *batch, H)`` (None for a cell without it), float32 or wider.

        Raises:
          ValueError, TypeError: if the state is learned and ``params`` are missing or not of this configuration.
        """
        self._check_dtypes()
        shapes = self.state_shapes(validation.sizes("batch_shape", batch_shape))
        if not self.learned_state:
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        if params is None:
            raise ValueError("initial_state needs params: learned_state=True, the state is one of them")
        validation.params(params, self.param_shapes(), self.state_dtype)
        return self._spread(params.state, shapes)

    def __call__(
        self,
        params: Params,
        xs: Float[ArrayLike, "T *batch I"],
        state: State | None = None,
        *,
        lengths: Int[ArrayLike, "*batch"] | None = None,
        mask: Bool[ArrayLike, "T *batch"] | None = None,
        resets: Bool[ArrayLike, "T *batch"] | None = None,
        reverse: bool = False,
        key: Array | None = None,
    ) -> tuple[Float[Array, "T *batch DP"], State]:
        """All layers over a sequence.

        ``lengths``, ``mask`` and ``resets`` combine. A step that is not taken does not exist: its input is never read,
        not even for gradients, its output is zero, the state passes it unchanged, and a reset marked on it has no
        effect.

        Args:
          params: as made by `init`.
          xs: inputs, cast to ``dtype`` where they enter a product.
          state: initial state; where None zeros, or the learned one.
          lengths: steps at and past it are not taken; 0 returns the initial state.
          mask: steps where it is False are not taken.
          resets: True marks the first step of a new sequence: the state is zero, or the learned one, before it. In a
            direction that runs backward, it is so after it.
          reverse: time runs backward, from each sequence's own last step; outputs stay aligned with their inputs.
          key: PRNG key that turns the regularisers on; without it the call is deterministic, zoneout by expectation.

        Returns:
          ``(ys, state)``: outputs of the last layer in ``dtype``, and the state after the last step taken.

        Raises:
          ValueError, TypeError: while tracing, for a wrong shape, size, dtype or type.
        """
        return self._run(
            self._checked(params, xs, state, lengths, mask, resets, key), validation.flag("reverse", reverse)
        )

    def step(
        self, params: Params, state: State, x: Float[ArrayLike, "*batch I"]
    ) -> tuple[State, Float[Array, "*batch P"]]:
        """One step of all layers, for streaming and reinforcement learning; for one direction, as without a key.

        Args:
          params: as made by `init`.
          state: from `initial_state`, from a call or from the step before.
          x: input of this step.

        Returns:
          ``(state, y)``, in the order of a `jax.lax.scan` body.

        Raises:
          ValueError, TypeError: while tracing, for a wrong shape, size, dtype or type, or a bidirectional network.
        """
        if self.bidirectional:
            raise ValueError("step is for one direction: a bidirectional network needs the whole sequence")
        self._check_dtypes()
        validation.params(params, self.param_shapes(), self.state_dtype)
        x = validation.inputs("x", x, self.input_size, "*batch")
        return self._step(params, validation.state(state, self.state_shapes(x.shape[:-1])), x)

    def _checked(
        self,
        params: Params,
        xs: Any,
        state: State | None = None,
        lengths: Any = None,
        mask: Any = None,
        resets: Any = None,
        key: Array | None = None,
    ) -> CallArgs:
        """The arguments of a call, validated."""
        self._check_dtypes()
        validation.params(params, self.param_shapes(), self.state_dtype)
        xs = validation.inputs("xs", xs, self.input_size, "T, *batch")
        num_steps, *axes = xs.shape[:-1]
        batch = tuple(axes)
        if state is None:
            state = masking.laid_out_like(xs, self.initial_state(batch, params))
        else:
            state = validation.state(state, self.state_shapes(batch))
        marks = validation.marks(lengths, mask, resets, num_steps, batch)
        if key is not None:
            validation.key(key)
        return CallArgs(params, xs, masking.varying_like((params, xs, marks, key), state), *marks, key)

    @partial(jax.jit, static_argnums=(0, 2))
    def _run(self, arguments: CallArgs, reverse: bool) -> tuple[Array, State]:
        # Compiled here, so that a call outside of `jit` compiles once per shape too.
        run = partial(masking.run, implementation=self.implementation)
        nothing_between = arguments.key is None or self.dropout == 0.0
        together = nothing_between and self.implementation in OF_LAYERS and len(arguments.xs) > 0
        return self._over_layers(run, arguments, reverse, together=together)

    def _over_layers(
        self,
        run: Callable[[Cell, Any, Array, State, How], tuple[Array, State]],
        arguments: CallArgs,
        reverse: bool,
        *,
        together: bool = False,
    ) -> tuple[Array, State]:
        """The layers one after the other, each over time by ``run``; or all by one call of it, ``together``."""
        params, xs, state, lengths, mask, resets, key = arguments
        num_steps, *batch, _ = xs.shape
        how = How(
            mask=masking.steps_taken(num_steps, lengths, mask),
            resets=resets,
            start=None,
            noise=RegularizerMasks(),
            rates=self._rates,
            reverse=reverse,
            dtype=self.output_dtype,
            unroll=self.unroll,
            remat=self.remat,
            lengths=lengths if mask is None else None,
        )
        start = None if resets is None else jax.tree.map(lambda a: a.astype(self.state_dtype), params.state)
        ys = dropout(regularizer_key(key, 0, 3), self.input_dropout, xs.astype(self.output_dtype), over_time=False)
        last = []
        layers = [self._drop_weights(regularizer_key(key, n, 2), layer) for n, layer in enumerate(params.layers)]
        for n, layer in [(0, tuple(layers))] if together else enumerate(layers):
            if n > 0:
                k = None if key is None else jax.random.fold_in(key, n)
                ys = dropout(k, self.dropout, ys, over_time=not self.variational)
            rows = slice(None) if together else slice(n * self.num_directions, (n + 1) * self.num_directions)
            mine, fresh = jax.tree.map(lambda a: a[rows], (state, start))  # noqa: B023  (called at once)
            leading = (self.num_directions, num_steps, *batch)
            units = self.hidden_size if self.resolved_cell.has_cell_state else None
            noise = draw_masks(regularizer_key(key, n, 1), self._rates, leading, self.output_size, units)
            ys, after = run(self.resolved_cell, layer, ys, mine, how._replace(start=fresh, noise=noise))
            last.append(after)
        ys = dropout(regularizer_key(key, 0, 4), self.output_dropout, ys, over_time=False)
        return ys, jax.tree.map(lambda *a: jnp.concatenate(a), *last)

    def _drop_weights(self, key: Array | None, layer: Layer) -> Layer:
        """The layer with recurrent weights dropped."""
        if key is None or self.weight_drop == 0.0:
            return layer
        keys = jax.random.split(key, self.num_directions)
        drop = [
            w.w_h * dropout_mask(k, self.weight_drop, w.w_h.shape, w.w_h.dtype) for k, w in zip(keys, layer.directions)
        ]
        return Layer(*(w._replace(w_h=w_h) for w, w_h in zip(layer.directions, drop)))

    @partial(jax.jit, static_argnums=0)
    def _step(self, params: Params, state: State, x: Array) -> tuple[State, Array]:
        y = x.astype(self.output_dtype)
        after = []
        for n, layer in enumerate(params.layers):
            before = jax.tree.map(lambda a: a[n], state)  # noqa: B023  (called at once)
            z_x = input_part(layer.forward, y, self.output_dtype, self.state_dtype)
            after.append(
                step(self.resolved_cell, layer.forward, z_x, before, self.output_dtype, self._rates, RegularizerMasks())
            )
            y = after[-1].h.astype(self.output_dtype)
        return jax.tree.map(lambda *a: jnp.stack(a), *after), y

    @property
    def resolved_cell(self) -> Cell:
        """The `jaxlstm.Cell` that ``cell`` names."""
        if isinstance(self.cell, Cell):
            return self.cell
        return cells.RNN[self.activation or "tanh"] if self.cell == "rnn" else cells.CELLS[self.cell]

    @property
    def _rates(self) -> RegularizerRates:
        return RegularizerRates(self.recurrent_dropout, self.zoneout_h, self.zoneout_c)

    @property
    def output_dtype(self) -> jnp.dtype:
        """Dtype of matrix products and outputs."""
        return output_dtype(self.dtype, self.param_dtype)

    @property
    def state_dtype(self) -> jnp.dtype:
        """Dtype of the state, the gates and all sums."""
        return state_dtype(self.dtype, self.param_dtype)

    def _check_dtypes(self) -> None:
        validation.available("param_dtype", jnp.dtype(self.param_dtype))
        validation.available("dtype", self.output_dtype)

    def param_shapes(self) -> Params:
        """Shape and dtype of every parameter."""

        def array(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, self.param_dtype)

        def weights(inputs: int) -> Weights:
            h, p, has_c = self.hidden_size, self.output_size, self.resolved_cell.has_cell_state
            rows, peepholes = self.resolved_cell.num_gates * h, self.resolved_cell.num_peepholes
            norm = Norm(
                array(rows), array(rows), array(h) if has_c else None, array(h) if has_c and self.use_bias else None
            )
            return Weights(
                w_x=array(rows, inputs),
                w_h=array(rows, p),
                b=array(rows) if self.use_bias else None,
                w_p=None if self.proj_size is None else array(p, h),
                w_c=array(peepholes, h) if peepholes else None,
                norm=norm if self.layer_norm else None,
            )

        widths = [self.input_size] + (self.num_layers - 1) * [self.num_directions * self.output_size]
        layers = tuple(Layer(*(weights(i) for _ in range(self.num_directions))) for i in widths)
        state = jax.tree.map(lambda a: array(*a.shape), self.state_shapes(())) if self.learned_state else None
        return Params(layers, state)

    @staticmethod
    def _spread(state: Any, shapes: State) -> State:
        """A learned state, ``(L*D, .)``, over the batch axes of ``shapes``."""

        def spread(a: Array, like: Any) -> Array:
            a = a.reshape(a.shape[0], *[1] * (len(like.shape) - 2), a.shape[1])
            return jnp.broadcast_to(a, like.shape).astype(like.dtype)

        return jax.tree.map(spread, state, shapes)

    def state_shapes(self, batch: tuple[int, ...]) -> State:
        """Shape and dtype of the state."""

        def array(size: int) -> Any:
            return jax.ShapeDtypeStruct((self.num_layers * self.num_directions, *batch, size), self.state_dtype)

        return State(array(self.output_size), array(self.hidden_size) if self.resolved_cell.has_cell_state else None)


def regularizer_key(key: Array | None, layer: int, part: int) -> Array | None:
    """A key for one of the regularisers of a layer."""
    return None if key is None else jax.random.fold_in(jax.random.fold_in(key, layer), part)
