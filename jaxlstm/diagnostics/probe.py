"""A linear probe of recorded states, with its control task."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from jaxlstm import validation


class ProbeData(NamedTuple):
    """States with the labels to decode from them, and the types that the control task labels at random."""

    features: Float[ArrayLike, "N F"]  # for example h or c of a trace
    labels: Int[ArrayLike, " N"]  # classes
    types: Shaped[
        ArrayLike, " N"
    ]  # numbers or strings: the token at each step, or the word, or the last few characters


class ProbeAccuracy(NamedTuple):
    """Accuracies on the test data."""

    task: float  # of the labels
    control: float  # of random labels, one for each type
    majority: float  # of always answering the most frequent training label

    @property
    def selectivity(self) -> float:
        """The accuracy on the task minus the accuracy on the control task."""
        return self.task - self.control


def probe(train: ProbeData, test: ProbeData, *, ridge: float = 1.0, seed: int = 0) -> ProbeAccuracy:
    """Computes how well a linear classifier decodes labels from states, and how well it memorizes random labels.

    A high accuracy alone says little: a probe with enough weights learns any labels. In the control task each type has
    a random label, drawn from the training labels, so the labels can only be memorized. A selective probe is accurate
    on the task and not on the control task (Hewitt & Liang 2019). The probe is least squares, one target per class.

    Args:
      train: states and labels to fit.
      test: states and labels to score, with the same number of features, from another text.
      ridge: weight of the squared coefficients, for features scaled to variance 1.
      seed: seed of the random labels.

    Raises:
      ValueError: for arrays whose shapes do not match, no examples, fewer than two classes or ``ridge`` not above 0.
      TypeError: for labels that are not integers.
    """
    ridge = validation.positive_number("ridge", ridge)
    (x, labels, types), (x_test, test_labels, test_types) = _arrays("train", train), _arrays("test", test)
    if x.shape[1] != x_test.shape[1]:
        raise ValueError(f"test has {x_test.shape[1]} features, expected {x.shape[1]} as train")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"the training labels must have two classes or more, got {np.unique(labels).tolist()}")
    names, numbers = np.unique(np.concatenate([types, test_types]), return_inverse=True)
    control = np.random.default_rng(seed).choice(labels, len(names))[numbers]
    tasks = np.stack([np.concatenate([labels, test_labels]), control])  # (2, N), training data first
    classes = np.unique(tasks)
    targets, truth = (tasks[:, : len(x), None] == classes).astype(float), tasks[:, len(x) :]
    mean, scale, bias = x.mean(0), x.std(0), targets.mean(1, keepdims=True)
    x, x_test = ((a - mean) / np.where(scale > 0, scale, 1) for a in (x, x_test))
    gram = x.T @ x + ridge * np.eye(x.shape[1])
    answers = classes[(x_test @ np.linalg.solve(gram, x.T @ (targets - bias)) + bias).argmax(-1)]
    task_accuracy, control_accuracy = (answers == truth).mean(1)
    majority = (test_labels == classes[bias[0].argmax()]).mean()
    return ProbeAccuracy(float(task_accuracy), float(control_accuracy), float(majority))


def _arrays(name: str, data: ProbeData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns features in float64, labels and types, if their shapes match."""
    features, labels, types = np.asarray(data.features, np.float64), np.asarray(data.labels), np.asarray(data.types)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{name}.features must have shape (N, F) with N at least 1, got {list(features.shape)}")
    for field, a in (("labels", labels), ("types", types)):
        if a.shape != features.shape[:1]:
            raise ValueError(f"{name}.{field} must have shape [{len(features)}], one per state, got {list(a.shape)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name}.labels must be integers, got {labels.dtype}")
    return features, labels, types
