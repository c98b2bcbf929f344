"""Flax modules around a `jaxlstm.LSTM`: those of nnx here, those of linen in `jaxlstm.flax.linen`.

    lstm = jaxlstm.LSTM(64, 256, num_layers=2)
    rnn = jaxlstm.flax.LSTM(lstm, rngs=nnx.Rngs(0))                     # the network, called as nnx.RNN is
    rnn = nnx.RNN(jaxlstm.flax.LSTMCell(jaxlstm.LSTM(64, 256), rngs=nnx.Rngs(0)))      # a cell in Flax's own scan

    rnn = jaxlstm.flax.linen.LSTM(lstm)
    variables = rnn.init(jax.random.key(0), inputs)

The network is compiled and differentiated as everywhere in this package; a cell runs, step by step, in the scan that
Flax puts around it. The parameters of either are one `jaxlstm.Params`.
"""

from jaxlstm.flax import linen as linen
from jaxlstm.flax.nnx import LSTM as LSTM
from jaxlstm.flax.nnx import LSTMCell as LSTMCell
