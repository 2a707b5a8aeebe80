"""The versions of a ladder at one scale, read from what lies beside their reports: which runs count, and why others do
not. Nothing is asked but ``result.json``, ``config.yaml`` and, where there is one, ``metrics.jsonl``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asnn_goose.config import Experiment
from asnn_goose.errors import UserError
from asnn_goose.reporting.comparison import (
    ARITHMETIC,
    FinishedRun,
    changed_experiment,
    changed_settings,
    contradictions,
    load_run,
    outcome,
)
from asnn_goose.reporting.drawing import Curve, curve_of
from asnn_goose.reporting.markdown import branches
from asnn_goose.reporting.metrics import Metrics, read_metrics
from asnn_goose.reporting.seeds import SeedGroup, pair_key, seed_groups

CONTROLS = ("ce_only", "dense_twin", "quantised_twin", "aa")
"""Versions that check the others: no teacher, no spikes, the same levels without a membrane, and only other seeds."""


@dataclass(frozen=True)
class Rung:
    """A version and its runs at the ladder's scale."""

    version: str
    parent: str | None
    """Version that it changes; None for the base, and where no run tells."""
    change: str
    """What it changes, in words; empty where no run tells."""
    runs: SeedGroup
    """Runs of the version's own configuration, one of each seed and arithmetic; () where there is none."""
    left_out: tuple[str, ...]
    """Why others do not count, and what those that do have of former settings, a sentence each."""

    @property
    def is_control(self) -> bool:
        return self.version in CONTROLS


@dataclass(frozen=True)
class Ladder:
    """All versions, controls first."""

    scale: str
    rungs: tuple[Rung, ...]
    others: tuple[FinishedRun, ...]
    """Readable runs of the scale that do not count."""
    metrics: Mapping[Path, Metrics]
    """Folder of a run -> its metrics, where they are kept."""
    left_out: tuple[str, ...]
    """Versions and runs that do not count, and versions whose runs have former settings, a sentence each."""

    @property
    def runs(self) -> tuple[FinishedRun, ...]:
        """Runs that count, in the order of the versions."""
        return tuple(run for rung in self.rungs for run in rung.runs)

    def curve(self, run: FinishedRun, name: str) -> Curve | None:
        """One quantity over training tokens, None where it was not kept."""
        return curve_of(run.result, self.metrics.get(run.folder, []), name, run_name(run))


def run_name(run: FinishedRun) -> str:
    """``<version>/<run_id>``: the run's folder below ``reports/``."""
    return f"{run.folder.parent.name}/{run.folder.name}"


def read_ladder(
    reports_root: Path, scale: str, versions: Sequence[str], asked: Mapping[str, Experiment] | None = None
) -> Ladder:
    """Read the versions' records below `reports_root`.

    Args:
        reports_root: ``reports/``.
        scale: name of the train group; runs of others only tell parent and change of a version that is not asked for.
        versions: in the order of the table.
        asked: version -> its configuration, which tells its parent and change. A run counts where it differs from the
            base's runs in nothing but keys in which these two versions do. Of several settings those asked for count;
            else those run with most seeds; else those that differ in fewest settings from the parent's; else the
            newest. Where others than those asked for count, a sentence names the settings.
    """
    asked = asked or {}
    ordered = sorted(dict.fromkeys(versions), key=lambda version: version not in CONTROLS)
    left_out: dict[str, list[str]] = {version: [] for version in ordered}
    readable = {version: _read_runs(reports_root, version, left_out[version]) for version in ordered}
    told = {version: max(runs, key=lambda run: run.result.age).experiment for version, runs in readable.items() if runs}
    for version in asked.keys() & readable.keys():
        told[version] = asked[version]
        strangers = [run for run in readable[version] if run.experiment.parent != told[version].parent]
        left_out[version] += [_other_parent(run, told[version].parent) for run in strangers]
        readable[version] = [run for run in readable[version] if run not in strangers]
    parents = {version: experiment.parent for version, experiment in told.items()}
    misplaced = {version: reason for version in ordered if (reason := _misplaced(version, parents, ordered))}
    for version, reason in misplaced.items():
        left_out[version].append(reason)
    at_scale = {
        version: [run for run in readable[version] if run.result.scale == scale]
        for version in ordered
        if version not in misplaced
    }
    metrics: dict[Path, Metrics] = {}
    for version, runs in at_scale.items():
        metrics |= _read_metrics(reports_root, runs, left_out[version])
    usable = _without_contradictions(at_scale, left_out)
    own = _own_groups(usable, parents, asked)
    for version, group in own.items():
        left_out[version] += _why_not([run for run in usable[version] if run not in group], group)
        left_out[version] += _outdated(version, own, parents, asked)
    rungs = tuple(
        Rung(
            version,
            parents.get(version),
            told[version].change if version in told else "",
            own[version],
            tuple(left_out[version]),
        )
        for version in at_scale
    )
    counted = {run.folder for rung in rungs for run in rung.runs}
    return Ladder(
        scale,
        rungs,
        others=tuple(run for runs in at_scale.values() for run in runs if run.folder not in counted),
        metrics=metrics,
        left_out=tuple(dict.fromkeys(sentence for version in ordered for sentence in left_out[version])),
    )


