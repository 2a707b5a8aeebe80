"""Finished runs to compare with, and what the comparison allows one to say."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from asnn_goose.config.load import NOT_NUMBERS, AnyExperiment, delta, load_dump
from asnn_goose.config.schema import SPIKING, Experiment
from asnn_goose.errors import UserError
from asnn_goose.reporting.markdown import branches, integer, number, percent
from asnn_goose.reporting.record import Result, load_result
from asnn_goose.reporting.record_base import RunRecord
from asnn_goose.reporting.run_folder import RECORDS, read_experiment

log = logging.getLogger(__name__)

Verdict = Literal["better", "worse", "cannot tell", "not comparable"]

# Settings that decide on which text a perplexity is taken.
EVALUATION = ("data.", "train.test_tokens", "student.tokenizer")
NEURON = ("student.neuron.", "student.hidden_neuron.")
ARITHMETIC = "train.precision"
"""Setting that the machine decides where it is "auto"."""


class Recorded(Protocol):
    """A run of any kind with its record."""

    @property
    def result(self) -> RunRecord: ...


R = TypeVar("R", bound=Recorded)


@dataclass(frozen=True)
class FinishedRun:
    """A run, or the copy of it beside its report, that has a result.json."""

    folder: Path
    result: Result
    experiment: Experiment

    @property
    def arithmetic(self) -> str:
        """Type of the matrix products in training, bfloat16 or float32; "auto" where the record does not tell."""
        return self.result.precision or self.experiment.train.precision

    @property
    def neuron_kind(self) -> str:
        return self.experiment.student.neuron.kind

    @property
    def spikes(self) -> bool:
        """Whether all neurons spike, as those of the dense and the quantised twin do not."""
        student = self.experiment.student
        return student.neuron.kind in SPIKING and student.hidden_neuron.kind in SPIKING

    @property
    def student_joules(self) -> float | None:
        """Energy of a token's arithmetic, where levels without spikes are operands to multiply with; None: unknown."""
        energy = self.result.energy
        if energy is None:
            return None
        multiplied = energy.student_counts_multiplied_joules_per_token
        return energy.student_joules_per_token if self.spikes or multiplied is None else multiplied


def load_run(folder: Path) -> FinishedRun:
    """Read config.yaml and result.json of a finished run.

    Raises:
        UserError: one of them is missing or not what it should be, or the two are of different runs.
    """
    told, measured = read_experiment(folder, load_dump), load_result(folder / "result.json")
    for name, asked, found in (
        ("version", told.version, measured.version),
        ("parent", told.parent, measured.parent),
        ("seed", told.seed, measured.seed),
        ("scale", told.train.scale, measured.scale),
    ):
        if asked != found:
            raise UserError(f"{folder}: {name} is {asked} in config.yaml and {found} in result.json: repeat the run.")
    return FinishedRun(folder, measured, told)


