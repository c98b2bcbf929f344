"""The modules of `jaxlstm.flax` for Flax linen; ``variables["params"]["lstm"]`` is a `jaxlstm.Params`."""

from typing import Any

from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlstm import lstm as model
from jaxlstm.flax import common
from jaxlstm.flax.common import NOWHERE, Sharding
from jaxlstm.params import Params, State


class LSTM(nn.Module):
    """A network over whole sequences, called as `nn.RNN` is: ``outputs = rnn.apply(variables, inputs)``.

    It takes the place of ``nn.RNN(cell)``, of stacks of it, and of a direction of `nn.Bidirectional`. The numbers are
    those of ``lstm(params, xs)``.

    Attributes:
      lstm: the configuration.
      time_major: whether inputs are ``(T, *batch, I)`` instead of ``(*batch, T, I)``.
      return_carry: whether a call returns ``(carry, outputs)``.
      reverse: whether time runs backward.
      keep_order: whether outputs then stay aligned with their inputs instead of coming in the order of reading.
      deterministic: whether the regularisers are off; where None, a call has to say it. They draw from the stream
        ``dropout``.
      sharding: mesh axes for arrays by name, such as ``{"w_x": ("model", None), "b": ("model",)}``, for every layer
        and direction; as by `nn.with_partitioning`.
    """

    lstm: model.LSTM
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    deterministic: bool | None = None
    sharding: Sharding = NOWHERE

    def setup(self) -> None:
        """Declare the parameters."""
        self.weights = self.param("lstm", _init, self.lstm, self.sharding)

    def __call__(
        self,
        inputs: Float[Array, "*batch_T I"],
        *,
        initial_carry: State | None = None,
        init_key: Array | None = None,
        seq_lengths: Int[Array, "*batch"] | None = None,
        mask: Bool[Array, "*batch_T"] | None = None,
        resets: Bool[Array, "*batch_T"] | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """The network over a sequence; an argument that is None is as the attribute says.

        Args:
          inputs: ``(*batch, T, I)``, or ``(T, *batch, I)`` if ``time_major``.
          initial_carry: a `jaxlstm.State`; where None zeros, or the learned one.
          init_key: not used: no initial carry is drawn. It is what `nn.Bidirectional` passes.
          seq_lengths: as ``lengths`` of `jaxlstm.LSTM`: what is behind them is not read, and outputs are zero there.
          mask: as there, with time where ``inputs`` have it.
          resets: the same.
          return_carry: whether the last state is returned too.
          time_major: whether time is the leading axis.
          reverse: whether time runs backward.
          keep_order: whether outputs then stay aligned with their inputs.
          deterministic: whether the regularisers are off; said here or by the attribute, not by both.

        Returns:
          outputs, ``(*batch, T, D*P)`` or ``(T, *batch, D*P)``; with ``return_carry`` the `jaxlstm.State` before them.

        Raises:
          ValueError, TypeError: for a wrong shape, size, dtype or type.
        """
        del init_key

        def chosen(value: bool | None, default: bool) -> bool:
            return default if value is None else value

        key = None
        if common.is_stochastic(self.lstm) and not nn.merge_param("deterministic", self.deterministic, deterministic):
            key = self.make_rng("dropout")
        return common.over_time(
            self.lstm,
            self.weights,
            inputs,
            initial_carry,
            seq_lengths,
            mask,
            resets,
            key,
            time_major=chosen(time_major, self.time_major),
            return_carry=chosen(return_carry, self.return_carry),
            reverse=chosen(reverse, self.reverse),
            keep_order=chosen(keep_order, self.keep_order),
        )

    def step(self, state: State, x: Float[Array, "*batch I"]) -> tuple[State, Float[Array, "*batch P"]]:
        """``lstm.step``: ``rnn.apply(variables, state, x, method="step")``."""
        return self.lstm.step(self.weights, state, x)


class LSTMCell(nn.RNNCellBase):
    """One step of one layer, for `nn.RNN` and scans of the user's own: ``carry, y = cell.apply(variables, carry, x)``.

    The carry is Flax's: ``(c, h)``, each ``(*batch, .)``, or h alone for a cell without c.

    Attributes:
      lstm: the configuration, of one layer in one direction, without regularisers and without a learned state.
      sharding: as of `LSTM`.
    """

    lstm: model.LSTM
    sharding: Sharding = NOWHERE

    def setup(self) -> None:
        """Declare the parameters.

        Raises:
          ValueError: for a configuration that a cell cannot have.
        """
        common.check_cell(self.lstm)
        self.weights = self.param("lstm", _init, self.lstm, self.sharding)

    def __call__(self, carry: Any, inputs: Float[Array, "*batch I"]) -> tuple[Any, Float[Array, "*batch P"]]:
        """One step.

        Args:
          carry: ``(c, h)``, or h alone, from `initialize_carry` or the step before.
          inputs: of this step.

        Returns:
          the new carry, and h in the configuration's ``dtype``.
        """
        return common.step(self.lstm, self.weights, carry, inputs)

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        """Zeros.

        Args:
          rng: not used.
          input_shape: of the inputs of one step, ``(*batch, I)``.

        Raises:
          ValueError: if the state is learned: linen asks for the carry where there are no parameters.
        """
        del rng
        if self.lstm.learned_state:
            raise ValueError("learned_state=True needs the whole sequence: LSTM has it, a cell of linen has not")
        return common.from_state(self.lstm.initial_state(input_shape[:-1]))

    @property
    def num_feature_axes(self) -> int:
        """The axes of an input that are no batch axes: 1."""
        return 1


def _init(key: Array, lstm: model.LSTM, sharding: Sharding) -> Params:
    """Parameters, in Flax's boxes where they have a sharding."""

    def wrap(array: Array, axes: tuple[str | None, ...] | None) -> Any:
        return array if axes is None else nn.Partitioned(array, axes)

    return common.place(lstm.init(key), sharding, wrap)
