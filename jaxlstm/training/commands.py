"""The command ``jaxlstm`` and its subcommands, loaded on first use; standard library only.

The packages of the subcommands are optional; without them a command ends with one line that names the extra.
"""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

# Name: (function, help). Functions take the arguments and the name of the program.
COMMANDS = {
    "train": ("jaxlstm.training.cli:train_main", "train a recurrent network, by default on real text"),
    "sample": ("jaxlstm.training.cli:sample_main", "write text with a trained language model"),
    "inspect": ("jaxlstm.training.diagnose_cli:inspect_main", "draw gates and cell states of a trained model"),
    "explore": (
        "jaxlstm.training.diagnose_cli:explore_main",
        "write a page that shows a trained model at work on a text",
    ),
    "vanishing": ("jaxlstm.training.diagnose_cli:vanishing_main", "compare gradients through time of RNN and LSTM"),
}
HELP = "\n".join(
    [
        "usage: jaxlstm COMMAND [OPTIONS]",
        "",
        "commands:",
        *(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "jaxlstm COMMAND --help lists the options of a command.",
    ]
)


def main() -> None:
    """Runs the command line of the process."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print_help()
        return
    if arguments[0] not in COMMANDS:
        raise SystemExit(f"jaxlstm: no command {arguments[0]!r}, expected one of {', '.join(COMMANDS)}")
    run_command(COMMANDS[arguments[0]][0], arguments[1:], prog=f"jaxlstm {arguments[0]}")


def print_help() -> None:
    """Prints the commands, also to a reader that closes the pipe before the end."""
    try:
        print(HELP, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit


def run_command(target: str, arguments: Sequence[str], *, prog: str) -> None:
    """Imports and runs the function of a command.

    Args:
      target: the function, as ``"module:function"``.
      arguments: arguments of the command.
      prog: name of the program, for help and errors.

    Raises:
      SystemExit: with one line, if a package of the extra ``train`` is not installed.
    """
    module, function = target.split(":")
    with one_line_imports(prog):
        command = getattr(importlib.import_module(module), function)
    command(arguments, prog)


@contextlib.contextmanager
def one_line_imports(prog: str) -> Iterator[None]:
    """Ends the process with one line if an import fails for a missing package, and without a traceback on Ctrl-C.

    Args:
      prog: name of the program, for errors.

    Raises:
      SystemExit: with one line, if a package of the extra ``train`` is not installed.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "jaxlstm"):
            raise
        raise SystemExit(f"{prog}: {package} is not installed: pip install 'jaxlstm[train]'") from None
