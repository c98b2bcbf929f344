"""Advice on clipping and the learning rate from the gradient norms of a run."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxlstm import validation

QUANTILES = (0.1, 0.5, 0.9, 0.99)
CLIPPED_OFTEN, CLIPPED_NEVER = 0.5, 0.01  # shares of clipped steps
SPIKE = 10.0  # the 0.99-quantile of the norms relative to their median
DRIFT = 3.0  # the median of the last third of the steps relative to the first third's


class GradientAdvice(NamedTuple):
    """Summary of the global gradient norms of a run, before clipping."""

    quantiles: dict[float, float]  # of the norms, by 0.1, 0.5, 0.9 and 0.99
    clipped: float | None  # fraction of the steps above the limit in use; None without one
    suggested_clip: float  # the 0.9-quantile: it scales down one step in ten
    report: str  # summary in words, with remedies


def gradient_advice(norms: Float[ArrayLike, " N"], *, clip: float | None = None) -> GradientAdvice:
    """Summarizes gradient norms recorded during training, and suggests a limit and changes of the learning rate.

    Statistics of the norms over many updates are the usual way to a limit (Pascanu, Mikolov & Bengio 2013), for example
    a quantile (Seetharaman et al. 2020).

    Args:
      norms: global norms of the gradient before clipping, in the order of the steps; not finite at skipped steps.
      clip: the limit in use; None for none.

    Raises:
      ValueError: without a finite norm, or for a limit not above 0.
    """
    values = np.asarray(norms, np.float64)
    clip = None if clip is None else validation.positive_number("clip", clip)
    finite = values[np.isfinite(values)] if values.ndim == 1 else values[:0]
    if not len(finite):
        raise ValueError(f"norms must have shape (N,) and a finite number or more, got shape {list(values.shape)}")
    quantiles = dict(zip(QUANTILES, np.quantile(finite, QUANTILES).tolist()))
    clipped = None if clip is None else float((finite > clip).mean())
    suggested = quantiles[0.9]
    third = max(1, len(finite) // 3)
    drift = float(np.median(finite[-third:]) / max(np.median(finite[:third]), np.finfo(float).tiny))
    lines = [f"gradient norms of {len(finite):,} steps: " + ", ".join(f"{q:g}: {v:.3g}" for q, v in quantiles.items())]
    if clip is not None and clipped is not None:
        lines.append(f"{clipped:.0%} of the steps are above the limit {clip:g}")
        if clipped > CLIPPED_OFTEN:
            lines.append(
                "  most steps are scaled to one norm: the limit sets the size of the update. "
                f"Try a limit of {suggested:.2g}, and with SGD a lower learning rate in proportion."
            )
    if quantiles[0.99] > SPIKE * quantiles[0.5] and (clipped is None or clipped < CLIPPED_NEVER):
        lines.append(f"  a few gradients are {SPIKE:g} times the median or more: limit the norm to {suggested:.2g}.")
    if drift > DRIFT:
        lines.append(
            f"  the norm has grown by a factor of {drift:.2g}: a lower learning rate, a longer warmup or more weight"
            " decay keeps training stable."
        )
    if len(finite) < len(values):
        lines.append(
            f"  {len(values) - len(finite):,} of {len(values):,} gradients are not finite: lower the learning rate, and"
            " look for NaN in the data."
        )
    return GradientAdvice(quantiles, clipped, suggested, "\n".join(lines))
