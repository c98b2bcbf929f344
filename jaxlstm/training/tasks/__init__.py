"""What can be learnt with `train.py --task`: one file per task, named in one table.

A task's file has ``DEFAULTS``, its own defaults of `jaxlstm.training.config.Options`, and ``make(options)``, a
`jaxlstm.training.tasks.task.Task`. That of a language model also has ``write``.
"""

from types import ModuleType

from jaxlstm.training.tasks import adding, charlm, copying, digits, forecast, wordlm

TASKS: dict[str, ModuleType] = {
    "charlm": charlm,
    "wordlm": wordlm,
    "adding": adding,
    "copy": copying,
    "digits": digits,
    "forecast": forecast,
}
