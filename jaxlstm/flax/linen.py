"""The modules of `jaxlstm.flax` for Flax linen; ``variables["params"]["lstm"]`` is a `jaxlstm.Params`."""

from typing import Any

from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Int

import jaxlstm.rnn
from jaxlstm import validation
from jaxlstm.flax import common
from jaxlstm.flax.common import MeshAxes, Sharding, override
from jaxlstm.params import Params, State


class LSTM(nn.Module):
    """A network over whole sequences, called like `nn.RNN`: ``outputs = rnn.apply(variables, inputs)``.

    Replaces ``nn.RNN(cell)``, a stack of them, or one direction of an `nn.Bidirectional`. Computes
    ``lstm(params, xs)``.

    Attributes:
      lstm: the configuration.
      time_major: whether inputs are ``(T, *batch, I)`` instead of ``(*batch, T, I)``.
      return_carry: whether a call returns ``(carry, outputs)``.
      reverse: whether time runs backward.
      keep_order: whether outputs of a reversed call stay aligned with their inputs; otherwise the last step is first.
      deterministic: whether regularizers are off; None requires the argument in each call of a network with
        regularizers. They draw from the random stream ``dropout``.
      sharding: mesh axes of arrays by name, such as ``{"w_x": ("model", None), "b": ("model",)}``, for every layer
        and direction; equivalent to `nn.with_partitioning`.
    """

    lstm: jaxlstm.rnn.RNN
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    deterministic: bool | None = None
    sharding: Sharding | None = None

    def setup(self) -> None:
        """Declares the parameters."""
        self.weights = self.param("lstm", _init_params, self.lstm, self.sharding)

    def __call__(
        self,
        inputs: Float[Array, "*batch_T I"],
        *,
        initial_carry: State | None = None,
        init_key: Array | None = None,
        seq_lengths: Int[Array, "*batch"] | None = None,
        mask: Bool[Array, "*batch_T"] | None = None,
        resets: Bool[Array, "*batch_T"] | None = None,
        static: Float[Array, "*batch S"] | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Runs the network over a sequence. The attribute is the default of an argument that is None.

        Args:
          inputs: ``(*batch, T, I)``, or ``(T, *batch, I)`` if ``time_major``.
          initial_carry: a `jaxlstm.State`; None for zeros, or for the learned state.
          init_key: ignored, because the initial carry is not random; `nn.Bidirectional` passes it.
          seq_lengths: lengths as in `jaxlstm.LSTM`: inputs at and past the length are not read, and outputs are zero.
          mask: as in `jaxlstm.LSTM`, with the time axis last, or first if ``time_major``.
          resets: as in `jaxlstm.LSTM`, with the same axes as ``mask``.
          static: static features, for a cell that reads them, such as ``"ea"``.
          return_carry: whether to return the final state too.
          time_major: whether time is the leading axis.
          reverse: whether time runs backward.
          keep_order: whether outputs of a reversed call stay aligned with their inputs.
          deterministic: whether regularizers are off; set it here or on the module, not both.

        Returns:
          Outputs ``(*batch, T, D*P)``, or ``(T, *batch, D*P)`` if ``time_major``; with ``return_carry`` the pair of
          the final `jaxlstm.State` and the outputs.

        Raises:
          ValueError, TypeError: for a wrong shape, size, dtype or type.
        """
        del init_key
        key = None
        for value in (self.deterministic, deterministic):
            if value is not None:
                validation.flag("deterministic", value)
        if common.is_stochastic(self.lstm) and not nn.merge_param("deterministic", self.deterministic, deterministic):
            key = self.make_rng("dropout")
        return common.apply_to_sequence(
            self.lstm,
            self.weights,
            inputs,
            initial_carry=initial_carry,
            seq_lengths=seq_lengths,
            mask=mask,
            resets=resets,
            static=static,
            key=key,
            time_major=override("time_major", self.time_major, time_major),
            return_carry=override("return_carry", self.return_carry, return_carry),
            reverse=override("reverse", self.reverse, reverse),
            keep_order=override("keep_order", self.keep_order, keep_order),
        )

    def step(self, state: State, x: Float[Array, "*batch I"]) -> tuple[State, Float[Array, "*batch P"]]:
        """Runs ``lstm.step``: ``rnn.apply(variables, state, x, method="step")``."""
        return self.lstm.step(self.weights, state, x)


class LSTMCell(nn.RNNCellBase):
    """One step of one layer, for `nn.RNN` and other scans: ``carry, y = cell.apply(variables, carry, x)``.

    The carry is Flax's: ``(c, h)``, each ``(*batch, size)``, or h alone for a cell without c, such as a GRU. c is a
    dictionary for a cell with several states, such as ``"slstm"``.

    Attributes:
      lstm: the configuration: one layer, one direction, no regularizers and no learned state.
      sharding: as in `LSTM`.
    """

    lstm: jaxlstm.rnn.RNN
    sharding: Sharding | None = None

    def setup(self) -> None:
        """Declares the parameters.

        Raises:
          ValueError: for a configuration that needs the whole sequence.
        """
        common.check_cell_options(self.lstm)
        self.weights = self.param("lstm", _init_params, self.lstm, self.sharding)

    def __call__(self, carry: Any, inputs: Float[Array, "*batch I"]) -> tuple[Any, Float[Array, "*batch P"]]:
        """Runs one step.

        Args:
          carry: ``(c, h)``, or h alone, from `initialize_carry` or the previous step; or a `jaxlstm.State` of the same
            arrays.
          inputs: input of this step; integers are promoted.

        Returns:
          The new carry, of the type of the old one, and h in the ``dtype`` of the configuration.

        Raises:
          ValueError, TypeError: for a wrong shape, size, dtype or type.
        """
        return common.apply_step(self.lstm, self.weights, carry, inputs)

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        """Returns a carry of zeros.

        Args:
          rng: ignored.
          input_shape: shape of the input of one step, ``(*batch, I)``.

        Raises:
          ValueError: if the state is learned: linen calls this method without parameters.
        """
        del rng
        if self.lstm.learned_state:
            raise ValueError("learned_state=True is not available in linen's LSTMCell; use LSTM")
        return common.carry_from_state(self.lstm.initial_state(input_shape[:-1]))

    @property
    def num_feature_axes(self) -> int:
        """Number of axes of an input that are not batch axes: 1."""
        return 1


def _init_params(key: Array, lstm: jaxlstm.rnn.RNN, sharding: Sharding | None) -> Params:
    """Returns initial parameters, with arrays that have a sharding in a box of Flax."""

    def annotate(array: Array, mesh_axes: MeshAxes | None) -> Any:
        return array if mesh_axes is None else nn.Partitioned(array, mesh_axes)

    return common.annotate_params(lstm.init(key), sharding, annotate)
