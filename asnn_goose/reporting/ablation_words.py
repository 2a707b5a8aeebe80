"""What the ladder's table says in words: the opening sentences, how it was judged, and numbers with their intervals."""

import statistics
from collections.abc import Sequence

from asnn_goose.errors import UserError
from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.effects import ALPHA, Effect, Summary, changes_nothing
from asnn_goose.reporting.ladder import Ladder
from asnn_goose.reporting.markdown import counted, duration, enumeration, integer, number, quantity
from asnn_goose.reporting.run_folder import load_provenance
from asnn_goose.reporting.seeds import interval_words, pair_key, pairs_of
from asnn_goose.reporting.statistics import first_to_pass


def opening(ladder: Ladder, found: Sequence[Effect]) -> str:
    """What the table shows, in words."""
    changes = [effect for effect in found if not effect.rung.is_control]
    judged = sum(effect.p_holm is not None for effect in found)
    sentences = [_verdict_sentence(changes, judged > 0)]
    if judged:
        comparisons = f"all {judged} comparisons" if judged > 1 else "the one comparison"
        sentences.append(
            f"A verdict needs a p-value below {ALPHA} after Holm's correction for {comparisons} of the table."
        )
    early = [effect.rung.version for effect in found if _only_by_itself(effect)]
    if early:
        sentences.append(
            f"Taken alone, the interval{'s' * (len(early) > 1)} of {enumeration(early)} would leave out 1; among "
            f"{judged} comparisons that is not enough."
        )
    measured = [(effect.summary, effect.rung.version) for effect in changes if effect.summary is not None]
    if measured:
        best, version = min(measured, key=lambda each: each[0].ratio_to_teacher)
        sentences.append(
            f"Closest to the teacher is {version} with a test perplexity of {perplexity_words(best)}, "
            f"{number(best.ratio_to_teacher, 3)} times the teacher's."
        )
    sentences += [_noise_sentence(effect) for effect in found if _shows_noise(effect, found)]
    runs = [run.result for run in ladder.runs]
    hours = sum(result.wall_seconds for result in runs) / 3600
    sentences.append(
        f"{counted(len(runs), 'run')} count{'s' if len(runs) == 1 else ''}, with "
        f"{integer(sum(result.tokens_seen for result in runs))} training tokens and {number(hours, 3)} hours of "
        "computing in all."
    )
    return " ".join(sentences)


def how_judged(found: Sequence[Effect]) -> str:
    """How perplexities, ratios and p-values were computed."""
    text = (
        "Perplexities are geometric means over seeds, with Student's t-interval of their logarithms. A ratio below 1 "
        "is better than the parent. Its interval is Student's t over the seeds that both were run with, pair by pair, "
        "since a seed decides the initialisation and the order of the data. Machines multiply matrices in bfloat16 or "
        "in float32, and both runs of a pair did in the same; a seed that was run in both counts once, by its mean, so "
        "that a ratio need not be the quotient of two perplexities. "
    )
    singles = [
        run for effect in found if effect.summary is not None and effect.summary.n == 1 for run in effect.rung.runs
    ]
    if singles:
        text += (
            f"Marked \"one seed\", a perplexity's interval is the run's own, by bootstrap over {_drawn(singles)}, and "
            "says nothing of other seeds. "
        )
    if any(effect.delta is not None and not effect.delta.paired for effect in found):
        text += (
            "Unpaired: fewer than two pairs, or nothing but the seeds is changed; the ratio is that of the means of "
            "their runs in one arithmetic, with Welch's interval where both have two seeds or more. "
        )
    text += _code_sentence(found)
    if any(effect.verdict == "not comparable" for effect in found):
        text += "Not comparable: only runs on other test text or in another arithmetic than the parent's. "
    return text + (
        "p is two-sided and corrected by Holm over the whole table; the intervals are each for one comparison. "
        f"{_power_sentence(found)}None of the intervals covers the choice of the test text."
    )