def changed_settings(before: FinishedRun, after: FinishedRun, arithmetic: bool = True) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, after) of every setting that can change a number and differs, the seed apart.

    Args:
        arithmetic: whether train.precision is one of them, as what it came to on the run's machine.
    """
    changed = changed_experiment(before.experiment, after.experiment)
    changed.pop(ARITHMETIC, None)
    if arithmetic and before.arithmetic != after.arithmetic:
        changed[ARITHMETIC] = before.arithmetic, after.arithmetic
    return changed


def changed_experiment(before: AnyExperiment, after: AnyExperiment) -> dict[str, tuple[Any, Any]]:
    """:func:`changed_settings` of two configurations."""
    differing = delta(after, before)
    return {key: pair for key, pair in differing.items() if key not in NOT_NUMBERS | {"seed"}}


def run_folders(version: str, runs_root: Path, reports_root: Path) -> dict[str, list[Path]]:
    """Name of a finished run's folder -> where it lies, the place to read it from first.

    That is the record beside its report, so that the same is read here and where there is no ``runs/``; then the run
    itself; last a record that lacks some of RECORDS.
    """
    found: dict[str, list[Path]] = {}
    for root in dict.fromkeys((reports_root, runs_root)):
        for path in sorted((root / version).glob("*/result.json")):
            found.setdefault(path.parent.name, []).append(path.parent)
    return {
        name: sorted(folders, key=lambda folder: not all((folder / file).exists() for file in RECORDS))
        for name, folders in sorted(found.items())
    }


def finished_runs(version: str, runs_root: Path, reports_root: Path) -> list[FinishedRun]:
    """All finished runs of a version, newest first; a damaged record is logged, and its run takes its place."""
    found: list[FinishedRun] = []
    for folders in run_folders(version, runs_root, reports_root).values():
        for folder in folders:
            try:
                run = load_run(folder)
                if run.result.version != version:
                    raise UserError(f"{folder} is a run of {run.result.version}: put it where it belongs")
            except UserError as error:
                warn_once(f"{error} (left out)")
                continue
            # A run whose folder has a name of its own, and its record; two that lie side by side are two runs.
            if not any(other.result.run_id == run.result.run_id and _apart(other, run) for other in found):
                found.append(run)
            break
    return sorted(found, key=lambda run: run.result.age, reverse=True)


def _apart(one: FinishedRun, other: FinishedRun) -> bool:
    return one.folder.parents[1] != other.folder.parents[1]


@cache
def warn_once(sentence: str) -> None:
    """Log a sentence the first time it is told, since many reports come across the same damaged run."""
    log.warning("%s", sentence)


def outcome(run: FinishedRun) -> tuple[float, ...]:
    """Numbers that two runs of one fingerprint have in common; times and memory may differ."""
    result = run.result
    measured = (result.student.test_ppl, result.student.val_ppl, result.kl_to_teacher, result.top1_agreement)
    return (float(result.seed), *measured)


def contradictions(runs: Iterable[R], numbers: Callable[[R], object]) -> list[list[R]]:
    """Runs that share a fingerprint, which promises equal numbers, and have different ones: group by group."""
    alike: dict[str, list[R]] = {}
    for run in runs:
        alike.setdefault(run.result.fingerprint, []).append(run)
    return [same for same in alike.values() if any(numbers(run) != numbers(same[0]) for run in same)]


def nearest_run(like: FinishedRun, candidates: list[FinishedRun]) -> FinishedRun | None:
    """The candidate (newest first) to compare `like` with.

    Same scale always; then the fewest differing settings, so that a twin or a run with other overrides does not stand
    in for the version; then the same seed; then the newest.
    """
    usable = [run for run in candidates if run.result.scale == like.result.scale]
    identity = (like.result.version, like.result.run_id)
    usable = [run for run in usable if (run.result.version, run.result.run_id) != identity]
    return min(usable, key=lambda run: _distance(like, run), default=None)


def _distance(like: FinishedRun, run: FinishedRun) -> tuple[int, bool]:
    return len(changed_settings(like, run)), run.result.seed != like.result.seed


def find_parent(run: FinishedRun, runs_root: Path, reports_root: Path) -> FinishedRun | None:
    """The parent version's run nearest to `run`, None where there is none at this scale."""
    if run.result.parent is None:
        return None
    return nearest_run(run, finished_runs(run.result.parent, runs_root, reports_root))


def find_twins(run: FinishedRun, runs_root: Path, reports_root: Path) -> dict[str, FinishedRun]:
    """Neuron kind -> run of the same version that differs from `run` in the neurons' settings alone (and the seed)."""
    twins: dict[str, list[FinishedRun]] = {}
    for other in finished_runs(run.result.version, runs_root, reports_root):
        differing = changed_settings(run, other)
        if other.neuron_kind != run.neuron_kind and all(key.startswith(NEURON) for key in differing):
            twins.setdefault(other.neuron_kind, []).append(other)
    nearest = {kind: nearest_run(run, others) for kind, others in sorted(twins.items())}
    return {kind: twin for kind, twin in nearest.items() if twin is not None}


