"""The report of a classifier's run, and the list of its version's reports, from the records beside them alone."""

from pathlib import Path

from asnn_goose.config.schema import SPIKING
from asnn_goose.reporting.classifier_plots import plot_accuracy, plot_confusion, plot_exits
from asnn_goose.reporting.classifier_record import WATCHED, ClassifierResult, Score
from asnn_goose.reporting.classifier_runs import ClassifierRun, load_classifier_run, recorded_classifiers
from asnn_goose.reporting.comparison import changed_experiment
from asnn_goose.reporting.markdown import duration, integer, number, percent, quantity, table
from asnn_goose.reporting.metrics import Metrics, read_metrics, series
from asnn_goose.reporting.plots import plot_raster, plot_spikes
from asnn_goose.reporting.provenance import Provenance
from asnn_goose.reporting.records import keep_records, read_raster
from asnn_goose.reporting.run_folder import RunFolder, write_text
from asnn_goose.reporting.sections import configuration_section, provenance_section, spike_table


def write_classifier_report(run_folder: Path, reports_root: Path) -> Path:
    """Write the report of a finished run (:func:`write_classifier_report_alone`) and the list of its version's."""
    report = write_classifier_report_alone(run_folder, reports_root)
    write_classifier_index(report.parents[1].name, reports_root)
    return report


def write_classifier_report_alone(run_folder: Path, reports_root: Path) -> Path:
    """Write the report of a finished run; the same files give the same bytes.

    Raises:
        UserError: the run is not finished, or one of its files is damaged.
    """
    result = load_classifier_run(run_folder).result
    target = reports_root / result.version / result.run_id
    files = keep_records(RunFolder.open(run_folder), target, result.raster)
    run, metrics = load_classifier_run(target), read_metrics(files.metrics)
    figures = _draw(run, metrics, target)
    parts = [
        _opening(run), _results(run), _figure(figures, "confusion", "Test texts; rows: labels."),
        _training(run, figures), _spikes(run, figures), _exits(run, figures), _data(run),
        _configuration(run, files.provenance, reports_root), provenance_section(files.provenance, result.precision),
    ]  # fmt: skip
    report = target / "report.md"
    write_text(report, "\n\n".join("\n".join(part).strip() for part in parts if part) + "\n")
    return report


def _draw(run: ClassifierRun, metrics: Metrics, target: Path) -> dict[str, str]:
    result, drawn = run.result, {}
    drawn["confusion"] = plot_confusion(result.task.labels, result.student.test.confusion, target / "confusion.png")
    steps, accuracies = series(metrics, "val_accuracy")
    if len(steps):
        drawn["accuracy"] = plot_accuracy(
            steps, accuracies, result.teacher.validation.accuracy, target / "accuracy.png"
        )
    if result.spikes is not None:
        drawn["spikes"] = plot_spikes(result.spikes.per_layer, target / "spikes.png")
    if result.raster is not None:
        drawn["raster"] = plot_raster(*read_raster(target / result.raster.file), target / "raster.png")
    if result.exits:
        drawn["exits"] = plot_exits(result.exits, target / "exits.png")
    return {name: path.name for name, path in drawn.items()}


def _figure(figures: dict[str, str], name: str, caption: str) -> list[str]:
    return [f"![{name}]({figures[name]})", "", caption, ""] if name in figures else []


def _opening(run: ClassifierRun) -> list[str]:
    result, neuron = run.result, run.experiment.student.neuron
    kind = f"spiking ({neuron.kind}, {neuron.steps} micro-steps)" if neuron.kind in SPIKING else neuron.kind
    test, teacher, share = result.student.test, result.teacher, result.ratio_to_teacher
    # A teacher that names none rightly has no share to take.
    beside = "against what" if share is None else f"{percent(share)} of what"
    return [
        f"# {result.version} on {result.task.name}: scale {result.scale}, seed {result.seed}",
        "",
        f"**{run.experiment.question}** After {integer(result.texts_seen)} training texts the {kind} student, "
        f"{result.student.blocks} RWKV-7 blocks, classifies {percent(test.accuracy)} of the test texts correctly (95 % "
        f"interval {_interval(test)}), {beside} {teacher.name}, fine-tuned on the task, "
        f"does ({percent(teacher.test.accuracy)}). Always predicting the most frequent class would reach "
        f"{percent(_majority(test))}.{_leaving(result)}",
    ]


def _leaving(result: ClassifierResult) -> str:
    if not result.exits:
        return ""
    first, last = result.exits[0], result.exits[-1]
    accuracies = [found.accuracy for found in result.exits]
    return (
        f" Where a text leaves at the first classifier that is {first.confidence:g} to {last.confidence:g} sure, "
        f"{number(first.mean_depth, 3)} to {number(last.mean_depth, 3)} blocks read it in the mean, and "
        f"{percent(min(accuracies))} to {percent(max(accuracies))} of the texts are classified correctly."
    )


def _interval(score: Score) -> str:
    return f"{percent(score.accuracy_low)} to {percent(score.accuracy_high)}"


def _majority(score: Score) -> float:
    rows = [sum(row) for row in score.confusion]
    return max(rows) / sum(rows)