def _power_sentence(found: Sequence[Effect]) -> str:
    """What too few seeds cannot show, nothing where no pairs are judged."""
    judged = [effect.delta for effect in found if effect.p_holm is not None and effect.delta is not None]
    numbers = sorted({delta.n for delta in judged if delta.paired})
    if not numbers:
        return ""
    least = [f"{number(first_to_pass(ALPHA, len(judged), n), 3)} with {n} pairs" for n in numbers]
    first = f"The first of {len(judged)} comparisons" if len(judged) > 1 else "The one comparison"
    return (
        f'{first} stands from a mean of so many of its standard errors on: {enumeration(least)}; "no difference '
        'shown" leaves room for effects of that size. '
    )


def _drawn(runs: Sequence[FinishedRun]) -> str:
    """What the intervals of these runs were drawn over."""
    by_documents = {run.result.evaluation.test_documents is not None for run in runs}
    if by_documents == {True}:
        return "test documents"
    return f"{'test documents or' if True in by_documents else 'test'} windows (narrower than over their documents)"


def _code_sentence(found: Sequence[Effect]) -> str:
    """In how many pairs the code differs, nothing where there is no pair."""
    runs = {effect.rung.version: effect.rung.runs for effect in found}
    paired = [effect.rung for effect in found if effect.delta is not None and effect.delta.paired]
    pairs = [pair for rung in paired for pair in pairs_of(rung.runs, runs[rung.parent or ""])]
    if not pairs:
        return ""
    commits = {run.folder: _clean_commit(run) for pair in pairs for run in pair}
    alike = sum(commits[one.folder] is not None and commits[one.folder] == commits[two.folder] for one, two in pairs)
    return (
        f"Of the {len(pairs)} pairs {alike or 'none'} {'is' if alike == 1 else 'are'} of one commit of the code; what "
        "changed between two commits, rounding above all, is part of the ratio of the others. "
    )


def _clean_commit(run: FinishedRun) -> str | None:
    """Commit that a run's code was at; None where it differed from that, or is not known."""
    try:
        origin = load_provenance(run.folder)
    except UserError:
        return None
    return None if origin.dirty else origin.commit


def how_measured(found: Sequence[Effect]) -> str:
    """What the columns of likeness, spikes and cost mean."""
    return (
        "Means over seeds. KL is that of the teacher to the student at temperature 1; spike operands are the share of "
        "the mixer matrices' products whose operand is a spike, zero operands the share of tokens x channels of these "
        "operands that are 0; energy is that of the arithmetic, estimated, with an addition for each spike and a "
        f"multiplication for each level of a student without spikes.{teacher_sentence(found)}"
    )


def sharing_sentence(runs: Sequence[FinishedRun]) -> str:
    """What it is worth that the teacher's targets and the first stage are computed once for all runs of a seed.

    tokens/s are training tokens over the seconds of preparation and training. The first run of a seed and arithmetic is
    the one that started first; a ladder that went on on another machine has computed them again there.
    """
    firsts: dict[tuple[int, str], FinishedRun] = {}
    # Runs of earlier days do not say what took how long.
    runs = [run for run in runs if run.result.seconds_by_phase.get("training")]
    for run in sorted(runs, key=lambda run: run.result.started):
        firsts.setdefault(pair_key(run), run)
    later = [run for run in runs if run is not firsts[pair_key(run)]]
    if not later:
        return ""
    speeds = [_speed(run) for run in runs]
    (long, before), (short, after) = (
        (statistics.median(map(_preparation, some)), statistics.median(map(_speed, some)))
        for some in (list(firsts.values()), later)
    )
    return (
        "The teacher's targets and the first stage of a seed are computed once, by its first run. Preparation takes "
        f"first runs {duration(long)} (median of {len(firsts)}), later ones {duration(short)} (of {len(later)}). "
        f"With it and the looks at validation counted in, first runs make {number(before, 3)} tokens/s, later ones "
        f"{number(after, 3)}; runs differ from {number(min(speeds), 3)} to {number(max(speeds), 3)} by their machine "
        "and by what else ran there, so only the preparation tells what sharing is worth."
    )


