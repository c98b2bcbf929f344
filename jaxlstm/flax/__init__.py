"""Flax modules around a `jaxlstm.LSTM`: for nnx here, for linen in `jaxlstm.flax.linen`.

    lstm = jaxlstm.LSTM(64, 256, num_layers=2)
    rnn = jaxlstm.flax.LSTM(lstm, rngs=nnx.Rngs(0))                     # the network, called like nnx.RNN
    rnn = nnx.RNN(jaxlstm.flax.LSTMCell(jaxlstm.LSTM(64, 256), rngs=nnx.Rngs(0)))      # a cell in the scan of nnx.RNN

    rnn = jaxlstm.flax.linen.LSTM(lstm)
    variables = rnn.init(jax.random.key(0), inputs)

The network modules run the compiled recurrence of this package. The cells run step by step, in the scan of Flax. The
parameters of both are one `jaxlstm.Params`.
"""

from jaxlstm.errors import optional_package

with optional_package("flax", extra="flax", purpose="jaxlstm.flax"):
    from jaxlstm.flax import linen as linen
    from jaxlstm.flax.nnx import LSTM as LSTM
    from jaxlstm.flax.nnx import LSTMCell as LSTMCell
