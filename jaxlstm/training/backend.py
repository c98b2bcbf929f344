"""The backend of the training step: named by ``--implementation``, or measured by `jaxlstm.autotune` before the first.

Validation, sampling and diagnosis have other shapes and masks, and run the default backend. A measured backend is kept
in ``config.json`` and in every checkpoint, as a JSON object with the entries `SAVED_TYPES`: a resumed run is the same
program.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlstm.autotuning.configuration import implementation_from_json, implementation_to_json
from jaxlstm.autotuning.tune import tune
from jaxlstm.autotuning.tuning import Tuning, device_name
from jaxlstm.json_types import check_entries
from jaxlstm.rnn import RNN
from jaxlstm.training import config
from jaxlstm.training.config import Options
from jaxlstm.training.tasks.task import Task
from jaxlstm.training.train_step import TrainState
from jaxlstm.validation import replace_quietly

AUTO = "auto"
SECONDS = 20.0  # for a measurement
SHARE_OF_RUN = 0.05  # largest share of --max-seconds for it
NUM_BYTES = 2048  # of a measured backend on its way to other processes
SAVED_TYPES: dict[str, Any] = {"implementation": str | dict[str, Any], "unroll": int, "device": str}


def is_measured(options: Options) -> bool:
    """Returns whether the backend is measured: if asked to, and by default on GPUs and TPUs.

    A mesh that splits hidden units has one backend, ``"tensor_parallel"``.
    """
    if config.splits_units(options):
        return False
    return options.implementation == AUTO or (options.implementation is None and jax.default_backend() != "cpu")


def named_backend(options: Options, lstm: RNN) -> RNN:
    """Returns the network of a task with the backend that ``--implementation`` names, if it names one.

    Raises:
      ValueError: for a backend that does not support the mesh.
    """
    name = options.implementation
    if name is None or name == AUTO:
        return lstm
    if config.splits_units(options) and name != "tensor_parallel":
        raise ValueError(
            f"--implementation {name} cannot split hidden units over --mesh {options.mesh}; expected tensor_parallel"
        )
    return replace_quietly(lstm, implementation=name)


def measure_backend(options: Options, task: Task, state: TrainState, mesh: Mesh | None) -> tuple[dict[str, Any], str]:
    """Measures the training step of the recurrent network with the shapes of a run, on one device.

    With a mesh, the shapes are those of one device, and the experimental backends, which do not split a batch over
    devices, are no candidates.

    Returns:
      The measured backend, and one line about it.

    Raises:
      ValueError: if no backend gives correct results.
    """
    xs, _ = jax.eval_shape(task.lstm_inputs, state.params, state.carry, next(task.batches(0)))
    num_steps, batch_size, input_size = xs.shape
    xs_shape = (num_steps, batch_size // (1 if mesh is None else mesh.shape["data"]), input_size)
    seconds = min(SECONDS, SHARE_OF_RUN * (options.max_seconds or np.inf))
    try:
        tuning = tune(task.lstm, xs_shape, training=True, seconds=seconds, experimental=mesh is None)
    except jax.errors.JaxRuntimeError:  # of the machine
        raise
    except RuntimeError as error:
        raise ValueError(f"--implementation {AUTO}: {error}") from None
    saved = {
        "implementation": implementation_to_json(tuning.lstm.implementation),
        "unroll": tuning.lstm.unroll,
        "device": tuning.device,
    }
    return saved, describe(tuning)


def describe(tuning: Tuning) -> str:
    """Returns one line about the outcome of a measurement."""
    chosen, timed = tuning.table[0], [trial for trial in tuning.table if trial.seconds is not None]
    line = (
        f"backend {chosen.candidate}, the {'default and ' if chosen.is_default else ''}fastest of {len(timed)} measured"
    )
    for trial in timed:
        if trial.is_default and trial is not chosen:
            line += f": {chosen.milliseconds} instead of {trial.milliseconds} by default"
    return line


def with_backend(lstm: RNN, saved: dict[str, Any]) -> RNN:
    """Returns the network of a task with a measured backend.

    Raises:
      ValueError: for a missing, unknown or wrong entry.
    """
    check_entries(saved, SAVED_TYPES, "backend")
    implementation: Any = implementation_from_json(saved["implementation"], "backend")
    return replace_quietly(lstm, implementation=implementation, unroll=saved["unroll"])


def is_of_this_device(saved: dict[str, Any]) -> bool:
    """Returns whether a backend was measured on the kind of device that this run has."""
    return saved.get("device") == device_name()


def from_first_process(choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns ``choose()`` of process 0 in all processes; the others wait."""
    if jax.process_count() == 1:
        return choose()
    values = choose() if jax.process_index() == 0 else {}
    buffer = np.frombuffer(json.dumps(values).encode().ljust(NUM_BYTES), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())
