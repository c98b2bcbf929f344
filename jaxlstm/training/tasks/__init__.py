"""The tasks of ``train.py --task``: one module each, listed in one table.

To add a task, write a module with the attributes of `jaxlstm.training.tasks.task.TaskModule` and add it to `TASKS`.
"""

from jaxlstm.training.tasks import adding, charlm, classify, copying, digits, forecast, formal, wordlm
from jaxlstm.training.tasks.task import TaskModule

TASKS: dict[str, TaskModule] = {
    "charlm": charlm,
    "wordlm": wordlm,
    "adding": adding,
    "copy": copying,
    "digits": digits,
    "forecast": forecast,
    "formal": formal,
    "classify": classify,
}
