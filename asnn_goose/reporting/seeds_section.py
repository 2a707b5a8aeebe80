"""The seeds' part of the list of a version's reports: means over them, and what each ancestor's comparison says."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence

from asnn_goose.reporting.comparison import FinishedRun, changed_settings, contradictions, outcome
from asnn_goose.reporting.markdown import branches, integer, number, table
from asnn_goose.reporting.seeds import (
    SeedGroup,
    compare,
    interval_words,
    mean_perplexity,
    scale_of,
    seed_groups,
)

MOST_VALUES = 4
"""Settings whose values stand in a row of the list."""


def section(runs: Iterable[FinishedRun], lineage: Mapping[str, list[FinishedRun]]) -> list[str]:
    """Lines for the list of a version's reports: means over seeds by scale, and each ancestor's comparison.

    Args:
        runs: finished runs of the version.
        lineage: finished runs of its ancestors, as :func:`ancestors` gives them.
    """
    runs = list(runs)
    groups = seed_groups(runs)
    labels = [label for _, same in itertools.groupby(groups, scale_of) for label in _labels(list(same))]
    found = [mean_perplexity(group) for group in groups]
    means, deltas = [], []
    for group, label, mean in zip(groups, labels, found, strict=True):
        tokens = integer(group[0].result.evaluation.test_tokens)
        interval = interval_words(mean.low, mean.high)
        means.append([scale_of(group), label, tokens, str(mean.n), number(mean.value), interval])
        for against in compare(group, lineage):
            delta, changed = against.delta, ", ".join(branches(against.differing)) or "no settings"
            cells = [str(delta.n), number(delta.ratio), interval_words(delta.low, delta.high), delta.verdict, changed]
            deltas.append([scale_of(group), label, against.version, *cells])
    header = ["scale", "settings", "test tokens", "seeds", "test perplexity", "95 % interval"]
    lines = ["## Over seeds", "", *table(header, means), ""]
    text = ["Perplexities are geometric means over seeds; runs of other settings are not pooled."]
    repeated = contradictions(sorted(runs, key=lambda run: (run.result.seed, run.result.started)), outcome)
    text += [_repetition(same) for same in repeated]
    if any(labels):
        text.append("Settings are told where they differ from those of the scale's first row.")
    if deltas:
        header = ["scale", "settings", "against", "paired seeds", "ratio", "95 % interval", "verdict", "differs in"]
        lines += [*table(header, deltas), ""]
        text.append(
            "A ratio is this version's perplexity over the other's, seed by seed: below 1 this version is better. A "
            "verdict is on all the settings in which the two differ, and names a direction where the interval leaves "
            "out 1; it is of one comparison alone, while reports/roadmap.md corrects for how many it makes."
        )
    if any(mean.n > 1 for mean in found):
        text.append(
            "Intervals over seeds are Student's t. They cover the spread that initialisation and data order make on "
            "one text; what another text would change is in the intervals of single runs, not in these."
        )
    return [*lines, " ".join(text)]


def _repetition(same: Sequence[FinishedRun]) -> str:
    values = " and ".join(number(run.result.student.test_ppl) for run in same)
    seed, fingerprint = same[0].result.seed, same[0].result.fingerprint[:8]
    return (
        f"Seed {seed} was run {len(same)} times with fingerprint {fingerprint} and came to {values}, since neither the "
        "code's commit nor the number of threads is in it; the newest counts."
    )


def _labels(groups: Sequence[SeedGroup]) -> list[str]:
    """What tells groups of one scale apart: the settings in which each differs from the first, few of them with values.

    Many go by branch, unless that reads the same for two groups.
    """
    differing = [changed_settings(groups[0][0], group[0], arithmetic=False) for group in groups]
    values = [
        ", ".join(f"`{key}: {json.dumps(value)}`" for key, (_, value) in sorted(changes.items()))
        for changes in differing
    ]
    short = [", ".join(branches(sorted(changes))) for changes in differing]
    return [
        brief if len(changes) > MOST_VALUES and short.count(brief) == 1 else full
        for changes, brief, full in zip(differing, short, values, strict=True)
    ]
