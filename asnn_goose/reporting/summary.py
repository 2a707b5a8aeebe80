"""The head of a report: question, answer, number, and the tables of results."""

from asnn_goose.config.schema import SPIKING
from asnn_goose.reporting.comparison import FinishedRun, comparison_sentences, set_by_flags, with_interval
from asnn_goose.reporting.markdown import counted, enumeration, integer, number, percent, quantity, table
from asnn_goose.reporting.material import Material
from asnn_goose.reporting.record import Result
from asnn_goose.reporting.seeds import Comparison, interval_words


def opening(material: Material) -> list[str]:
    """Title, and the paragraph that gives the question, the answer and the number."""
    result, experiment = material.run.result, material.run.experiment
    sentences = [f"**{experiment.question}**"]
    if material.parent is not None:
        sentences.append(comparison_sentences(material.run, material.parent, material.provenance.overrides))
    sentences += _seed_sentences(material)
    sentences.append(
        f"After {integer(result.tokens_seen)} training tokens {_student_words(material.run)} has a test perplexity of "
        f"{with_interval(result)}, {number(result.ratio_to_teacher, 3)} times the teacher's "
        f"{number(result.teacher.test_ppl)}. {_baseline_sentence(result)}"
    )
    if result.parent is not None and material.parent is None:
        sentences.append(
            f"No finished run of its parent {result.parent} at scale {result.scale} was found, so the change itself is "
            f"not judged here; `python experiments/{result.parent}.py --scale={result.scale} --seed={result.seed}` "
            "makes one."
        )
    if material.alarms:
        sentences.append(f"{counted(len(material.alarms), 'alarm')} below.")
    return [f"# {result.version}: scale {result.scale}, seed {result.seed}", "", " ".join(sentences)]


def results(material: Material) -> list[str]:
    """Perplexities of everything that was measured on this text, and how closely the student follows the teacher."""
    result, teacher = material.run.result, material.run.result.teacher
    rows = [_perplexity_row("**this run**", result), _teacher_row(result)]
    rows += [_perplexity_row(title, other.result) for title, other in material.others.items()]
    for title, value in (
        ("bigram, all training text", result.baselines.bigram_full_ppl),
        ("bigram, tokens the student saw", result.baselines.bigram_ppl),
        ("unigram, all training text", result.baselines.unigram_ppl),
    ):
        rows.append([title, number(value), "", number(value / teacher.test_ppl, 3), "", ""])
    header = ["", "test perplexity", "95 % interval", "times the teacher", "bits per byte", "validation perplexity"]
    lines = ["## Result", "", *table(header, rows), "", *_likeness(material), ""]
    text = f"Perplexities are over {integer(result.evaluation.test_tokens)} test tokens"
    if result.evaluation.test_windows is not None:
        text += f" in {integer(result.evaluation.test_windows)} windows"
    if result.student.test_ppl_low is not None:
        documents = result.evaluation.test_documents
        units = "windows" if documents is None else f"their {integer(documents)} documents"
        text += f"; intervals by bootstrap over {units}"
    sentences = [f"{text}.", f"Validation: {integer(result.evaluation.validation_tokens)} tokens."]
    for title, other in material.others.items():
        sentences.append(f"{title[0].upper()}{title[1:]}: run `{other.result.run_id}`, seed {other.result.seed}.")
    return [*lines, " ".join(sentences)]


def _seed_sentences(material: Material) -> list[str]:
    """The comparisons with the nearest ancestor and with the furthest, where two or more seeds are paired."""
    ends = dict.fromkeys([*material.over_seeds[:1], *material.over_seeds[-1:]])
    told = [_seed_sentence(material, against) for against in ends if against.delta.n > 1]
    covered = (
        "Intervals over seeds cover initialisation and data order, not the choice of test text, and each is of one "
        "comparison: the ladder's table corrects for their number."
    )
    return [*told, covered] if told else []


def _seed_sentence(material: Material, against: Comparison) -> str:
    delta, judged = against.delta, against.delta.verdict
    text = (
        f"Over {delta.n} paired seeds the perplexity is {number(delta.ratio)} times that of {against.version} (95 % "
        f"interval {interval_words(delta.low, delta.high)}): "
        f"{judged if judged == 'no difference shown' else f'{material.run.result.version} {judged}'}"
    )
    mixed = set_by_flags(against.differing, material.provenance.overrides)
    return f"{text}, with {', '.join(mixed)} of the command line different too." if mixed else f"{text}."


def _student_words(run: FinishedRun) -> str:
    student = run.experiment.student
    count = run.result.student.blocks or student.layers
    blocks = f"{count} RWKV-7 block{'' if count == 1 else 's'}"
    if run.neuron_kind in SPIKING:
        steps = f"{counted(student.neuron.steps, 'micro-step')} per token"
        return f"the spiking student ({blocks}, {run.neuron_kind} neurons, {steps})"
    return f"the {run.neuron_kind} student ({blocks}, no spikes)"


def _baseline_sentence(result: Result) -> str:
    models = {
        f"the unigram ({number(result.baselines.unigram_ppl)})": result.baselines.unigram_ppl,
        f"the bigram fitted on the same tokens ({number(result.baselines.bigram_ppl)})": result.baselines.bigram_ppl,
        f"the bigram fitted on all training text ({number(result.baselines.bigram_full_ppl)})": (
            result.baselines.bigram_full_ppl
        ),
    }
    own = result.student.test_ppl
    below = [name for name, value in models.items() if own < value]
    not_below = [name for name in models if name not in below]
    parts = [f"{word} {enumeration(names)}" for word, names in (("below", below), ("not below", not_below)) if names]
    return f"That is {' but '.join(parts)}."


def _perplexity_row(title: str, result: Result) -> list[str]:
    student = result.student
    return [
        title,
        number(student.test_ppl),
        interval_words(student.test_ppl_low, student.test_ppl_high),
        number(result.ratio_to_teacher, 3),
        number(student.bits_per_byte),
        number(student.val_ppl),
    ]


def _teacher_row(result: Result) -> list[str]:
    teacher = result.teacher
    bits = "" if teacher.bits_per_byte is None else number(teacher.bits_per_byte)
    return [f"teacher {teacher.name}", number(teacher.test_ppl), "", "1", bits,
            "" if teacher.val_ppl is None else number(teacher.val_ppl)]  # fmt: skip


def _likeness(material: Material) -> list[str]:
    runs = {"this run": material.run.result} | {title: other.result for title, other in material.others.items()}
    teacher = material.run.result.teacher.parameters
    rows = [
        ["KL to the teacher (nats per token)", *(number(run.kl_to_teacher) for run in runs.values())],
        ["same first choice as the teacher", *(percent(run.top1_agreement) for run in runs.values())],
        ["right where the teacher is right", *(percent(run.knowledge_retention) for run in runs.values())],
        ["parameters", *(quantity(run.student.parameters) for run in runs.values())],
    ]
    trained = [run.student.trained_parameters for run in runs.values()]
    if any(count is not None for count in trained):
        rows.append(["of which trained", *("" if count is None else quantity(count) for count in trained)])
    header = ["", *runs]
    if teacher is not None:
        header.append("teacher")
        rows = [[*row, quantity(teacher) if row[0] == "parameters" else ""] for row in rows]
    return table(header, rows)
