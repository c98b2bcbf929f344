"""The program ``jaxlstm``: a module outside of the package, whose import takes seconds that Ctrl-C must end cleanly."""

import signal


def main() -> None:
    """Runs the command line of the process; Ctrl-C during the imports ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from jaxlstm.training.commands import main as run

    run()
