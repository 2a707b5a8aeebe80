"""``reports/<version>/<run_id>/report.md``, a pure function of a run's files and of the runs it is compared with."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from asnn_goose.config.distillation import DistillationConfig
from asnn_goose.errors import UserError
from asnn_goose.reporting import health, information_section, sections, seeds, seeds_section, summary
from asnn_goose.reporting.alarms import find_alarms
from asnn_goose.reporting.comparison import FinishedRun, find_parent, find_twins, finished_runs, load_run
from asnn_goose.reporting.drawing import Curve, curve_of
from asnn_goose.reporting.markdown import in_words, integer, number, table
from asnn_goose.reporting.material import Material
from asnn_goose.reporting.metrics import Metrics, read_metrics
from asnn_goose.reporting.plots import (
    Level,
    plot_losses,
    plot_optimiser,
    plot_perplexity,
    plot_raster,
    plot_spikes,
    plot_stages,
    plot_temperature,
)
from asnn_goose.reporting.records import keep_records, read_raster
from asnn_goose.reporting.run_folder import RunFolder, write_text

_log = logging.getLogger(__name__)

_LOSS_LABELS = {
    "ce": "cross-entropy",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jensen_shannon": "Jensen-Shannon",
    "skew_kl": "skew KL",
    "adaptive_kl": "adaptive KL",
    "tail_bucket_kl": "KL with a tail bucket",
    "tcs": "TCS (biased)",
    "hidden": "hidden states",
    "cka": "1 - CKA",
    "anchor": "temperature anchor",
}
FIGURES = ("raster", "spikes", "perplexity", "losses", "temperature", "stages", "optimiser")


def write_report(run_folder: Path, reports_root: Path, runs_root: Path) -> Path:
    """Write the report of a finished run (:func:`write_report_alone`) and the list of its version's reports."""
    report = write_report_alone(run_folder, reports_root, runs_root)
    write_index(report.parents[1].name, reports_root)
    return report


def write_report_alone(run_folder: Path, reports_root: Path, runs_root: Path) -> Path:
    """Write the report of a finished run.

    The run's records are put beside report.md first, and the report is made from them alone: where there is no
    ``runs/`` it can be made again. The same files give the same bytes.

    Args:
        run_folder: folder with config.yaml, provenance.json, metrics.jsonl and result.json: a run, or its records.
        reports_root: ``reports/``; also searched for the parent's run and for twins.
        runs_root: ``runs/``; searched for those that have no records.

    Returns:
        Path of report.md.

    Raises:
        UserError: the run is not finished, or one of its files is damaged.
    """
    result = load_run(run_folder).result
    target = reports_root / result.version / result.run_id
    files = keep_records(RunFolder.open(run_folder), target, result.raster)
    run, metrics = load_run(target), read_metrics(files.metrics)
    parent = find_parent(run, runs_root, reports_root)
    version_runs = finished_runs(run.result.version, runs_root, reports_root)
    lineage = seeds.ancestors(run.result.parent, runs_root, reports_root)
    material = Material(
        run=run,
        provenance=files.provenance,
        alarms=find_alarms(run.result, metrics, run.experiment),
        parent=parent,
        twins=find_twins(run, runs_root, reports_root),
        figures=draw_figures(run, metrics, parent, target),
        health=health.sentences(metrics),
        over_seeds=seeds.compare(seeds.group_of(run, version_runs), lineage),
    )
    report = target / "report.md"
    write_text(report, render(material))
    return report


def write_index(version: str, reports_root: Path) -> None:
    """Write :func:`render_index`."""
    write_text(reports_root / version / "README.md", render_index(version, reports_root))


def report_head(path: Path, lines: int = 20) -> str:
    """First lines of a report, for the command line to print."""
    return "\n".join(path.read_text(encoding="utf-8").split("\n")[:lines]).rstrip()


def render(material: Material) -> str:
    """The report as markdown."""
    parts = [
        section(material)
        for section in (
            summary.opening,
            summary.results,
            sections.curves,
            sections.spikes,
            information_section.carried,
            sections.energy,
            sections.cost,
            sections.sample,
            sections.alarms,
            sections.configuration,
            sections.provenance,
        )
    ]
    return "\n\n".join("\n".join(part).strip() for part in parts if part) + "\n"


def render_index(version: str, reports_root: Path) -> str:
    """README.md of a version: its runs, newest first, and what their seeds say, from the files beside the reports."""
    runs = finished_runs(version, reports_root, reports_root)
    rows = []
    for run in runs:
        result = run.result
        rows.append(
            [
                f"[{result.run_id}]({result.run_id}/report.md)",
                result.scale,
                str(result.seed),
                run.neuron_kind,
                integer(result.tokens_seen),
                number(result.student.test_ppl),
                seeds.interval_words(result.student.test_ppl_low, result.student.test_ppl_high),
                number(result.ratio_to_teacher, 3),
            ]
        )
    header = [
        "run",
        "scale",
        "seed",
        "neuron",
        "training tokens",
        "test perplexity",
        "95 % interval",
        "times the teacher",
    ]
    lineage = seeds.ancestors(runs[0].result.parent, reports_root, reports_root)
    lines = [f"# Reports of {version}", "", runs[0].experiment.question, "", *table(header, rows), ""]
    lines += seeds_section.section(runs, lineage)
    return "\n".join(lines) + "\n"


