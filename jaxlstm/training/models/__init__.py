"""Models built around `jaxlstm.LSTM`: embeddings, heads and losses."""
