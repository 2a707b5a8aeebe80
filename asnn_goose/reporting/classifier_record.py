"""What a finished run of a classifier measured: the typed contents of its ``result.json``.

Accuracies and F1 lie in [0, 1]; intervals are 95 %, by bootstrap over texts.
"""

from asnn_goose.reporting.record import Raster, SpikeResult
from asnn_goose.reporting.record_base import Record, RunRecord

WATCHED = 256
"""Test texts, the first ones, whose spikes are counted."""


class Score(Record):
    """Predictions of one split."""

    accuracy: float
    """Share of the texts that are named rightly."""
    accuracy_low: float
    """Lower end of its interval."""
    accuracy_high: float
    """Upper end."""
    macro_f1: float
    """Mean over classes of their F1."""
    macro_f1_low: float
    """Lower end of its interval."""
    macro_f1_high: float
    """Upper end."""
    confusion: tuple[tuple[int, ...], ...]
    """Texts of each class (row) by what was predicted (column)."""


class TaskResult(Record):
    """The labelled texts."""

    name: str
    """Asset, hub id or file."""
    licence: str
    """Of the texts."""
    labels: tuple[str, ...]
    """In the order of their numbers."""
    counts: dict[str, tuple[int, ...]]
    """Split -> texts of each class."""
    truncated: dict[str, int]
    """Split -> texts longer than the window, as the student's tokenizer cuts them."""
    window: int
    """Tokens of a text that are read."""
    copies: int
    """Texts left out because a split that comes before theirs has them too."""


class FinetunedResult(Record):
    """The encoder that taught."""

    name: str
    """Asset, folder or model id."""
    parameters: int
    """With its classifier."""
    epochs: int
    """Passes over the training texts."""
    validation: Score
    """At the epoch that was kept."""
    test: Score
    """The same weights on test text."""


class StudentScores(Record):
    """The classifier at the end of the run."""

    parameters: int
    """All of them."""
    trained_parameters: int
    """Those that took gradients."""
    blocks: int
    """RWKV-7 blocks."""
    validation: Score
    """After the last step."""
    test: Score
    """Read once."""


class ExitResult(Record):
    """Test texts that each left at the first classifier that was sure enough."""

    confidence: float
    """Least probability of the class that is named."""
    accuracy: float
    """Share of the test texts that are named rightly."""
    mean_depth: float
    """Blocks that a text went through."""


class SentenceEnergy(Record):
    """Estimated energy of one test text of mean length, in joules, 45 nm, fp32."""

    tokens: float
    """Mean length of the test texts, special tokens included."""
    student_joules: float
    """The blocks, in both directions where it reads so."""
    teacher_joules: float
    """The blocks, attention included."""


class ClassifierResult(RunRecord):
    """Contents of ``result.json``."""

    texts_seen: int
    """Training texts read in it, repetitions included."""
    wall_seconds: float
    """Of all sessions."""
    seconds_by_phase: dict[str, float]
    """Phase of the last session -> seconds."""
    task: TaskResult
    """What was learnt."""
    teacher: FinetunedResult
    """Whom it was learnt from."""
    student: StudentScores
    """Who learnt."""
    ratio_to_teacher: float | None
    """Test accuracy over the teacher's; None where that is 0."""
    spikes: SpikeResult | None = None
    """None for a student without spikes."""
    energy: SentenceEnergy | None = None
    """None where it was not counted."""
    exits: tuple[ExitResult, ...] = ()
    """By confidence; empty for a student without exits."""
    raster: Raster | None = None
    """None for a student without micro-steps."""
    notes: tuple[str, ...] = ()
    """What became of the first stage."""
