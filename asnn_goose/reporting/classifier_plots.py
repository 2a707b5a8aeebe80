"""The figures of a classifier's report."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asnn_goose.reporting.classifier_record import ExitResult
from asnn_goose.reporting.drawing import BLUE, DASHED, GREY, figure, label_right


def plot_confusion(labels: Sequence[str], confusion: Sequence[Sequence[int]], path: Path) -> Path:
    """Texts of each class (row) by what was predicted (column): counts written out, colours by share of the row."""
    counts = np.array(confusion)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    with figure(path, 1.2 + 0.32 * len(labels)) as (axis,):
        axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        for row, column in np.ndindex(*counts.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
        axis.grid(False)
        axis.tick_params(length=0)
        names = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "parse_math": False}
        axis.set_xticks(range(len(labels)), labels, **names)
        axis.set_yticks(range(len(labels)), labels, parse_math=False)
        axis.set_xlabel("predicted")
        axis.set_ylabel("label")
    return path


def plot_accuracy(steps: np.ndarray, accuracies: np.ndarray, teacher: float, path: Path) -> Path:
    """Validation accuracy over optimiser steps, beside the teacher's."""
    with figure(path, 2.6) as (axis,):
        axis.plot(steps, 100 * accuracies, color=BLUE, marker="o" if len(steps) < 12 else None)
        axis.axhline(100 * teacher, **DASHED)
        axis.set_xlabel("optimiser steps")
        axis.set_ylabel("validation accuracy (%)")
        label_right(axis, [(100 * float(accuracies[-1]), "student", BLUE), (100 * teacher, "teacher", GREY)])
    return path


EXITS_SPAN = 4.0
"""Points of accuracy; the width of a 95 % interval from some 1,900 texts."""


def plot_exits(exits: Sequence[ExitResult], path: Path) -> Path:
    """Test accuracy against mean depth, each point marked with the confidence that was asked for.

    The axis spans at least EXITS_SPAN, so that single texts do not look like a trend.
    """
    with figure(path, 2.6) as (axis,):
        depths, accuracies = [e.mean_depth for e in exits], [100 * e.accuracy for e in exits]
        axis.plot(depths, accuracies, "o-", color=BLUE)
        for each, depth, accuracy in zip(exits, depths, accuracies, strict=True):
            offset = {"textcoords": "offset points", "xytext": (5, -10), "fontsize": 7}
            axis.annotate(f"{each.confidence:g}", (depth, accuracy), **offset)
        middle, half = (max(accuracies) + min(accuracies)) / 2, max(EXITS_SPAN, max(accuracies) - min(accuracies)) / 2
        axis.set_ylim(middle - 1.2 * half, middle + 1.2 * half)
        axis.margins(x=0.1)
        axis.set_xlabel("mean depth (blocks)")
        axis.set_ylabel("test accuracy (%)")
    return path
