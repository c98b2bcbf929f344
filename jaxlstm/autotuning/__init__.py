"""Finds the fastest backend and layout of a network by measurement: `jaxlstm.autotune`.

`jaxlstm.autotuning.candidates` lists what may be chosen, `jaxlstm.autotuning.agreement` checks the numbers of each
candidate, `jaxlstm.autotuning.search` times them, and `jaxlstm.autotuning.tuning` has the result and its file.
"""

from jaxlstm.autotuning.tune import autotune as autotune
from jaxlstm.autotuning.tuning import Trial as Trial
from jaxlstm.autotuning.tuning import Tuning as Tuning
from jaxlstm.autotuning.tuning import load_tuning as load_tuning
