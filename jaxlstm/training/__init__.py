"""The training application behind ``train.py`` and the ``jaxlstm`` command."""
