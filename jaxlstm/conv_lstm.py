r"""The convolutional LSTM: state and inputs are fields over space, and the dense part of a step is a convolution::

    z    = W_x * x + W_h * h + b    one slab of H channels of pre-activations per gate, at every position
    c, h = gates(z, c)              elementwise over positions and channels, from `jaxlstm.cells`

After Shi, Chen, Wang, Yeung, Wong & Woo 2015, "Convolutional LSTM Network: A Machine Learning Approach for
Precipitation Nowcasting". Over the letters of `jaxlstm.params`, ``*spatial`` is one to three axes of positions and
``*kernel`` as many sizes of a kernel.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlstm import cells, initializers, validation
from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, dropout
from jaxlstm.params import Layer, Params, State, Weights, output_dtype, state_dtype
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.recurrence import masking, scan
from jaxlstm.recurrence.context import How
from jaxlstm.recurrence.step import slabs

Convolution = Callable[[Array, Array, DTypeLike, DTypeLike], Array]  # (w, x, dtype, sums) -> z


def convolution(
    w: Float[Array, "*kernel m n"], x: Float[Array, "*batch_and_spatial m"], dtype: DTypeLike, sums: DTypeLike
) -> Float[Array, "*batch_and_spatial n"]:
    """``W * x`` over the spatial axes of ``x``, with zeros around it so that its size stays.

    Operands are rounded to ``dtype``; sums and result are in ``sums``.
    """
    *kernel, _, channels = w.shape
    batch, field = x.shape[: x.ndim - w.ndim + 1], x.shape[x.ndim - w.ndim + 1 :]
    letters = "DHW"[: len(kernel)]
    z = lax.conv_general_dilated(
        x.reshape(math.prod(batch), *field).astype(dtype),
        w.astype(dtype),
        window_strides=[1] * len(kernel),
        padding=[(size // 2, size // 2) for size in kernel],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        preferred_element_type=jnp.dtype(sums),
    )
    return z.reshape(*batch, *field[:-1], channels)


def product_of_patches(
    w: Float[Array, "*kernel m n"], x: Float[Array, "*batch_and_spatial m"], dtype: DTypeLike, sums: DTypeLike
) -> Float[Array, "*batch_and_spatial n"]:
    """`convolution` as one matrix product: what the kernel sees from each position, times the kernel as a matrix."""
    *kernel, _, channels = w.shape
    spatial = x.shape[-1 - len(kernel) : -1]
    border = [(size // 2, size // 2) for size in kernel]

    # All but the state is made again for the derivative: patches are as many times larger as the kernel is.
    @partial(jax.checkpoint, prevent_cse=False)
    def product(w: Array, x: Array) -> Array:
        padded = jnp.pad(x.astype(dtype), [(0, 0)] * (x.ndim - 1 - len(kernel)) + border + [(0, 0)])
        shifts = itertools.product(*map(range, kernel))
        windows = [tuple(slice(first, first + size) for first, size in zip(shift, spatial)) for shift in shifts]
        patches = jnp.concatenate([padded[(..., *window, slice(None))] for window in windows], axis=-1)
        return matvec(w.reshape(-1, channels).T, patches, dtype, sums)

    return product(w, x)


def convolution_in_loop(
    w: Float[Array, "*kernel m n"], x: Float[Array, "*batch_and_spatial m"], dtype: DTypeLike, sums: DTypeLike
) -> Float[Array, "*batch_and_spatial n"]:
    """`convolution` in the form that is fast in the body of a compiled loop.

    XLA on a CPU brings the convolutions of a derivative into the form of its fast kernels outside of loops only: in a
    loop, a training step took 3 to 11 times as long with convolutions as with the product of patches (16 to 64
    channels, kernels of 3 and 5, two cores). Forward, the two take about the same time.
    """
    on_cpu = jax.default_backend() == "cpu"
    return (product_of_patches if on_cpu else convolution)(w, x, dtype, sums)


def input_part(
    weights: Weights,
    x: Float[Array, "*batch_and_spatial I"],
    dtype: DTypeLike,
    sums: DTypeLike,
    convolve: Convolution = convolution,
) -> Float[Array, "*batch_and_spatial GH"]:
    """``W_x * x + b``, the share of ``z`` that does not wait for the step before, in ``sums``."""
    z = convolve(weights.w_x, x, dtype, sums)
    return z if weights.b is None else z + jnp.broadcast_to(weights.b.astype(sums), z.shape)


def input_part_of_all_steps(
    weights: Weights, xs: Float[Array, "T B *spatial I"], dtype: DTypeLike, sums: DTypeLike, convolve: Convolution
) -> Float[Array, "T B *spatial GH"]:
    """`input_part` in one convolution over time and batch."""
    # The batch leads where the two become one axis: so a batch laid out over devices stays where it is.
    return jnp.moveaxis(input_part(weights, jnp.moveaxis(xs, 1, 0), dtype, sums, convolve), 0, 1)


def step(
    cell: Cell,
    weights: Weights,
    z_x: Float[Array, "*batch_and_spatial GH"],
    before: State,
    dtype: DTypeLike,
    noise: RegularizerMasks | None = None,
) -> State:
    """One step, from `input_part` and the state before to the state after; convolution in ``dtype``, no noise."""
    del noise
    z = slabs(z_x + convolution_in_loop(weights.w_h, before.h, dtype, z_x.dtype), cell.num_gates, -1)
    if weights.w_c is None:
        c, h = cell.gates(z, before.c)
    else:  # (K, *spatial, H) to (K, 1, ..., 1, *spatial, H)
        w = jnp.expand_dims(weights.w_c, tuple(range(1, 1 + z.ndim - weights.w_c.ndim)))
        c, h = cell.gates(z, before.c, w=w.astype(z.dtype))
    return State(h, c)


@dataclass(frozen=True)
class ConvLSTM:
    """A convolutional recurrent network: static configuration only, frozen and hashable, called as `jaxlstm.LSTM` is.

        conv = jaxlstm.ConvLSTM(1, 16, (64, 64))
        params = conv.init(jax.random.key(0))
        ys, state = conv(params, xs)                # xs (T, *batch, 64, 64, 1), ys (T, *batch, 64, 64, 16)

    Channels come last. Convolutions have stride 1 and zeros around the field, so that its size stays.

    Args:
      input_size: I, channels of the input.
      hidden_size: H, channels of the state and, for each direction, of the output.
      spatial_shape: sizes of the one to three spatial axes; an int for one axis.
      kernel_size: of both convolutions, odd: one size for every spatial axis, or one for each.
      num_layers: L.
      bidirectional: a second direction that runs backward in time; D is 2 and outputs are concatenated.
      cell: ``"lstm"``; ``"peephole"``, the paper's, whose gates see the cell state of their own position and channel;
        ``"cifg"``; or a `jaxlstm.Cell`.
      use_bias: whether ``z`` has a bias, the same at every position.
      dropout: rate at which the outputs of every layer but the last are dropped when ``key`` is given.
      dtype: of convolutions and outputs; None for ``param_dtype``. Sums, gates and state are float32 or wider.
      param_dtype: of the parameters.
      remat: keep only the state every so many steps for the backward pass, and compute the rest again.
      unroll: steps per iteration of the compiled loop.

    Raises:
      ValueError, TypeError: for an option that is out of range, unknown or of the wrong type.
    """

    input_size: int
    hidden_size: int
    spatial_shape: int | tuple[int, ...]
    _: KW_ONLY
    kernel_size: int | tuple[int, ...] = 3
    num_layers: int = 1
    bidirectional: bool = False
    cell: str | Cell = "lstm"
    use_bias: bool = True
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: int | None = None
    unroll: int = 1

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # normalised once, so that equal configurations compare equal

        for name in ("input_size", "hidden_size", "num_layers", "unroll"):
            put(name, validation.positive_int(name, getattr(self, name)))
        put("spatial_shape", validation.spatial_shape("spatial_shape", self.spatial_shape))
        put("kernel_size", validation.kernel_shape("kernel_size", self.kernel_size, self._spatial))
        if self.remat is not None:
            put("remat", validation.positive_int("remat", self.remat))
        for name in ("bidirectional", "use_bias"):
            validation.flag(name, getattr(self, name))
        put("dropout", validation.rate("dropout", self.dropout))
        put("param_dtype", validation.float_dtype("param_dtype", self.param_dtype))
        if self.dtype is not None:
            put("dtype", validation.float_dtype("dtype", self.dtype))
        if not isinstance(self.cell, Cell):
            validation.choice("cell", self.cell, cells.CELLS)
        validation.cell(self.resolved_cell)

    @property
    def num_directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    def init(self, key: Array) -> Params:
        """Parameters in ``param_dtype``: ``w_x (*kernel, I, G*H)``, ``w_h (*kernel, H, G*H)``, ``b (G*H,)``, ``w_c``.

        For each gate apart, input kernels are Glorot-uniform over the fan of the kernel, and recurrent kernels
        orthogonal as matrices of what a position sees, ``(prod(kernel)*H, H)``, as in Keras: on white noise the
        convolution keeps the mean square, and at kernel size 1 it is `jaxlstm.LSTM`'s. Biases are zero but for the
        forget gate's, which is 1. The peepholes, ``w_c (3, *spatial, H)``, start at zero.

        Args:
          key: PRNG key.
        """
        validation.key(key)
        self._check_dtypes()
        expected = self.param_shapes()
        keys = iter(jax.random.split(key, len(jax.tree.leaves(expected))))
        gates = self.resolved_cell.num_gates
        initializer: dict[str, Any] = {
            "w_x": initializers.per_gate(jax.nn.initializers.glorot_uniform(), gates, axis=-1),
            "w_h": initializers.per_gate(jax.nn.initializers.orthogonal(), gates, axis=-1),
            "b": initializers.forget_bias(gates, self.resolved_cell.forget_gate),
            "w_c": jax.nn.initializers.zeros,
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
          h and c ``(L*D, *batch, *spatial, H)`` (c is None for a cell without it), float32 or wider.
        """
        self._check_dtypes()
        shapes = self.state_shapes(validation.sizes("batch_shape", batch_shape))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def __call__(
        self,
        params: Params,
        xs: Float[ArrayLike, "T *batch_and_spatial I"],
        state: State | None = None,
        *,
        lengths: Int[ArrayLike, "*batch"] | None = None,
        mask: Bool[ArrayLike, "T *batch"] | None = None,
        resets: Bool[ArrayLike, "T *batch"] | None = None,
        reverse: bool = False,
        key: Array | None = None,
    ) -> tuple[Float[Array, "T *batch_and_spatial DH"], State]:
        """All layers over a sequence.

        ``lengths``, ``mask`` and ``resets`` combine, and speak of whole fields. A step that is not taken does not
        exist: its input is never read, not even for gradients, its output is zero, the state passes it unchanged, and
        a reset marked on it has no effect.

        Args:
          params: as made by `init`.
          xs: inputs, ``(T, *batch, *spatial, I)``, cast to ``dtype`` where they enter a convolution.
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
        validation.params(params, self.param_shapes(), self.state_dtype)
        xs = validation.inputs("xs", xs, self.input_size, "T, *batch", self._spatial)
        num_steps, *axes = xs.shape[: -1 - len(self._spatial)]
        batch = tuple(axes)
        if state is None:
            state = masking.laid_out_like(xs, self.initial_state(batch))
        else:
            state = validation.state(state, self.state_shapes(batch))
        marks = validation.marks(lengths, mask, resets, num_steps, batch)
        if key is not None:
            validation.key(key)
        state = masking.varying_like((params, xs, marks, key), state)
        return self._run(params, xs, state, *marks, validation.flag("reverse", reverse), key)

    def step(
        self, params: Params, state: State, x: Float[ArrayLike, "*batch_and_spatial I"]
    ) -> tuple[State, Float[Array, "*batch_and_spatial H"]]:
        """One step of all layers, for streaming and reinforcement learning; for one direction, without dropout.

        Args:
          params: as made by `init`.
          state: from `initial_state`, from a call or from the step before.
          x: input of this step, ``(*batch, *spatial, I)``.

        Returns:
          ``(state, y)``, in the order of a `jax.lax.scan` body.

        Raises:
          ValueError, TypeError: while tracing, for a wrong shape, size, dtype or type, or a bidirectional network.
        """
        if self.bidirectional:
            raise ValueError("step is for one direction: a bidirectional network needs the whole sequence")
        self._check_dtypes()
        validation.params(params, self.param_shapes(), self.state_dtype)
        x = validation.inputs("x", x, self.input_size, "*batch", self._spatial)
        batch = x.shape[: -1 - len(self._spatial)]
        return self._step(params, validation.state(state, self.state_shapes(batch)), x)

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
        how = How(
            mask=masking.steps_taken(xs.shape[0], lengths, mask),
            resets=resets,
            start=None,
            noise=RegularizerMasks(),
            rates=RegularizerRates(),
            reverse=reverse,
            dtype=self.output_dtype,
            unroll=self.unroll,
            remat=self.remat,
        )
        ys = xs.astype(self.output_dtype)
        last = []
        for n, layer in enumerate(params.layers):
            if n > 0:
                ys = dropout(None if key is None else jax.random.fold_in(key, n), self.dropout, ys)
            rows = slice(n * self.num_directions, (n + 1) * self.num_directions)
            before = jax.tree.map(lambda a: a[rows], state)  # noqa: B023  (called at once)
            batch_axes = xs.ndim - 2 - len(self._spatial)
            ys, after = masking.steps_that_exist(partial(self._layer, layer), ys, before, how, batch_axes=batch_axes)
            last.append(after)
        return ys, jax.tree.map(lambda *a: jnp.concatenate(a), *last)

    def _layer(self, layer: Layer, xs: Array, state: State, how: How) -> tuple[Array, State]:
        """One layer over time, with one batch axis."""
        if xs.shape[0] == 0:
            return masking.no_steps(state, how.dtype)
        convolve = convolution if self.remat is None else convolution_in_loop  # over chunks of time, there is a loop
        directions = [
            scan.Equations(
                partial(input_part_of_all_steps, weights, dtype=how.dtype, sums=self.state_dtype, convolve=convolve),
                scan.puts_out_h(partial(step, self.resolved_cell, weights, dtype=how.dtype)),
            )
            for weights in layer.directions
        ]
        return scan.side_by_side(*scan.over_time(directions, xs, state, how), how.dtype)

    @partial(jax.jit, static_argnums=0)
    def _step(self, params: Params, state: State, x: Array) -> tuple[State, Array]:
        y = x.astype(self.output_dtype)
        after = []
        for n, layer in enumerate(params.layers):
            before = jax.tree.map(lambda a: a[n], state)  # noqa: B023  (called at once)
            z_x = input_part(layer.forward, y, self.output_dtype, self.state_dtype)
            after.append(step(self.resolved_cell, layer.forward, z_x, before, self.output_dtype))
            y = after[-1].h.astype(self.output_dtype)
        return jax.tree.map(lambda *a: jnp.stack(a), *after), y

    @property
    def resolved_cell(self) -> Cell:
        """The `jaxlstm.Cell` that ``cell`` names."""
        return self.cell if isinstance(self.cell, Cell) else cells.CELLS[self.cell]

    @property
    def _spatial(self) -> tuple[int, ...]:
        return validation.sizes("spatial_shape", self.spatial_shape)

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
            kernel, channels = (
                validation.sizes("kernel_size", self.kernel_size),
                self.resolved_cell.num_gates * self.hidden_size,
            )
            peepholes = self.resolved_cell.num_peepholes
            return Weights(
                w_x=array(*kernel, inputs, channels),
                w_h=array(*kernel, self.hidden_size, channels),
                b=array(channels) if self.use_bias else None,
                w_c=array(peepholes, *self._spatial, self.hidden_size) if peepholes else None,
            )

        widths = [self.input_size] + (self.num_layers - 1) * [self.num_directions * self.hidden_size]
        return Params(tuple(Layer(*(weights(i) for _ in range(self.num_directions))) for i in widths))

    def state_shapes(self, batch: tuple[int, ...]) -> State:
        """Shape and dtype of the state."""
        shape = (self.num_layers * self.num_directions, *batch, *self._spatial, self.hidden_size)
        array: Any = jax.ShapeDtypeStruct(shape, self.state_dtype)
        return State(array, array if self.resolved_cell.has_cell_state else None)
