"""How well classes are predicted: accuracy, macro-F1, their bootstrap intervals, and the confusion matrix.

Shapes: N texts, C classes, ... any.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]


def confusion(labels_N: Ints, predicted_N: Ints, classes: int) -> Ints:
    """[C, C]: texts of each class (row) by what was predicted (column).

    Raises:
        ValueError: no texts, arrays of unequal length, or a class that is not in 0..C-1.
    """
    if len(labels_N) != len(predicted_N) or not len(labels_N):
        raise ValueError(f"{len(labels_N)} labels and {len(predicted_N)} predictions: give one of each per text")
    both = np.concatenate([labels_N, predicted_N])
    if both.min() < 0 or both.max() >= classes:
        raise ValueError(f"classes must lie in 0..{classes - 1}, not {both.min()}..{both.max()}")
    return np.bincount(labels_N * classes + predicted_N, minlength=classes**2).reshape(classes, classes)


def accuracy(confusion_CC: Ints) -> Floats:
    """Share of the texts whose class was predicted; [..., C, C] -> [...]."""
    return np.trace(confusion_CC, axis1=-2, axis2=-1) / confusion_CC.sum((-2, -1))


def macro_f1(confusion_CC: Ints) -> Floats:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), each class counting alike; [..., C, C] -> [...].

    A class that is neither among the texts nor among the predictions has no F1 and is left out of the mean.
    """
    right = np.diagonal(confusion_CC, axis1=-2, axis2=-1)
    sizes = confusion_CC.sum(-1) + confusion_CC.sum(-2)
    f1 = np.divide(2.0 * right, sizes, out=np.zeros(sizes.shape), where=sizes > 0)
    return f1.sum(-1) / (sizes > 0).sum(-1)


@dataclass(frozen=True)
class Scored:
    """Predictions of one split against its labels."""

    confusion_CC: Ints

    @property
    def texts(self) -> int:
        return int(self.confusion_CC.sum())

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return float(accuracy(self.confusion_CC))

    @property
    def macro_f1(self) -> float:
        """In [0, 1]."""
        return float(macro_f1(self.confusion_CC))

    def accuracy_interval(self, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the accuracy: texts are drawn with replacement."""
        return self._interval(accuracy, resamples, seed)

    def macro_f1_interval(self, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """The same of macro-F1."""
        return self._interval(macro_f1, resamples, seed)

    def _interval(self, measure: Callable[[Ints], Floats], resamples: int, seed: int) -> tuple[float, float]:
        # N texts drawn with replacement fall into the cells of the matrix as a multinomial of their shares.
        cells = self.confusion_CC.ravel() / self.texts
        drawn = np.random.default_rng(seed).multinomial(self.texts, cells, resamples)
        low, high = np.quantile(measure(drawn.reshape(resamples, *self.confusion_CC.shape)), [0.025, 0.975])
        return float(low), float(high)


def score(labels_N: Ints, predicted_N: Ints, classes: int) -> Scored:
    """:class:`Scored` from one label and one prediction per text; see :func:`confusion` for its errors."""
    return Scored(confusion(labels_N, predicted_N, classes))
