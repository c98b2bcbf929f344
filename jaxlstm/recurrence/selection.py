"""Which implementation is taken where none is named: one table, and the measurement behind each of its rows."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax


class PlatformDefault(NamedTuple):
    """What is taken on a platform.

    Shapes have no column. Of those measured another wins at one, and in inference alone: ``"scan"`` takes 0.87 of the
    time at (T, B, I, H) = (512, 1, 64, 128), 0.93 on another machine, where its training step takes 1.84 and 2.08; with
    JAX 0.12 0.94, where it takes 1.22.
    """

    takes: str
    because: str
    others: dict[str, str]  # why not, where nothing is refused


UNMEASURED = "unmeasured on this platform"
CPU = "on a 2-core CPU"
TABLE = {
    "cpu": PlatformDefault(
        "fused",
        f"the fastest measured {CPU}, on average and in training at every shape (benchmarks/README.md)",
        {
            "scan": f"slower: 1.51 times the training step, 1.26 times the inference or more, over 5 shapes {CPU}",
            "newton": f"slower: 1.9 to 23 times the training step, 2 to 197 times the inference, at 8 shapes {CPU}",
        },
    ),
    "gpu": PlatformDefault(
        "fused", f"all are {UNMEASURED}", dict.fromkeys(("scan", "newton", "pallas", "cudnn"), UNMEASURED)
    ),
    "tpu": PlatformDefault("fused", f"all are {UNMEASURED}", dict.fromkeys(("scan", "newton", "pallas"), UNMEASURED)),
}
OTHER = PlatformDefault("fused", "this platform is not in the table", dict.fromkeys(("scan", "newton"), UNMEASURED))


def choose(platform: str) -> str:
    """The name of the implementation that is taken on a platform, as `jax.default_backend` calls it."""
    return TABLE.get(platform, OTHER).takes


@dataclass(frozen=True)
class BackendChoice:
    """What would be taken, and why; printed, one line for each implementation."""

    takes: str
    because: str
    others: dict[str, str]  # why each of the others would not

    def __str__(self) -> str:
        lines = [f"{self.takes}: taken; {self.because}"]
        return "\n".join([*lines, *(f"{name}: not taken; {why}" for name, why in self.others.items())])


def explain(lstm: Any, xs_shape: tuple[int, ...]) -> BackendChoice:
    """Which implementation runs where ``implementation`` is None, and why each of the others does not.

    Nothing runs: an implementation that refuses is found by tracing a call without masks, resets and key.

    Args:
      lstm: a `jaxlstm.LSTM`; its own ``implementation`` has no say.
      xs_shape: ``(T, *batch, I)``.

    Raises:
      ValueError, TypeError: as a call with such inputs does.
    """
    from jaxlstm.recurrence import IMPLEMENTATIONS  # which this module is a part of

    row = TABLE.get(jax.default_backend(), OTHER)
    _trace(lstm, row.takes, xs_shape)
    others = {}
    at_least_one = (max(xs_shape[0], 1), *xs_shape[1:])  # without a step nothing runs that could refuse
    for name in IMPLEMENTATIONS:
        if name != row.takes:
            try:
                _trace(lstm, name, at_least_one)
                others[name] = row.others[name]
            except ValueError as refusal:
                others[name] = f"refused: {refusal}"
    return BackendChoice(row.takes, row.because, others)


def _trace(lstm: Any, name: str, xs_shape: tuple[int, ...]) -> None:
    lstm = replace(lstm, implementation=name)
    params = jax.eval_shape(lstm.init, jax.random.key(0))
    jax.eval_shape(lstm, params, jax.ShapeDtypeStruct(xs_shape, lstm.param_dtype))