def draw_figures(run: FinishedRun, metrics: Metrics, parent: FinishedRun | None, folder: Path) -> dict[str, str]:
    """Draw what the run measured into `folder`; figure -> file name. A figure of an earlier report goes."""
    drawn: dict[str, str] = {}
    for name in FIGURES:
        path = folder / f"{name}.png"
        if _DRAW[name](run, metrics, parent, path) is None:
            path.unlink(missing_ok=True)
        else:
            drawn[name] = path.name
    return drawn


def _draw_perplexity(run: FinishedRun, metrics: Metrics, parent: FinishedRun | None, path: Path) -> Path | None:
    student = curve_of(run.result, metrics, "val_ppl", "student (◇ test)")
    if student is None:
        return None
    result = run.result
    levels = [
        Level("unigram", result.baselines.unigram_ppl),
        Level("bigram, tokens seen", result.baselines.bigram_ppl),
        Level("bigram, all text", result.baselines.bigram_full_ppl),
    ]
    if result.teacher.val_ppl is not None:
        levels.append(Level("teacher", result.teacher.val_ppl))
    before = _parents_curve(parent, "val_ppl")
    return plot_perplexity(student, path, levels, before, result.student.test_ppl)


def _draw_losses(run: FinishedRun, metrics: Metrics, _: Any, path: Path) -> Path | None:
    found = list(dict.fromkeys(key for line in metrics for key in line if key.startswith("loss_")))
    raw, weighted = [], []
    for key in found:
        name = key.removeprefix("loss_").removesuffix("_raw").removesuffix("_weighted")
        label = _LOSS_LABELS.get(name, in_words(name))
        curve = curve_of(run.result, metrics, key, label)
        if curve is not None:
            (raw if key.endswith("_raw") else weighted).append(curve)
    return plot_losses(raw, weighted, path) if raw and weighted else None


def _draw_temperature(run: FinishedRun, metrics: Metrics, parent: FinishedRun | None, path: Path) -> Path | None:
    config = run.experiment.distillation.temperature
    temperature = curve_of(run.result, metrics, "temperature", "temperature T")
    if config.mode == "fixed" or temperature is None:
        return None
    strength = None if config.mode == "minimised" else curve_of(run.result, metrics, "temperature_lambda", "lambda")
    return plot_temperature(
        temperature,
        path,
        low=config.low,
        high=config.high,
        anchor=_anchor(run.experiment.distillation),
        spread=curve_of(run.result, metrics, "temperature_spread", "spread of T"),
        strength=strength,
        gradient=curve_of(run.result, metrics, "temperature_gradient", "G = dL/dT"),
        before=_parents_curve(parent, "temperature"),
    )


def _anchor(config: DistillationConfig) -> float | None:
    """Temperature that the learned one is pulled to, None where nothing pulls, or where it is another one later on."""
    temperature, curriculum = config.temperature, config.curriculum
    if temperature.anchor_weight == 0.0:
        return None
    moving = temperature.ramp is not None or (curriculum is not None and curriculum.temperatures is not None)
    return temperature.anchor or (None if moving else temperature.init)


def _draw_stages(run: FinishedRun, metrics: Metrics, _: Any, path: Path) -> Path | None:
    easy = curve_of(run.result, metrics, "easy_ce", "easy windows")
    hard = curve_of(run.result, metrics, "hard_ce", "hard windows")
    if easy is None or hard is None:
        return None
    stage = curve_of(run.result, metrics, "stage", "stage")
    begins = [] if stage is None else stage.tokens[:-1][np.diff(stage.values) > 0].tolist()
    return plot_stages(easy, hard, begins, path)


def _parents_curve(parent: FinishedRun | None, name: str) -> Curve | None:
    """A quantity of the parent's run, labelled with its version; None where its records lack the metrics, or hold
    damaged ones."""
    if parent is None or not (parent.folder / "metrics.jsonl").exists():
        return None
    try:
        metrics = read_metrics(parent.folder / "metrics.jsonl")
    except UserError as error:
        _log.warning("%s (its curve is left out)", error)
        return None
    return curve_of(parent.result, metrics, name, parent.result.version)


def _draw_optimiser(run: FinishedRun, metrics: Metrics, _: Any, path: Path) -> Path | None:
    lr = curve_of(run.result, metrics, "lr", "learning rate")
    grad_norm = curve_of(run.result, metrics, "grad_norm", "gradient norm")
    if lr is None and grad_norm is None:
        return None
    return plot_optimiser(lr, grad_norm, path, clip=run.experiment.train.clip)


def _draw_spikes(run: FinishedRun, _: Metrics, __: Any, path: Path) -> Path | None:
    spikes = run.result.spikes
    # Of a student without spikes the report tells the levels in words.
    return plot_spikes(spikes.per_layer, path) if spikes is not None and spikes.per_layer and run.spikes else None


def _draw_raster(run: FinishedRun, _: Metrics, __: Any, path: Path) -> Path | None:
    if run.result.raster is None:
        return None
    return plot_raster(*read_raster(run.folder / run.result.raster.file), path)


_DRAW = {
    "perplexity": _draw_perplexity,
    "losses": _draw_losses,
    "temperature": _draw_temperature,
    "stages": _draw_stages,
    "optimiser": _draw_optimiser,
    "spikes": _draw_spikes,
    "raster": _draw_raster,
}
