"""Classifies sequences of unequal length: which package is a line of Python code from?

python examples/classify.py         500 steps
python examples/classify.py 100     fewer steps
"""

import sys
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlstm

PACKAGES, LONGEST, BATCH_SIZE, VOCABULARY_SIZE = ("asyncio", "email", "xml"), 64, 64, 128
library = Path(sysconfig.get_paths()["stdlib"])
lines = [
    {line.strip()[:LONGEST] for path in (library / name).rglob("*.py") for line in path.read_text("utf-8").splitlines()}
    for name in PACKAGES
]
examples = [(line, label) for label, each in enumerate(lines) for line in sorted(each) if len(line) >= 20]
ids = np.zeros((LONGEST, len(examples)), np.int32)  # (T, N), padded
for n, (line, _) in enumerate(examples):
    ids[: len(line), n] = [min(ord(character), VOCABULARY_SIZE - 1) for character in line]
lengths = np.array([len(line) for line, _ in examples])
labels = np.array([label for _, label in examples])
test, train = np.split(np.random.default_rng(0).permutation(len(examples)), [len(examples) // 5])

lstm = jaxlstm.LSTM(32, 64, bidirectional=True)
keys = jax.random.split(jax.random.key(0), 3)
params = {"lstm": lstm.init(keys[0]), "embedding": jax.random.normal(keys[1], (VOCABULARY_SIZE, 32))}
params["out"] = jax.random.normal(keys[2], (2 * 64, len(PACKAGES))) / 10
optimizer = optax.adam(5e-3)


def logits(params, ids, lengths):
    """Returns the logits ``(B, classes)`` of lines ``(T, B)``, from the last output of each direction."""
    ys, _ = lstm(params["lstm"], params["embedding"][ids], lengths=lengths)
    return jaxlstm.last_outputs(ys, lengths, bidirectional=True) @ params["out"]


@jax.jit
def update(params, opt_state, ids, lengths, labels):
    """Takes one step of Adam."""

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, ids, lengths), labels).mean()

    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


opt_state, rng = optimizer.init(params), np.random.default_rng(1)
for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 500):
    batch = rng.choice(train, BATCH_SIZE, replace=False)
    params, opt_state = update(params, opt_state, ids[:, batch], lengths[batch], labels[batch])
predicted = jnp.argmax(jax.jit(logits)(params, ids[:, test], lengths[test]), -1)
print(f"accuracy on {len(test):,} new lines: {np.mean(predicted == labels[test]):.3f}")
print(f"always the most frequent package: {np.bincount(labels).max() / len(labels):.3f}")