def _read_runs(reports_root: Path, version: str, left_out: list[str]) -> list[FinishedRun]:
    """Runs of any scale, by name; a sentence joins `left_out` for each one that cannot be read."""
    runs = []
    folders = {
        path.parent for name in ("config.yaml", "result.json") for path in (reports_root / version).glob(f"*/{name}")
    }
    for folder in sorted(folders):
        try:
            run = load_run(folder)
        except UserError as error:
            left_out.append(_relative(error, reports_root))
            continue
        named = {run.result.version, run.experiment.version}
        if named != {version}:
            other = " and ".join(sorted(named - {version}))
            left_out.append(
                f"{run_name(run)} calls itself a run of {other}, not of {version}: put it where it belongs."
            )
        else:
            runs.append(run)
    return runs


def _other_parent(run: FinishedRun, parent: str | None) -> str:
    return f"{run_name(run)} calls {run.experiment.parent} its parent, and its version's is {parent}: repeat the run."


def _read_metrics(reports_root: Path, runs: Iterable[FinishedRun], left_out: list[str]) -> dict[Path, Metrics]:
    """Folder -> metrics of the runs that have them; a run whose file is damaged counts, without its curve."""
    found = {}
    for run in runs:
        path = run.folder / "metrics.jsonl"
        if path.exists():
            try:
                found[run.folder] = read_metrics(path)
            except (UserError, OSError) as error:
                left_out.append(f"The curve of {run_name(run)}: {_relative(error, reports_root)}")
    return found


def _misplaced(version: str, parents: Mapping[str, str | None], versions: Sequence[str]) -> str | None:
    """Why a version has no place among the others, None where it has one."""
    chain = [version]
    while (parent := parents.get(chain[-1])) is not None and parent not in chain:
        chain.append(parent)
    if parent == version:
        return (
            f"{version}: its parents close a circle, {' -> '.join([*chain, version])}; mend `parent` in a config.yaml."
        )
    first = parents.get(version)
    if first is not None and first not in versions:
        return f"{version}: its parent {first} is not among the versions of this table; name it as well."
    return None


def _without_contradictions(
    runs: Mapping[str, list[FinishedRun]], left_out: Mapping[str, list[str]]
) -> dict[str, list[FinishedRun]]:
    """The runs without those of one fingerprint and different results."""
    contradicting: set[Path] = set()
    every = sorted((run for several in runs.values() for run in several), key=lambda run: run.result.fingerprint)
    for group in contradictions(every, outcome):
        contradicting |= {run.folder for run in group}
        names, fingerprint = " and ".join(map(run_name, group)), group[0].result.fingerprint[:8]
        sentence = (
            f"{names} have one fingerprint, {fingerprint}, and different results, so the code changed in between or a "
            "run does not repeat: none of them is used."
        )
        for version in {run.result.version for run in group}:
            left_out[version].append(sentence)
    return {version: [run for run in several if run.folder not in contradicting] for version, several in runs.items()}


