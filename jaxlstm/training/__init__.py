"""The training application behind ``train.py`` and the command ``jaxlstm``.

From the command line to one step: `commands` finds the subcommand, `cli` parses the options of `config`, `loop.Trainer`
builds the task (`tasks`, with `data` and `models`), the `optimizer` with its learning-rate schedule and the compiled
`train_step`, and runs them in a `run_directory`.
"""
