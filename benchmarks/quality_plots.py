"""Two figures from the committed records: test perplexity against T, and against the share of zero operands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.drawing import BLUE, DASHED, GREY, ORANGE, figure, label_right
from asnn_goose.reporting.seeds import MeanPerplexity, SeedGroup, mean_perplexity
from benchmarks import quality_runs as rules

FIGURES = ("perplexity_by_micro_steps", "perplexity_by_zero_operands")


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
    """Draw both figures where two or more T are recorded; figures of earlier records go."""
    comparable = [run for run in runs if rules.on_reference_text(run)]
    row = rules.by_micro_steps(comparable)
    paths = [folder / f"{name}.png" for name in FIGURES]
    if len(row) < 2:
        for path in paths:
            path.unlink(missing_ok=True)
        return []
    twins = [run for run in comparable if run.result.version == "dense_twin"]
    found = rules.paired(row[0], twins, rules.only_neurons_differ)
    dense = mean_perplexity(found[0].others).value if found else None
    by_steps(points(row), dense, paths[0])
    by_zeros(points(row), dense, paths[1])
    return paths


def by_steps(found: Sequence[Point], dense: float | None, path: Path) -> None:
    """Perplexity with its interval over seeds against T, on a logarithmic axis of T."""
    with figure(path, 2.6) as (axis,):
        _line(axis, [point.steps for point in found], found, BLUE)
        axis.set_xscale("log", base=2)
        axis.set_xticks([point.steps for point in found], [str(point.steps) for point in found])
        axis.minorticks_off()
        axis.set_xlabel("T, micro-steps per token")
        _finish(axis, dense)


def by_zeros(found: Sequence[Point], dense: float | None, path: Path) -> None:
    """Perplexity against both shares of zero operands; every point is marked with its T."""
    with figure(path, 2.6) as (axis,):
        shares = {"over_tokens": (BLUE, "tokens x channels"), "over_steps": (ORANGE, "micro-steps")}
        for name, (colour, label) in shares.items():
            places = [100.0 * point._asdict()[name] for point in found]
            _line(axis, places, found, colour, label)
            for point, place in zip(found, places, strict=True):
                offset = {"textcoords": "offset points", "xytext": (5, 4)}
                axis.annotate(f"T = {point.steps}", (place, point.perplexity.value), fontsize=7, color=colour, **offset)
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
        label_right(axis, [(dense, "dense twin", GREY)])
