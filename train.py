"""Trains a recurrent network, by default a character language model on real text: ``python train.py --help``.

`jaxlstm.training.cli.train_main` parses the options (declared in ``jaxlstm/training/config.py``), builds a `Trainer`
(``jaxlstm/training/loop.py``) and runs it. ``jaxlstm train`` is the same command.
"""

import sys

from jaxlstm.training.commands import run_command

if __name__ == "__main__":
    run_command("jaxlstm.training.cli:train_main", sys.argv[1:], prog="train.py")
