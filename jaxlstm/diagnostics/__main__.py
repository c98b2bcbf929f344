"""The commands ``jaxlstm inspect``, ``explore`` and ``vanishing`` as ``python -m jaxlstm.diagnostics``."""

import sys

from jaxlstm.training.commands import run_command

if __name__ == "__main__":
    run_command("jaxlstm.training.diagnose_cli:main", sys.argv[1:], prog="python -m jaxlstm.diagnostics")
