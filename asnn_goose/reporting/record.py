"""What a finished run measured: the typed contents of ``result.json``.

Perplexities are exp of the token-mean cross-entropy in nats, at temperature 1. "Per token" means per evaluated token.
A quantity that was not measured is None, and its row is absent from every report.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from asnn_goose.reporting.information_record import InformationResult
from asnn_goose.reporting.record_base import Record, RunRecord, read_result

Perplexity = Annotated[float, Field(gt=0)]


class TeacherResult(Record):
    """The teacher on the same tokens as the student."""

    name: str
    """Asset, folder or model id."""
    test_ppl: Perplexity
    """Test perplexity."""
    val_ppl: Perplexity | None = None
    """Validation perplexity."""
    bits_per_byte: float | None = None
    """Test cross-entropy in bits per UTF-8 byte of the text."""
    parameters: int | None = None
    """Number of parameters, embedding included."""


class StudentResult(Record):
    """The student at the end of the run."""

    test_ppl: Perplexity
    """Test perplexity."""
    val_ppl: Perplexity
    """Validation perplexity."""
    bits_per_byte: float
    """Test cross-entropy in bits per UTF-8 byte of the text."""
    parameters: int
    """Number of parameters, embedding and head included (tied ones once)."""
    blocks: int | None = None
    """Number of blocks."""
    trained_parameters: int | None = None
    """Number of parameters that the optimiser moved."""
    test_ppl_low: Perplexity | None = None
    """Lower end of the 95 % interval of the test perplexity: bootstrap over the test documents."""
    test_ppl_high: Perplexity | None = None
    """Upper end of the same interval."""


class Baselines(Record):
    """Counting models on the same test tokens, as test perplexities."""

    unigram_ppl: Perplexity
    """Unigram, fitted on all training text."""
    bigram_ppl: Perplexity
    """Interpolated bigram, fitted on exactly the tokens that training had read when it ended."""
    bigram_full_ppl: Perplexity
    """Interpolated bigram, fitted on all training text."""


class Evaluation(Record):
    """How much text the perplexities rest on."""

    validation_tokens: int
    """Validation tokens that were predicted."""
    test_tokens: int
    """Test tokens that were predicted."""
    test_windows: int | None = None
    """Test windows."""
    test_documents: int | None = None
    """Documents of the test windows: the units of the bootstrap; None of a run that drew windows."""


class SiteSpikes(Record):
    """One neuron population: a projection's input in one layer."""

    layer: int
    """Block, counted from 1."""
    site: str
    """Projection that takes these spikes, such as ``receptance`` or ``channel_value``."""
    rate: float
    """Share of (token, channel, micro-step) that spike."""
    zero_fraction: float
    """Share of (token, channel) whose mean spike is zero."""
    dead_fraction: float
    """Share of channels that never spiked on the evaluated text."""
    saturated_fraction: float
    """Share of channels that spiked at every micro-step of the evaluated text."""
    threshold: float | None = None
    """theta, mean over channels, in units of the scaled current."""
    decay: float | None = None
    """beta, mean over channels."""


class SpikeResult(Record):
    """Firing over all layers and sites, weighted by their numbers of channels."""

    rate: float
    """Share of (token, channel, micro-step) that spike."""
    zero_fraction: float
    """Share of (token, channel) whose mean spike is zero."""
    operand_fraction: float
    """Share of the mixer matrices' multiply-accumulates whose operand is a spike."""
    dead_fraction: float
    """Share of channels that never spiked on the evaluated text."""
    saturated_fraction: float
    """Share of channels that spiked at every micro-step of the evaluated text."""
    per_layer: tuple[SiteSpikes, ...]
    """Every population, in the order of the forward pass."""


class EnergyKind(Record):
    """Arithmetic of one kind (mixer matrices, head, ...), per token."""

    macs: float
    """Multiply-accumulates that the dense form takes."""
    spike_macs: float
    """Those among them whose operand is a spike."""
    operations: float
    """Operations done: an addition per spike and weight where the operand is a spike, else a multiply-accumulate; and
    the additions and multiplications outside matrix products."""
    joules_per_token: float
    """Energy of these operations in joules."""
    additions: float | None = None
    """Additions that spikes and neurons make."""
    multiplications: float | None = None
    """Multiplications outside matrix products."""
    bytes_per_token: float | None = None
    """Memory traffic in bytes, one token at a time."""


