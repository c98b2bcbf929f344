"""Linear models of whole sequences, the baseline of ``--task classify``."""

import warnings
from collections.abc import Sequence

import numpy as np

from jaxlstm.errors import optional_package


def linear_predictions(
    train: Sequence[str] | Sequence[np.ndarray],
    targets: np.ndarray,
    test: Sequence[str] | Sequence[np.ndarray],
    *,
    balanced: bool = False,
) -> np.ndarray:
    """Returns the predictions of a linear model for ``test``.

    Texts become tf-idf weights of runs of 1 to 3 characters. Arrays ``(length, F)`` become the mean, standard
    deviation, minimum, maximum and last value of each feature, and the length. The model is a logistic regression
    for integer targets, a ridge regression for others.

    Args:
      train: sequences to fit.
      targets: classes or numbers, ``(len(train),)``.
      test: sequences to predict.
      balanced: whether classes have weights inverse to their frequency.

    Raises:
      ImportError: if scikit-learn is not installed.
    """
    with optional_package("sklearn", extra="tasks", purpose="--task classify", distribution="scikit-learn"):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer, StandardScaler
    if isinstance(train[0], str):
        features = [
            TfidfVectorizer(
                analyzer="char", ngram_range=(1, 3), lowercase=False, sublinear_tf=True, max_features=20_000
            )
        ]
    else:
        features = [FunctionTransformer(pooled_features), StandardScaler()]
    if targets.dtype.kind == "f":
        model = Ridge()
    else:
        model = LogisticRegression(C=10, tol=1e-3, class_weight="balanced" if balanced else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations are enough for a baseline
        return np.asarray(make_pipeline(*features, model).fit(train, targets).predict(test))


def pooled_features(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Returns statistics of each sequence over its steps, ``(N, 5*F + 1)`` float64."""
    rows = []
    for sequence in sequences:
        a = np.asarray(sequence, np.float64)
        rows.append(np.concatenate([a.mean(0), a.std(0), a.min(0), a.max(0), a[-1], [len(a)]]))
    return np.stack(rows)
