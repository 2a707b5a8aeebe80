"""``reports/roadmap.md``: what each version of the ladder does to its parent, from the records there alone."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from asnn_goose.config import Experiment
from asnn_goose.reporting.ablation_words import (
    how_judged,
    how_measured,
    opening,
    perplexity_words,
    ratio_words,
    sharing_sentence,
    teacher_sentence,
)
from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.drawing import Curve
from asnn_goose.reporting.effects import Effect, effects
from asnn_goose.reporting.ladder import Ladder, Rung, read_ladder
from asnn_goose.reporting.ladder_plots import Interval, plot_deltas, plot_tradeoff, plot_validation
from asnn_goose.reporting.markdown import duration, number, percent, table
from asnn_goose.reporting.page import render_page
from asnn_goose.reporting.run_folder import write_errors, write_text
from asnn_goose.reporting.seeds import by_seed

FIGURES = ("deltas", "validation", "energy")


def write_roadmap(
    reports_root: Path,
    scale: str,
    versions: Sequence[str],
    asked: Mapping[str, Experiment] | None = None,
    stamp: str = "",
) -> list[Path]:
    """Write roadmap.md, its figures and index.html from the runs of one scale; the same files give the same bytes.

    Args:
        reports_root: ``reports/``, with ``<version>/<run_id>/{result.json,config.yaml,metrics.jsonl,provenance.json}``;
            without metrics, a run counts and has no curve; without provenance, its commit is not known.
        scale: name of the train group.
        versions: in the order of the table, which puts the controls first. One without runs is listed as not run.
        asked: version -> its configuration, as :func:`read_ladder` takes it.
        stamp: last line of roadmap.md.

    Returns:
        Paths of what was written: roadmap.md, the figures, index.html.

    Raises:
        UserError: nothing can be written there. What cannot be read is named in roadmap.md and left out.
    """
    ladder = read_ladder(reports_root, scale, versions, asked)
    found = effects(ladder)
    folder = reports_root / "roadmap"
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(ladder, found, folder)
    roadmap, page = reports_root / "roadmap.md", reports_root / "index.html"
    write_text(page, render_page(ladder, found, opening(ladder, found)))
    # Last, since its stamp says that the others are there.
    write_text(roadmap, render(ladder, found, figures) + (f"\n{stamp}\n" if stamp else ""))
    return [roadmap, *figures.values(), page]


def render(ladder: Ladder, found: Sequence[Effect], figures: dict[str, Path]) -> str:
    """The table as markdown; `figures` are those that were drawn."""
    lines = [f"# The ladder at scale {ladder.scale}", "", opening(ladder, found), ""]
    lines += ["The same records to sort, lay over one another and compare: [index.html](index.html).", ""]
    lines += ["## What each change does", "", *_effect_table(found), "", how_judged(found), ""]
    lines += _figure(
        figures,
        "deltas",
        "Test perplexity over the parent's, on a log axis, with 95 % intervals before the correction; left of 1 the "
        "version is better. Hollow: no interval over seeds.",
    )
    lines += ["## Likeness, spikes and cost", "", *_measure_table(found), "", how_measured(found), ""]
    if sharing := sharing_sentence(ladder.runs):
        lines += [sharing, ""]
    lines += _figure(
        figures,
        "validation",
        "Validation perplexity on a log axis, geometric means over seeds at the looks that all of them share; right: "
        "the second half of each training. Blue helps, vermilion hurts, black is the base.",
    )
    lines += _figure(
        figures,
        "energy",
        "Test perplexity with its 95 % interval against the estimated energy of the student's arithmetic. Filled: the "
        "interval is over seeds; hollow: one seed, and the interval is the run's own."
        f"{teacher_sentence(found)}",
    )
    if ladder.left_out:
        lines += ["## Left out", "", *(f"- {sentence}" for sentence in ladder.left_out), ""]
    return "\n".join(lines).rstrip() + "\n"


def draw_figures(ladder: Ladder, found: Sequence[Effect], folder: Path) -> dict[str, Path]:
    """Draw what was measured into `folder`; figure -> path. A figure of an earlier table goes."""
    intervals = [
        Interval(
            effect.rung.version, delta.ratio, delta.low, delta.high, effect.verdict, effect.rung.is_control, delta.n > 1
        )
        for effect in found
        if (delta := effect.delta) is not None
    ]
    points = [
        (
            Interval(effect.rung.version, s.test_ppl, s.low, s.high, effect.verdict, effect.rung.is_control, s.n > 1),
            s.joules,
        )
        for effect in found
        if (s := effect.summary) is not None and s.joules is not None
    ]
    curves = [(curve, effect.verdict) for effect in found if (curve := _mean_curve(ladder, effect.rung)) is not None]
    drawn = {}
    if intervals:
        drawn["deltas"] = plot_deltas(intervals, folder / "deltas.png")
    if curves:
        drawn["validation"] = plot_validation(curves, folder / "validation.png")
    if points:
        drawn["energy"] = plot_tradeoff(points, folder / "energy.png")
    for name in FIGURES:
        if name not in drawn:
            (folder / f"{name}.png").unlink(missing_ok=True)
    return drawn


def _mean_curve(ladder: Ladder, rung: Rung) -> Curve | None:
    """Geometric mean of validation perplexity over the seeds, where all that have a curve were evaluated."""
    curves = {run.folder: curve for run in rung.runs if (curve := ladder.curve(run, "val_ppl")) is not None}
    if not curves:
        return None
    tokens = functools.reduce(np.intersect1d, (curve.tokens for curve in curves.values()))

    def log_perplexities(run: FinishedRun) -> np.ndarray:
        curve = curves[run.folder]
        return np.log(curve.values[np.isin(curve.tokens, tokens)])

    runs = tuple(run for run in rung.runs if run.folder in curves)
    return Curve(rung.version, tokens, np.exp(by_seed(runs, log_perplexities).mean(axis=0))) if len(tokens) else None


def _effect_table(found: Sequence[Effect]) -> list[str]:
    rows = []
    for effect in found:
        summary, rung = effect.summary, effect.rung
        rows.append(
            [
                f"[{rung.version}]({rung.version}/README.md)" if rung.runs else rung.version,
                rung.change,
                str(summary.n) if summary is not None else "",
                perplexity_words(summary) if summary is not None else "",
                number(summary.ratio_to_teacher, 3) if summary is not None else "",
                rung.parent or "",
                ratio_words(effect),
                number(effect.p_holm, 2) if effect.p_holm is not None else "",
                effect.verdict,
            ]
        )
    header = [
        "version",
        "change",
        "seeds",
        "test perplexity (95 %)",
        "times the teacher",
        "parent",
        "ratio to the parent (95 %)",
        "p, corrected",
        "verdict",
    ]
    return table(header, rows)


def _measure_table(found: Sequence[Effect]) -> list[str]:
    rows = []
    for effect in found:
        summary = effect.summary
        if summary is None:
            rows.append([effect.rung.version, *[""] * 7, effect.verdict])
            continue
        rows.append(
            [
                effect.rung.version,
                number(summary.kl),
                percent(summary.top1),
                *(
                    "" if share is None else percent(share)
                    for share in (summary.spike_rate, summary.spike_operands, summary.zero_operands)
                ),
                "" if summary.energy_ratio is None else number(summary.energy_ratio, 3),
                number(summary.tokens_per_second, 3),
                duration(summary.seconds),
            ]
        )
    header = [
        "version",
        "KL (nats per token)",
        "same first choice",
        "spike rate",
        "spike operands",
        "zero operands",
        "energy, times the teacher",
        "tokens/s",
        "wall time of a run",
    ]
    return table(header, rows)


def _figure(figures: dict[str, Path], name: str, caption: str) -> list[str]:
    path = figures.get(name)
    return [] if path is None else [f"![{name}](roadmap/{path.name})", "", caption, ""]
