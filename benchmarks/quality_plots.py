"""Test perplexity against T, and against the share of zero operands, from the committed records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.drawing import BLUE, DASHED, GREY, ORANGE, figure, label_right, log_scale
from asnn_goose.reporting.seeds import MeanPerplexity, SeedGroup, mean_perplexity
from benchmarks import quality_runs as rules


class Point(NamedTuple):
    """One T, over its seeds."""

    steps: int
    perplexity: MeanPerplexity
    over_tokens: float
    """Share of zero operands over tokens x channels."""
    over_steps: float
    """The same over tokens x channels x micro-steps."""


def points(row: Sequence[SeedGroup]) -> list[Point]:
    """What is drawn of groups of rising T."""
    return [
        Point(group[0].experiment.student.neuron.steps, mean_perplexity(group), *rules.zero_shares(group))
        for group in row
    ]


def draw(runs: Sequence[FinishedRun], folder: Path) -> list[Path]:
    """Draw each figure of which two or more versions are recorded; figures of earlier records go."""
    comparable = [run for run in runs if rules.on_reference_text(run)]
    twins = [run for run in comparable if run.result.version == "dense_twin"]
    paths = []
    for name, (versions, figure_of) in FIGURES.items():
        row, path = rules.sweep(comparable, versions), folder / f"{name}.png"
        if len(row) < 2:
            path.unlink(missing_ok=True)
            continue
        found = rules.paired(row[0], twins, rules.only_neurons_differ)
        figure_of(points(row), mean_perplexity(found[0].others).value if found else None, path)
        paths.append(path)
    return paths


def by_steps(found: Sequence[Point], dense: float | None, path: Path) -> None:
    """Perplexity with its interval over seeds against T, on logarithmic axes."""
    with figure(path, 2.6) as (axis,):
        _line(axis, [point.steps for point in found], found, BLUE)
        axis.set_xscale("log", base=2)
        axis.set_xticks([point.steps for point in found], [str(point.steps) for point in found])
        axis.minorticks_off()
        axis.set_xlabel("T, micro-steps per token")
        _finish(axis, dense)


def by_zeros(found: Sequence[Point], dense: float | None, path: Path) -> None:
    """Perplexity with its interval over seeds against both shares of zero operands."""
    with figure(path, 2.6) as (axis,):
        _line(axis, [100.0 * point.over_tokens for point in found], found, BLUE, "tokens x channels")
        _line(axis, [100.0 * point.over_steps for point in found], found, ORANGE, "micro-steps")
        axis.set_xlabel("operands that are zero (%)")
        axis.legend(frameon=False)
        _finish(axis, dense)


def _line(axis: Any, places: Sequence[float], found: Sequence[Point], colour: str, label: str | None = None) -> None:
    means = [point.perplexity for point in found]
    values = [mean.value for mean in means]
    below = [mean.value - (mean.value if mean.low is None else mean.low) for mean in means]
    above = [(mean.value if mean.high is None else mean.high) - mean.value for mean in means]
    axis.errorbar(places, values, yerr=(below, above), fmt="o-", color=colour, capsize=2, label=label)


def _finish(axis: Any, dense: float | None) -> None:
    axis.set_ylabel("test perplexity")
    if dense is not None:
        axis.axhline(dense, **DASHED)
    log_scale(axis)
    if dense is not None:
        label_right(axis, [(dense, "dense twin", GREY)])


FIGURES = {
    "perplexity_by_micro_steps": (rules.STEP_VERSIONS, by_steps),
    "perplexity_by_zero_operands": (rules.SPARSE_VERSIONS, by_zeros),
}
"""Name -> the versions it is drawn of, and by what."""
