"""Layers and directions, stacked."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlstm import cells, initializers, sequence, validation
from jaxlstm.cells import Cell
from jaxlstm.dropout import dropout
from jaxlstm.recurrence import IMPLEMENTATIONS
from jaxlstm.types import Layer, Params, State, Weights, output_dtype, state_dtype


@dataclass(frozen=True)
class LSTM:
    """A recurrent network: static configuration only, frozen and hashable; parameters and state are arguments.

        lstm = jaxlstm.LSTM(64, 256, num_layers=2)
        params = lstm.init(jax.random.key(0))
        ys, state = lstm(params, xs)                # xs (T, *batch, 64), ys (T, *batch, 256)

    The letters of shapes are in `jaxlstm.types`, the equations in `jaxlstm.cells`.

    Args:
      input_size: I.
      hidden_size: H.
      num_layers: L.
      bidirectional: a second direction that runs backward in time; D is 2 and outputs are concatenated.
      proj_size: P, the size to which h is projected (Sak, Senior & Beaufays 2014); None for no projection.
      cell: ``"lstm"``, ``"rnn"``, or a `jaxlstm.Cell`.
      activation: of ``cell="rnn"``: ``"tanh"`` (taken where None), ``"relu"`` or ``"sigmoid"``.
      use_bias: whether ``z`` has a bias.
      dropout: rate at which the outputs of every layer but the last are dropped when ``key`` is given.
      dtype: of matrix products and outputs; None for ``param_dtype``. Sums, gates and state are float32 or wider.
      param_dtype: of the parameters.
      remat: keep only the state every so many steps for the backward pass, and compute the rest again.
      unroll: steps per iteration of the compiled loop.
      implementation: of the recurrence, a name in `jaxlstm.recurrence`; None picks, a name is obeyed or refused.

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
    use_bias: bool = True
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: int | None = None
    unroll: int = 1
    implementation: str | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # normalised once, so that equal configurations compare equal

        for name in ("input_size", "hidden_size", "num_layers", "unroll"):
            put(name, validation.positive_int(name, getattr(self, name)))
        for name in ("proj_size", "remat"):
            if getattr(self, name) is not None:
                put(name, validation.positive_int(name, getattr(self, name)))
        for name in ("bidirectional", "use_bias"):
            validation.flag(name, getattr(self, name))
        put("dropout", validation.rate("dropout", self.dropout))
        put("param_dtype", validation.float_dtype("param_dtype", self.param_dtype))
        if self.dtype is not None:
            put("dtype", validation.float_dtype("dtype", self.dtype))
        if not isinstance(self.cell, Cell):
            validation.choice("cell", self.cell, ("lstm", "rnn"))
        if self.activation is not None:
            if self.cell != "rnn":
                raise ValueError(f"activation={self.activation!r} belongs to cell='rnn', got cell={self.cell!r}")
            validation.choice("activation", self.activation, cells.RNN)
        if self.implementation is not None:
            validation.choice("implementation", self.implementation, IMPLEMENTATIONS)

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
        but for the forget gate's, which is 1.

        Args:
          key: PRNG key.
        """
        validation.key(key)
        self._check_dtypes()
        expected = self._shapes()
        keys = iter(jax.random.split(key, len(jax.tree.leaves(expected))))
        gates = self._cell.num_gates
        initializer: dict[str, Any] = {
            "w_x": initializers.glorot_uniform(gates),
            "w_h": initializers.orthogonal(gates),
            "b": initializers.forget_bias(gates, self._cell.forget_gate),
            "w_p": initializers.glorot_uniform(1),
        }

        def draw(shapes: Weights) -> Weights:
            arrays = {name: a for name, a in shapes._asdict().items() if a is not None}
            return Weights(**{name: initializer[name](next(keys), a.shape, a.dtype) for name, a in arrays.items()})

        layers = (Layer(*(draw(w) for w in layer.directions)) for layer in expected.layers)
        return Params(tuple(layers))

    def initial_state(self, batch_shape: int | tuple[int, ...] = ()) -> State:
        """The state before the first step: zeros.

        Args:
          batch_shape: the batch axes of the inputs to come; an int for one axis.

        Returns:
          h ``(L*D, *batch, P)`` and c ``(L*D, *batch, H)`` (None for a cell without it), float32 or wider.
        """
        self._check_dtypes()
        shapes = self._state_shapes(validation.sizes("batch_shape", batch_shape))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

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
          state: initial state, zeros where None.
          lengths: steps at and past it are not taken; 0 returns the initial state.
          mask: steps where it is False are not taken.
          resets: True marks the first step of a new sequence: the state is zero before it. In a direction that runs
            backward, the state is zeroed after it.
          reverse: time runs backward, from each sequence's own last step; outputs stay aligned with their inputs.
          key: PRNG key that turns dropout on; without it the call is deterministic.

        Returns:
          ``(ys, state)``: outputs of the last layer in ``dtype``, and the state after the last step taken.

        Raises:
          ValueError, TypeError: while tracing, for a wrong shape, size, dtype or type.
        """
        self._check_dtypes()
        validation.params(params, self._shapes(), self._state_dtype)
        xs = validation.inputs("xs", xs, self.input_size, "T, *batch")
        num_steps, *axes = xs.shape[:-1]
        batch = tuple(axes)
        state = self._zeros(xs) if state is None else validation.state(state, self._state_shapes(batch))
        if lengths is not None:
            lengths = validation.array("lengths", lengths, jnp.integer, batch)
        if mask is not None:
            mask = validation.array("mask", mask, jnp.bool_, (num_steps, *batch))
        if resets is not None:
            resets = validation.array("resets", resets, jnp.bool_, (num_steps, *batch))
        if key is not None:
            validation.key(key)
        return self._run(params, xs, state, lengths, mask, resets, validation.flag("reverse", reverse), key)

    def step(
        self, params: Params, state: State, x: Float[ArrayLike, "*batch I"]
    ) -> tuple[State, Float[Array, "*batch P"]]:
        """One step of all layers, for streaming and reinforcement learning; for one direction, without dropout.

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
        validation.params(params, self._shapes(), self._state_dtype)
        x = validation.inputs("x", x, self.input_size, "*batch")
        return self._step(params, validation.state(state, self._state_shapes(x.shape[:-1])), x)

    @partial(jax.jit, static_argnums=(0, 7))
    def _run(
        self,
        params: Params,
        xs: Array,
        state: State,
        lengths: Array | None,
        mask: Array | None,
        resets: Array | None,
        reverse: bool,
        key: Array | None,
    ) -> tuple[Array, State]:
        # Compiled here, so that a call outside of `jit` compiles once per shape too.
        taken = sequence.steps_taken(xs.shape[0], lengths, mask)
        ys = xs.astype(self._output_dtype)
        last = []
        for n, layer in enumerate(params.layers):
            if n > 0:
                ys = dropout(None if key is None else jax.random.fold_in(key, n), self.dropout, ys)
            rows = slice(n * self.num_directions, (n + 1) * self.num_directions)
            ys, after = sequence.run(
                self._cell,
                layer,
                ys,
                jax.tree.map(lambda a: a[rows], state),  # noqa: B023  (called at once)
                mask=taken,
                resets=resets,
                reverse=reverse,
                dtype=self._output_dtype,
                unroll=self.unroll,
                remat=self.remat,
                implementation=self.implementation,
            )
            last.append(after)
        return ys, jax.tree.map(lambda *a: jnp.concatenate(a), *last)

    @partial(jax.jit, static_argnums=0)
    def _step(self, params: Params, state: State, x: Array) -> tuple[State, Array]:
        y = x.astype(self._output_dtype)
        after = []
        for n, layer in enumerate(params.layers):
            h, c = jax.tree.map(lambda a: a[n], state)  # noqa: B023  (called at once)
            z_x = cells.input_part(layer.forward, y, self._output_dtype, self._state_dtype)
            after.append(State(*cells.step(self._cell, layer.forward, z_x, h, c, self._output_dtype)))
            y = after[-1].h.astype(self._output_dtype)
        return jax.tree.map(lambda *a: jnp.stack(a), *after), y

    @property
    def _cell(self) -> Cell:
        if isinstance(self.cell, Cell):
            return self.cell
        return cells.LSTM if self.cell == "lstm" else cells.RNN[self.activation or "tanh"]

    @property
    def _output_dtype(self) -> jnp.dtype:
        return output_dtype(self.dtype, self.param_dtype)

    @property
    def _state_dtype(self) -> jnp.dtype:
        return state_dtype(self.dtype, self.param_dtype)

    def _check_dtypes(self) -> None:
        validation.available("param_dtype", jnp.dtype(self.param_dtype))
        validation.available("dtype", self._output_dtype)

    def _shapes(self) -> Params:
        """Shape and dtype of every parameter."""

        def array(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, self.param_dtype)

        def weights(inputs: int) -> Weights:
            rows, p = self._cell.num_gates * self.hidden_size, self.output_size
            return Weights(
                w_x=array(rows, inputs),
                w_h=array(rows, p),
                b=array(rows) if self.use_bias else None,
                w_p=None if self.proj_size is None else array(p, self.hidden_size),
            )

        widths = [self.input_size] + (self.num_layers - 1) * [self.num_directions * self.output_size]
        return Params(tuple(Layer(*(weights(i) for _ in range(self.num_directions))) for i in widths))

    def _zeros(self, xs: Array) -> State:
        """The initial state for ``xs``, laid out over devices as its batch is: `jax.lax.scan` insists on that."""
        num_steps, *batch, _ = xs.shape
        if num_steps == 0:
            return self.initial_state(tuple(batch))
        row = jnp.zeros_like(xs[0, ..., :1])
        return jax.tree.map(lambda a: jnp.broadcast_to(row.astype(a.dtype), a.shape), self._state_shapes(tuple(batch)))

    def _state_shapes(self, batch: tuple[int, ...]) -> State:
        """Shape and dtype of the state."""

        def array(size: int) -> Any:
            return jax.ShapeDtypeStruct((self.num_layers * self.num_directions, *batch, size), self._state_dtype)

        return State(array(self.output_size), array(self.hidden_size) if self._cell.has_cell_state else None)
