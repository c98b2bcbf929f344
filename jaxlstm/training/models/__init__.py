"""Models built around `jaxlstm.LSTM`: embeddings, output layers and losses."""
