"""Trains a recurrent network, by default a character language model on real text: ``python train.py --help``.

The options are declared in ``jaxlstm/training/config.py``, the loop is ``jaxlstm/training/loop.py``, and the tasks with
their defaults are in ``jaxlstm/training/tasks``. ``jaxlstm train`` is the same command.
"""

import signal
import sys

PROG = "train.py"

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback
    from jaxlstm.training.commands import one_line_imports

    with one_line_imports(PROG):
        from rich.console import Console

        from jaxlstm.training import cli
        from jaxlstm.training.loop import Trainer

    cli.set_up_process()
    with cli.one_line_errors(PROG):
        options = cli.parse(sys.argv[1:], PROG)
        if not cli.use_run(options, Console()):
            Trainer(options, Console()).run()
