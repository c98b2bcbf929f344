"""Which backend runs if none is named: one row per platform, with the measurement behind it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxlstm import validation
from jaxlstm.recurrence.backends import EXPERIMENTAL, NAMES, ImplementationName
from jaxlstm.recurrence.context import only_traced


class PlatformDefault(NamedTuple):
    """The backend of a platform.

    Shapes have no column: `jaxlstm.autotune` measures at one shape. With JAX 0.12, ``"scan"`` is faster than
    ``"fused"`` at 2 of 20 random shapes in training (at best 0.87 of the time) and at 5 in inference (0.71).
    """

    name: ImplementationName
    reason: str
    others: dict[str, str]  # why each other backend is not chosen, if it does not refuse


CPU = "on a 2-core CPU"
UNMEASURED = "not measured on this platform"
NEVER_RUN = {  # hardware that an experimental backend was not run on
    "associative": "experimental: not measured on this platform",
    "newton": "experimental: not measured on this platform",
    "pallas": "experimental: never run on this hardware; its numbers were checked in an interpreter",
    "cudnn": "experimental: never run on a GPU",
}
TENSOR_PARALLEL = "for meshes with more than one device along the axis 'model'; equals 'scan' on one device"
OTHERS = {"scan": UNMEASURED, "tensor_parallel": TENSOR_PARALLEL, **NEVER_RUN}
PLATFORM_DEFAULTS = {
    "cpu": PlatformDefault(
        "fused",
        f"the fastest {CPU} on average (benchmarks/README.md); jaxlstm.autotune measures at one shape",
        OTHERS
        | {
            "scan": f"slower: on average 1.51 times the training step, 1.32 times the inference, over 20 shapes {CPU}",
            "associative": (
                f"experimental, for cells affine in their state: 0.39 to 0.82 times the training step, 0.32 to 0.39 "
                f"times the inference, with minLSTM at 4 shapes {CPU}"
            ),
            "newton": (
                f"experimental and slower: 1.9 to 23 times the training step, 2 to 197 times the inference, at 8 "
                f"shapes {CPU}"
            ),
        },
    ),
    "gpu": PlatformDefault("fused", "no backend was measured on this platform", OTHERS),
    "tpu": PlatformDefault("fused", "no backend was measured on this platform", OTHERS),
}
UNKNOWN_PLATFORM = PlatformDefault("fused", "this platform is not in the table", OTHERS)


def default_backend(platform: str) -> ImplementationName:
    """Returns the name of the backend that runs on a platform, named as by `jax.default_backend`."""
    return PLATFORM_DEFAULTS.get(platform, UNKNOWN_PLATFORM).name


@dataclass(frozen=True)
class BackendChoice:
    """The backend that runs, and why; prints as one line per backend."""

    name: str
    reason: str
    others: dict[str, str]  # why each other backend is not chosen

    def __str__(self) -> str:
        lines = [f"{self.name}: chosen; {self.reason}"]
        return "\n".join([*lines, *(f"{name}: not chosen; {why}" for name, why in self.others.items())])


def explain(lstm: Any, xs_shape: tuple[int, ...]) -> BackendChoice:
    """Tells which backend runs if ``implementation`` is None, and why each of the others does not.

    Nothing runs: a backend that refuses the network is found by tracing a call without masks, resets and key.
    Experimental backends are marked as such.

    Args:
      lstm: a `jaxlstm.LSTM`; its own ``implementation`` is ignored.
      xs_shape: ``(T, *batch, I)``.

    Raises:
      ValueError, TypeError: as a call with such inputs does.
    """
    if not hasattr(lstm, "implementation"):
        raise TypeError(f"lstm must be a jaxlstm.LSTM, got {type(lstm).__name__}")
    xs_shape = validation.sizes("xs_shape", xs_shape)
    default = PLATFORM_DEFAULTS.get(jax.default_backend(), UNKNOWN_PLATFORM)
    _trace(lstm, default.name, xs_shape)
    others = {}
    at_least_one_step = (max(*xs_shape[:1], 1), *xs_shape[1:])  # without a step no backend runs that could refuse
    for name in NAMES:
        if name == default.name:
            continue
        try:
            _trace(lstm, name, at_least_one_step)
            others[name] = default.others[name]
        except ValueError as refusal:
            others[name] = f"{'experimental; ' if name in EXPERIMENTAL else ''}refused: {refusal}"
    return BackendChoice(default.name, default.reason, others)


def _trace(lstm: Any, name: str, xs_shape: tuple[int, ...]) -> None:
    lstm = validation.replace_quietly(lstm, implementation=name)
    params = jax.eval_shape(lstm.init, jax.random.key(0))
    with only_traced(True):
        jax.eval_shape(lstm, params, jax.ShapeDtypeStruct(xs_shape, lstm.param_dtype))