def _own_groups(
    runs: Mapping[str, list[FinishedRun]], parents: Mapping[str, str | None], asked: Mapping[str, Experiment]
) -> dict[str, SeedGroup]:
    """Version -> the runs that count; `parents` leads from none of the versions back to itself."""
    own: dict[str, SeedGroup] = {}

    def base_of(version: str) -> str:
        parent = parents.get(version)
        return version if parent is None or parent not in runs else base_of(parent)

    def comparable(run: FinishedRun, version: str) -> bool:
        if version in asked and asked[version].train.precision not in ("auto", run.arithmetic):
            return False
        base = base_of(version)
        if base == version or not decide(base) or version not in asked or base not in asked:
            return True
        changes = changed_experiment(asked[base], asked[version])
        return changed_settings(decide(base)[0], run, arithmetic=False).keys() <= changes.keys()

    def decide(version: str) -> SeedGroup:
        if version not in own:
            parent = parents.get(version)
            above = decide(parent) if parent is not None and parent in runs else ()
            groups = seed_groups(run for run in runs[version] if comparable(run, version))
            # Groups with more seeds come first, then the newer, and min keeps that order among equals.
            own[version] = min(groups, key=lambda group: _rank(group, above, asked.get(version)), default=())
        return own[version]

    return {version: decide(version) for version in runs}


def _rank(group: SeedGroup, above: SeedGroup, asked: Experiment | None) -> tuple[bool, int, int]:
    other = asked is not None and bool(changed_experiment(asked, group[0].experiment).keys() - {ARITHMETIC})
    differing = changed_settings(above[0], group[0], arithmetic=False) if above else ()
    return other, -len({run.result.seed for run in group}), len(differing)


def _outdated(
    version: str, own: Mapping[str, SeedGroup], parents: Mapping[str, str | None], asked: Mapping[str, Experiment]
) -> list[str]:
    """A sentence where runs that count differ from what is asked for in more than the parent's do."""
    parent = parents.get(version) or ""
    former = {
        name: changed_experiment(asked[name], own[name][0].experiment)
        for name in (version, parent)
        if name in asked and own.get(name)
    }
    above = former.get(parent, {})
    keys = [key for key, pair in former.get(version, {}).items() if key != ARITHMETIC and above.get(key) != pair]
    told = f"The runs of {version} that count have other settings than it has now: {', '.join(branches(keys))}."
    return [told] if keys else []


def _why_not(runs: Iterable[FinishedRun], group: SeedGroup) -> list[str]:
    """Why runs are not in the group of their version that counts, those of one reason in one sentence."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        reasons.setdefault(_reason(run, group), []).append(run_name(run))
    return [
        f"{names[0]} {one}" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more of the version {several}"
        for (one, several), names in reasons.items()
    ]


def _reason(run: FinishedRun, group: SeedGroup) -> tuple[str, str]:
    """The end of a sentence, for one run and for several."""
    if not group:
        of_base = "from the base's runs in more than its version's change."
        return f"differs {of_base}", f"differ {of_base}"
    differing = changed_settings(group[0], run, arithmetic=run.arithmetic not in {other.arithmetic for other in group})
    if differing := branches(differing):
        others = f"other settings than the version's runs that count: {', '.join(differing)}."
        return f"has {others}", f"have {others}"
    if run.result.evaluation.test_tokens != group[0].result.evaluation.test_tokens:
        tokens = "evaluated on another number of tokens than the version's runs that count."
        return f"was {tokens}", f"were {tokens}"
    newer = next(other for other in group if pair_key(other) == pair_key(run))
    repeated = f"seed {run.result.seed}, of which the newer {run_name(newer)} counts."
    return f"repeats {repeated}", f"repeat {repeated}"


def _relative(error: Exception, reports_root: Path) -> str:
    """An error's text on one line, with paths below `reports_root`, so that it reads the same wherever that lies."""
    return " ".join(str(error).replace(f"{reports_root}/", "").split())
