"""Quantiles of gradient norms, and the advice they lead to."""

import numpy as np
import pytest

from jaxlstm import diagnostics


def test_gradient_advice_computes_quantiles_and_the_clipped_fraction():
    norms = np.append(np.random.default_rng(0).permutation(np.arange(101.0)), [np.nan, np.inf])
    advice = diagnostics.gradient_advice(norms, clip=75.0)
    assert advice.quantiles == pytest.approx({0.1: 10, 0.5: 50, 0.9: 90, 0.99: 99})
    assert advice.suggested_clip == pytest.approx(90)
    assert advice.clipped == pytest.approx(25 / 101)
    assert "2 of 103 gradients are not finite" in advice.report
    assert "25% of the steps are above the limit 75" in advice.report


@pytest.mark.parametrize(
    ("norms", "clip", "words"),
    [
        (np.full(30, 2.0), 1.0, "most steps are scaled to one norm"),
        (np.append(np.ones(97), [50.0, 60.0, 70.0]), None, "limit the norm to 1."),
        (np.geomspace(1, 100, 30), None, "the norm has grown by a factor of"),
    ],
)
def test_gradient_advice_names_a_remedy_only_when_needed(norms, clip, words):
    assert words in diagnostics.gradient_advice(norms, clip=clip).report
    healthy = 1 + 0.1 * np.sin(np.arange(100))
    assert words not in diagnostics.gradient_advice(healthy, clip=1.05).report


@pytest.mark.parametrize("norms", [[], [np.nan], np.ones((2, 2))])
def test_gradient_advice_rejects_no_norms(norms):
    with pytest.raises(ValueError, match=r"norms must have shape \(N,\) and a finite number"):
        diagnostics.gradient_advice(norms)
