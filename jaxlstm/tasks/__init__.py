"""What can be learnt with `train.py --task`: one file per task, named in one table.

A task's file has ``DEFAULTS``, its own defaults of `jaxlstm.options.Options`, and ``make(options)``, a
`jaxlstm.tasks.task.Task`. That of a language model also has ``write``.
"""

from jaxlstm.tasks import charlm

TASKS = {"charlm": charlm}