def _preparation(run: FinishedRun) -> float:
    """Seconds of preparation."""
    return run.result.seconds_by_phase.get("preparation", 0.0)


def _speed(run: FinishedRun) -> float:
    """Tokens/s from the start of preparation to the end of training."""
    return run.result.tokens_seen / (_preparation(run) + run.result.seconds_by_phase["training"])


def teacher_sentence(found: Sequence[Effect]) -> str:
    """The teacher's perplexity and energy, by the first version that was run."""
    first = next((effect.rung.runs[0].result for effect in found if effect.rung.runs), None)
    if first is None:
        return ""
    text = f" The teacher, {first.teacher.name}, has a test perplexity of {number(first.teacher.test_ppl)}"
    if first.energy is not None:
        text += f" at {quantity(first.energy.teacher_joules_per_token, 'J')} per token"
    return f"{text}."


def perplexity_words(summary: Summary) -> str:
    """Test perplexity with its interval."""
    words = interval_words(summary.low, summary.high)
    note = ["one seed"] if summary.n == 1 else []
    inside = ", ".join([words, *note] if words else note)
    return f"{number(summary.test_ppl)} ({inside})" if inside else number(summary.test_ppl)


def ratio_words(effect: Effect) -> str:
    """Ratio to the parent with its interval, nothing where there is none."""
    delta = effect.delta
    if delta is None:
        return ""
    words = interval_words(delta.low, delta.high)
    fewer = delta.paired and effect.summary is not None and delta.n < effect.summary.n
    notes = [counted(delta.n, "pair")] if fewer else [] if delta.paired else ["unpaired"]
    inside = ", ".join([*([words] if words else []), *notes])
    return f"{number(delta.ratio)} ({inside})" if inside else number(delta.ratio)


def _verdict_sentence(changes: Sequence[Effect], controls: bool) -> str:
    """How many of the versions that have a parent help, hurt, show nothing, or cannot be judged.

    Args:
        controls: whether one of the controls is judged.
    """
    groups = {
        verdict: [effect.rung.version for effect in changes if effect.verdict == verdict]
        for verdict in ("helps", "hurts", "no difference shown", "one seed")
    }
    judged = sum(map(len, groups.values()))
    if not judged:
        return f"No version{' but the controls' if controls else ''} can be compared with its parent yet."
    parts = []
    for verdict, (one, several) in {
        "helps": ("helps", "help"),
        "hurts": ("hurts", "hurt"),
        "no difference shown": ("shows no difference", "show no difference"),
        "one seed": ("rests on one seed", "rest on one seed each"),
    }.items():
        names = groups[verdict]
        told = f" ({enumeration(names)})" if names and verdict in ("helps", "hurts") else ""
        if names or verdict != "one seed":
            parts.append(f"{len(names) or 'none'} {one if len(names) == 1 else several}{told}")
    versions = f"{counted(judged, 'version')}, controls not counted"
    compared = f"Of {versions}, compared with the parent that each changes"
    text = f"{compared}, {enumeration(parts)}"
    absent = sum(effect.summary is None for effect in changes)
    return f"{text}; {absent} {'has' if absent == 1 else 'have'} no run that counts." if absent else f"{text}."


def _only_by_itself(effect: Effect) -> bool:
    """Whether the version's own interval leaves out 1, and the correction takes it back."""
    return (
        effect.verdict == "no difference shown"
        and effect.delta is not None
        and effect.delta.verdict in ("helps", "hurts")
    )


def _shows_noise(effect: Effect, found: Sequence[Effect]) -> bool:
    """Whether a version has a ratio, and changes nothing."""
    if effect.delta is None:
        return False
    parent = next(other.rung for other in found if other.rung.version == effect.rung.parent)
    return changes_nothing(effect.rung.runs, parent.runs)


def _noise_sentence(effect: Effect) -> str:
    ratio = ratio_words(effect)
    return (
        f"{effect.rung.version} changes nothing but the seeds of {effect.rung.parent}: its ratio of {ratio} is what "
        "noise alone makes."
    )