def verdict(run: FinishedRun, other: FinishedRun) -> Verdict:
    """Whether `run` has a lower (better) or higher (worse) test perplexity than `other`.

    "cannot tell": the 95 % intervals touch, or one was not measured. "not comparable": other text was predicted.
    """
    if _evaluated_differently(run, other):
        return "not comparable"
    mine, theirs = _interval(run.result), _interval(other.result)
    if mine is None or theirs is None:
        return "cannot tell"
    if mine[1] < theirs[0]:
        return "better"
    if mine[0] > theirs[1]:
        return "worse"
    return "cannot tell"


def comparison_sentences(run: FinishedRun, other: FinishedRun, overrides: Iterable[str] = ()) -> str:
    """What may be said about `run` against its parent's run `other`: verdict first, then what weakens it.

    `overrides` are the keys set on the command line of `run`: where one differs, the change is not the version's alone.
    """
    mine, theirs = run.result.student.test_ppl, other.result.student.test_ppl
    name = other.result.version
    stands = f"{name} stands at {with_interval(other.result)}"
    judged = verdict(run, other)
    if judged == "not comparable":
        reasons = ", ".join(f"`{key}`" for key in _evaluated_differently(run, other))
        return f"{stands}, but was evaluated on other text ({reasons} differ), so the two are not comparable."
    change = f"{percent(abs(mine - theirs) / theirs)} {'lower' if mine < theirs else 'higher'}"
    if judged == "cannot tell":
        measured = _interval(run.result) is not None and _interval(other.result) is not None
        why = "the 95 % intervals overlap" if measured else "an interval was not measured for both"
        change = f"{change}, and {why}, so one seed cannot tell" if mine != theirs else "no better and no worse"
        text = f"No clear difference from {name}: {stands}, this run is {change}."
    else:
        word = "Better" if judged == "better" else "Worse"
        text = (
            f"{word} than {name}: {stands}, this run is {change}, and the 95 % intervals do not overlap. "
            "They cover the choice of test text, not the spread between seeds."
        )
    return " ".join([text, *_caveats(run, other, overrides)])


def with_interval(result: Result) -> str:
    """Test perplexity as text, with its 95 % interval if it was measured."""
    interval = _interval(result)
    text = number(result.student.test_ppl)
    return text if interval is None else f"{text} (95 % interval {number(interval[0])} to {number(interval[1])})"


def _interval(result: Result) -> tuple[float, float] | None:
    low, high = result.student.test_ppl_low, result.student.test_ppl_high
    return None if low is None or high is None else (low, high)


def _evaluated_differently(run: FinishedRun, other: FinishedRun) -> list[str]:
    keys = [key for key in changed_settings(other, run) if key.startswith(EVALUATION)]
    if not keys and run.result.evaluation.test_tokens != other.result.evaluation.test_tokens:
        keys = ["evaluation.test_tokens"]
    return keys


def _caveats(run: FinishedRun, other: FinishedRun, overrides: Iterable[str]) -> list[str]:
    mine, theirs, name = run.result, other.result, other.result.version
    caveats = []
    if mine.seed != theirs.seed:
        caveats.append(f"The run of {name} has seed {theirs.seed}, this one {mine.seed}.")
    if mine.tokens_seen != theirs.tokens_seen:
        caveats.append(
            f"The run of {name} saw {integer(theirs.tokens_seen)} training tokens, this one "
            f"{integer(mine.tokens_seen)}."
        )
    differing = changed_settings(other, run)
    if differing.pop(ARITHMETIC, None):
        caveats.append(
            f"The run of {name} multiplied matrices in {other.arithmetic}, this one in {run.arithmetic}, which alone "
            "moves a perplexity."
        )
    if differing:
        caveats.append(f"Their settings differ in {', '.join(branches(differing))}.")
    mixed = set_by_flags(differing, overrides)
    if mixed:
        caveats.append(f"Given on the command line and different too: {', '.join(mixed)}.")
    return caveats


def set_by_flags(keys: Iterable[str], overrides: Iterable[str]) -> list[str]:
    """Those dotted keys, as code, that a flag set: a picked group file stands under its group's name and covers all
    keys below."""
    given = tuple(f"{override}." for override in overrides)
    return [f"`{key}`" for key in keys if f"{key}.".startswith(given)]