class PrecisionEnergy(Record):
    """The same operations, all of them in one number format."""

    multiplication_picojoules: float
    """Assumed energy of a multiplication."""
    addition_picojoules: float
    """Assumed energy of an addition."""
    student_joules_per_token: float
    """Arithmetic of the student, in joules."""
    teacher_joules_per_token: float = Field(gt=0)
    """Arithmetic of the teacher, in joules."""


class EnergyResult(Record):
    """Estimated energy per token: operation counts times an assumed energy each, head included."""

    student_joules_per_token: float
    """Arithmetic of the student, in joules."""
    teacher_joules_per_token: float = Field(gt=0)
    """Arithmetic of the teacher, in joules."""
    by_kind: dict[str, EnergyKind]
    """The student's arithmetic by kind."""
    picojoules: dict[str, float]
    """Assumed energy in picojoules by operation, in float32."""
    teacher_by_kind: dict[str, EnergyKind] = Field(default_factory=dict)
    """The teacher's arithmetic by kind."""
    by_precision: dict[str, PrecisionEnergy] = Field(default_factory=dict)
    """Both models' energy in number formats other than float32; a level k that is no spike counts as k additions."""
    student_counts_multiplied_joules_per_token: float | None = None
    """The student's energy in float32 if a count of spikes is one multiply-accumulate instead of as many additions."""
    student_bytes_per_token: float | None = None
    """Memory traffic of the student in bytes: weights and state, one token at a time."""
    teacher_bytes_per_token: float | None = None
    """The same for the teacher."""
    dram_picojoules_per_byte: tuple[float, float] | None = None
    """Assumed energy of a byte read from DRAM, least and most, in picojoules; in none of the joules above."""


class Sample(Record):
    """One prompt and how both models go on."""

    prompt: str
    """Text given to both."""
    student: str
    """Continuation by the student, without the prompt."""
    teacher: str
    """Continuation by the teacher, without the prompt."""


class Raster(Record):
    """Which spikes ``raster.npz`` in the run's folder holds."""

    layer: int
    """Block, counted from 1."""
    site: str
    """Projection that takes these spikes."""
    file: str = "raster.npz"
    """Arrays ``tokens`` [tokens] of str and ``spikes`` [tokens * steps, channels] of int8, micro-steps innermost."""


class Result(RunRecord):
    """Everything that a finished run measured."""

    tokens_seen: int
    """Training tokens."""
    wall_seconds: float
    """Duration in seconds, evaluation included."""
    seconds_by_phase: dict[str, float] = Field(default_factory=dict)
    """Duration in seconds by phase, such as training or evaluation."""
    tokens_per_second: float
    """Training throughput."""
    peak_memory_bytes: int
    """Largest resident memory of the process, on a GPU its largest allocation, in bytes."""
    teacher: TeacherResult
    student: StudentResult
    ratio_to_teacher: float = Field(gt=0)
    """student.test_ppl / teacher.test_ppl."""
    kl_to_teacher: float
    """KL(teacher || student) on test text, in nats per token, at temperature 1."""
    top1_agreement: float
    """Share of test tokens where both models rank the same token first."""
    knowledge_retention: float
    """Share of the test tokens that the teacher predicts right which the student predicts right too."""
    evaluation: Evaluation
    baselines: Baselines
    spikes: SpikeResult | None = None
    """None for a dense student."""
    information: InformationResult | None = None
    """What the spikes tell of the teacher; None for a dense student, and where no budget was given to it."""
    energy: EnergyResult | None = None
    temperature_final: float | None = None
    """Softmax temperature of the distillation terms at the last step; a learned one's belongs to the weights kept."""
    sample: Sample | None = None
    raster: Raster | None = None
    alarms: tuple[str, ...] = ()
    """What went wrong without ending the run, a sentence each."""
    schedule_notes: tuple[str, ...] = ()
    """What the schedules did, a sentence each."""


def load_result(path: Path) -> Result:
    """Read a ``result.json``.

    Raises:
        UserError: the file is missing, is not JSON, does not have the fields of `Result`, or holds a non-finite number.
    """
    return read_result(path, Result)
