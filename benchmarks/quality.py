"""The bars of quality, from the committed records alone: what was reached, on which runs, and how far it is.

    python -m benchmarks.quality [--reports reports]

Reads result.json and config.yaml of every run below reports/ and nothing else, so the same records give the same table
and the same results/quality.json. Of several settings that a bar may be judged on the best counts, by its mean over
seeds. Nothing is trained.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.markdown import duration, integer, number, percent, table
from asnn_goose.reporting.seeds import SeedGroup, interval_words
from asnn_goose.reporting.statistics import Estimate
from benchmarks import quality_runs as rules
from benchmarks.measuring import RESULTS
from benchmarks.quality_plots import draw

NOT_RUN = "not run"


class Bar(NamedTuple):
    """What a number is to keep to."""

    limit: float
    stretch: float | None = None
    at_least: bool = False
    """Whether the number is to be no smaller, rather than no larger."""

    def judge(self, value: float) -> str:
        """Met or missed, and by which share of the bar."""
        told = self._against(value, self.limit)
        return told if self.stretch is None else f"{told}; stretch {self._against(value, self.stretch)}"

    def _against(self, value: float, bar: float) -> str:
        met = value >= bar if self.at_least else value <= bar
        return f"{'met' if met else 'missed'} by {percent(abs(value / bar - 1.0))}"


@dataclass(frozen=True)
class Row:
    """One bar."""

    bar: str
    value: float | None = None
    low: float | None = None
    """Lower end of the 95 % t-interval over seeds, None with one."""
    high: float | None = None
    seeds: int = 0
    tokens_seen: tuple[int, ...] = ()
    """Training tokens, of each setting."""
    wall_seconds: tuple[float, ...] = ()
    """Of each run."""
    runs: tuple[str, ...] = ()
    """version/run_id."""
    verdict: str = NOT_RUN


def measured(bar: str, value: Estimate, runs: Sequence[FinishedRun], verdict: str) -> Row:
    return Row(
        bar=bar,
        value=value.value,
        low=value.low,
        high=value.high,
        seeds=len({run.result.seed for run in runs}),
        tokens_seen=tuple(dict.fromkeys(run.result.tokens_seen for run in runs)),
        wall_seconds=tuple(run.result.wall_seconds for run in runs),
        runs=tuple(f"{run.result.version}/{run.result.run_id}" for run in runs),
        verdict=verdict,
    )


def teacher_row(bar: str, limits: Bar, group: SeedGroup | None, longest: float | None = None, why: str = "") -> Row:
    """A bar on the perplexity over the teacher's; ``longest``: seconds that each run may take; ``why`` none was run."""
    if group is None:
        return Row(bar, verdict=f"{NOT_RUN}: {why}" if why else NOT_RUN)
    value = rules.times_the_teacher(group)
    verdict = limits.judge(value.value)
    if longest is not None:
        verdict += f"; wall time {Bar(longest).judge(max(run.result.wall_seconds for run in group))}"
    return measured(bar, value, group, verdict)


def twin_row(bar: str, pairing: rules.Pairing | None, limits: Bar | None, zeros: Bar | None) -> Row:
    """A version's perplexity over its twin's, and its zero operands; a bar on these is on tokens x channels."""
    if pairing is None:
        return Row(bar)
    value, (over_tokens, over_steps) = rules.perplexity_ratio(pairing), rules.zero_shares(pairing.runs)
    told = "no bar of its own" if limits is None else limits.judge(value.value)
    share = f"zero operands {percent(over_tokens)} of tokens x channels"
    if all(run.spikes for run in pairing.runs):
        share += f", {percent(over_steps)} of micro-steps"
    verdict = f"{told}; {share}" + ("" if zeros is None else f": {zeros.judge(over_tokens)}")
    return measured(bar, value, (*pairing.runs, *pairing.others), verdict)


def conversion_row(bar: str, pairing: rules.Pairing | None) -> Row:
    """The factor by which a start from the teacher's layers has the lower perplexity."""
    if pairing is None:
        return Row(bar)
    value = rules.perplexity_ratio(rules.Pairing(pairing.others, pairing.runs))
    runs = (*pairing.runs, *pairing.others)
    return measured(bar, value, runs, Bar(1.0, at_least=True).judge(value.value))


def rows(runs: Sequence[FinishedRun]) -> list[Row]:
    """Every bar, judged on these runs."""
    comparable = [run for run in runs if rules.on_reference_text(run)]
    students = [run for run in comparable if run.spikes]

    def chosen(rule: Callable[[FinishedRun], bool], longest: float = math.inf) -> SeedGroup | None:
        return rules.best(filter(rule, students), longest)

    def of(version: str, among: Sequence[FinishedRun] = comparable) -> list[FinishedRun]:
        return [run for run in among if run.result.version == version]

    return [
        teacher_row("154 k tokens: at most 9 times the teacher", Bar(9.0), chosen(rules.after_154_thousand_tokens)),
        teacher_row(
            "cpu scale, within 12 min: at most 9 times the teacher, stretch 6",
            Bar(9.0, 6.0),
            chosen(rules.at_the_cpu_scale, rules.LONGEST_CPU),
            rules.LONGEST_CPU,
        ),
        teacher_row("one hour: at most 5 times the teacher, stretch 3.5", Bar(5.0, 3.5), chosen(rules.in_an_hour)),
        twin_row(
            "spikes over the dense twin, T <= 4: at most 1.08, 60 % zero operands, stretch 70 %",
            rules.against_twin(of("v10", students), of("dense_twin")),
            Bar(1.08),
            Bar(0.6, 0.7, at_least=True),
        ),
        twin_row(
            "quantised twin over the dense twin",
            rules.against_twin(of("quantised_twin"), of("dense_twin")),
            None,
            None,
        ),
        conversion_row(
            "random start with the embeddings alone over conversion, equal wall time: above 1",
            rules.conversion(comparable),
        ),
        teacher_row(
            "GPU: at most 1.8 times the teacher",
            Bar(1.8),
            chosen(rules.at_the_gpu_scale),
            why="the one run was cut off before its end, see GPU",
        ),
    ]


def markdown(found: Sequence[Row], reports: str) -> list[str]:
    """The table; ``reports``: where links to the runs' reports start."""
    header = ["bar", "value", "95 % interval", "seeds", "training tokens", "wall time", "verdict", "runs"]
    return table(header, [_cells(row, reports) for row in found])


def _cells(row: Row, reports: str) -> list[str]:
    if row.value is None:
        return [row.bar, "", "", "", "", "", row.verdict, ""]
    walls = dict.fromkeys((duration(min(row.wall_seconds)), duration(max(row.wall_seconds))))
    return [
        row.bar,
        number(row.value, 3),
        interval_words(row.low, row.high),
        str(row.seeds),
        " and ".join(map(integer, row.tokens_seen)),
        " to ".join(walls),
        row.verdict,
        ", ".join(f"[{name}]({reports}/{name}/report.md)" for name in row.runs),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=Path, default=Path(__file__).parents[1] / "reports")
    arguments = parser.parse_args()
    runs = rules.committed(arguments.reports)
    found = rows(runs)
    print("\n".join(markdown(found, "../reports")))
    record = {"title": "bars of quality", "rows": [asdict(row) for row in found]}
    (RESULTS / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in draw(runs, arguments.reports):
        print(f"\n![{path.stem.replace('_', ' ')}](../reports/{path.name})")


if __name__ == "__main__":
    main()