def _results(run: ClassifierRun) -> list[str]:
    result = run.result
    rows = []
    for name, side, parameters in (
        ("**this run**", result.student, result.student.parameters),
        (f"teacher {result.teacher.name}", result.teacher, result.teacher.parameters),
    ):
        test = side.test
        f1 = f"{percent(test.macro_f1_low)} to {percent(test.macro_f1_high)}"
        rows.append(
            [name, percent(test.accuracy), _interval(test), percent(test.macro_f1), f1,
             percent(side.validation.accuracy), quantity(parameters)]
        )  # fmt: skip
    header = ["", "test accuracy", "95 % interval", "macro-F1", "95 % interval", "validation accuracy", "parameters"]
    return [
        "## Result",
        "",
        *table(header, rows),
        "",
        "Intervals by bootstrap over texts. Macro-F1 is the mean over classes of their F1, so that a rare class counts "
        "as much as a common one.",
        "",
    ]


def _training(run: ClassifierRun, figures: dict[str, str]) -> list[str]:
    result = run.result
    seconds = ", ".join(f"{name} {duration(value)}" for name, value in result.seconds_by_phase.items())
    notes = [f"- {note}" for note in result.notes]
    return [
        "## Training",
        "",
        *_figure(figures, "accuracy", "Validation accuracy over training; the test texts are read once, at the end."),
        *notes,
        f"- {integer(result.steps)} optimiser steps in {duration(result.wall_seconds)}: {seconds}.",
    ]


def _spikes(run: ClassifierRun, figures: dict[str, str]) -> list[str]:
    result = run.result
    lines = ["## Spikes and energy", ""]
    if result.spikes is not None:
        lines += [*spike_table(result.spikes), ""]
        lines += _figure(figures, "spikes", "By layer, and by the product that takes the spikes.")
        lines += _figure(figures, "raster", "The first tokens of a test text, read forwards.")
    if result.energy is not None:
        energy = result.energy
        watched = min(WATCHED, sum(result.task.counts["test"]))
        share = number(energy.student_joules / energy.teacher_joules, 3)
        lines.append(
            f"A test text of mean length ({number(energy.tokens, 3)} tokens) takes the student's blocks an estimated "
            f"{quantity(energy.student_joules, 'J')}, the teacher's {quantity(energy.teacher_joules, 'J')}: {share} "
            "times as much, at 4.6 pJ per multiply-accumulate, 3.7 pJ per multiplication and 0.9 pJ per addition "
            "(Horowitz, ISSCC 2014, 45 nm, fp32). The teacher's norms and activations are not counted; spikes are "
            f"those of the first {integer(watched)} test texts; no hardware was measured."
        )
    return lines


def _exits(run: ClassifierRun, figures: dict[str, str]) -> list[str]:
    if not run.result.exits:
        return []
    rows = [[f"{e.confidence:g}", percent(e.accuracy), number(e.mean_depth, 3)] for e in run.result.exits]
    return [
        "## Early exits",
        "",
        *table(["confidence asked for", "test accuracy", "mean depth (blocks)"], rows),
        "",
        *_figure(figures, "exits", "A text leaves at the first classifier that is as sure as was asked for."),
    ]


def _data(run: ClassifierRun) -> list[str]:
    task = run.result.task
    rows = [[label, *(integer(task.counts[s][n]) for s in task.counts)] for n, label in enumerate(task.labels)]
    cut = ", ".join(f"{integer(count)} of {split}" for split, count in task.truncated.items())
    return [
        "## Texts",
        "",
        *table(["class", *task.counts], rows),
        "",
        f"Texts longer than {task.window} tokens are cut there: {cut}. {integer(task.copies)} texts were left out "
        f"because another split has them, or their group, too. Licence: {task.licence}.",
    ]


def _configuration(run: ClassifierRun, origin: Provenance, reports_root: Path) -> list[str]:
    """Beside the parent's run on the same task and scale whose settings are nearest, the newest of them."""
    result = run.result
    parents = [] if result.parent is None else recorded_classifiers(reports_root, result.parent)
    changes = [
        changed_experiment(other.experiment, run.experiment)
        for other in parents
        if (other.result.task.name, other.result.scale) == (result.task.name, result.scale)
    ]
    differing = (result.parent, min(changes, key=len)) if result.parent is not None and changes else None
    return configuration_section(run.experiment, differing, origin)


def write_classifier_index(version: str, reports_root: Path) -> None:
    """Write README.md of a version: its runs, newest first."""
    runs = recorded_classifiers(reports_root, version)
    rows = [
        [
            f"[{run.result.run_id}]({run.result.run_id}/report.md)", run.result.task.name, run.result.scale,
            str(run.result.seed), percent(run.result.student.test.accuracy), _interval(run.result.student.test),
            "" if run.result.ratio_to_teacher is None else percent(run.result.ratio_to_teacher),
        ]
        for run in runs
    ]  # fmt: skip
    header = ["run", "task", "scale", "seed", "test accuracy", "95 % interval", "of the teacher's"]
    lines = [f"# Reports of {version}", "", runs[0].experiment.question, "", *table(header, rows), ""]
    write_text(reports_root / version / "README.md", "\n".join(lines))
