"""Regular languages whose strings a network classifies by tracking a state (Delétang et al. 2023).

The definitions follow "Neural Networks and the Chomsky Hierarchy", https://arxiv.org/abs/2207.02098. The strings are
random. A finite automaton that reads a string knows its class at every symbol.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

LanguageName = Literal["parity", "even_pairs", "cycle_navigation", "modular_arithmetic"]

CYCLE_LENGTH = 5
MODULUS = 5
PLUS, MINUS, TIMES = range(MODULUS, MODULUS + 3)  # the symbols after the numbers 0 to 4


class Strings(NamedTuple):
    """Strings of different lengths, each the beginning of a random string of T symbols, and their classes.

    The symbols after the length of a string continue it at random and do not affect its class.
    """

    inputs: np.ndarray  # (T, B, S) float32: one-hot symbols
    lengths: np.ndarray  # (B,) int32, from 1 to T
    classes: np.ndarray  # (B,) int32


class Language(NamedTuple):
    """A language: its symbols, and the class of a string."""

    num_symbols: int  # S
    num_classes: int
    prefix_classes: Callable[[np.ndarray], np.ndarray]  # symbols (T, B) -> class of each beginning (T, B)
    is_expression: bool = False  # numbers and operators alternate, so that all lengths are odd

    def lengths(self, first: int, last: int) -> np.ndarray:
        """Returns the lengths of strings of this language from ``first`` to ``last``, both included."""
        lengths = np.arange(first, last + 1, dtype=np.int32)
        return lengths[lengths % 2 == 1] if self.is_expression else lengths

    def draw(self, rng: np.random.Generator, lengths: np.ndarray, num_steps: int) -> Strings:
        """Draws one string per length.

        Args:
          rng: random number generator.
          lengths: ``(B,)`` int32, from `lengths`.
          num_steps: T, at least the largest length.
        """
        shape = (num_steps, len(lengths))
        if self.is_expression:
            symbols = rng.integers(MODULUS, size=shape)
            symbols[1::2] = rng.integers(PLUS, TIMES + 1, size=symbols[1::2].shape)
        else:
            symbols = rng.integers(self.num_symbols, size=shape)
        classes = self.prefix_classes(symbols)[lengths - 1, np.arange(len(lengths))]
        return Strings(np.eye(self.num_symbols, dtype=np.float32)[symbols], lengths, classes.astype(np.int32))


def parity(symbols: np.ndarray) -> np.ndarray:
    """Returns the number of ones modulo 2."""
    return symbols.cumsum(0) % 2


def even_pairs(symbols: np.ndarray) -> np.ndarray:
    """Returns the number of pairs 01 and 10 modulo 2, which is 1 if the first and the last symbol differ."""
    return symbols ^ symbols[0]


def cycle_navigation(symbols: np.ndarray) -> np.ndarray:
    """Returns the position on a cycle of 5 after steps back (0), none (1) and forward (2), from position 0."""
    return (symbols - 1).cumsum(0) % CYCLE_LENGTH


def modular_arithmetic(symbols: np.ndarray) -> np.ndarray:
    """Returns the value modulo 5 of an expression of numbers, +, - and *, where * binds more tightly.

    Beginnings that end with an operator have the value before it.
    """
    total, term = np.zeros_like(symbols[0]), symbols[0]  # the value is total + term; products change the term
    values = [term]
    for operator, number in zip(symbols[1::2], symbols[2::2]):
        is_product = operator == TIMES
        total = np.where(is_product, total, total + term) % MODULUS
        term = np.where(is_product, term * number, np.where(operator == MINUS, -number, number)) % MODULUS
        values += [values[-1], (total + term) % MODULUS]
    return np.stack([*values, values[-1]][: len(symbols)])


LANGUAGES: dict[LanguageName, Language] = {
    "parity": Language(2, 2, parity),
    "even_pairs": Language(2, 2, even_pairs),
    "cycle_navigation": Language(3, CYCLE_LENGTH, cycle_navigation),
    "modular_arithmetic": Language(TIMES + 1, MODULUS, modular_arithmetic, is_expression=True),
}
