"""What a classification experiment can be told: an encoder that learns a task, and a spiking classifier that learns
from it, in two stages."""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from asnn_goose.config.neuron import NeuronConfig
from asnn_goose.config.schema import DataConfig
from asnn_goose.config.settings import Settings
from asnn_goose.config.task import FinetuneConfig, TaskConfig


class EncoderConfig(Settings):
    """The encoder that is fine-tuned on the task and then imitated."""

    name: str = "minilm"
    """Name of an asset, a folder with a saved model, or a model id of the hub."""
    finetune: FinetuneConfig = FinetuneConfig()
    """How it learns the task."""


class ClassifierConfig(Settings):
    """The spiking RWKV-7 classifier."""

    layers: PositiveInt | None = None
    """Number of blocks; None: as many as the teacher has."""
    width: PositiveInt | None = None
    """Channels of the residual stream; None: the teacher's."""
    head_size: PositiveInt = 64
    """Channels per head of the recurrence; divides the width."""
    channel_mix_width: PositiveInt | None = None
    """Hidden channels of the channel mix; None: four times the width."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation in front of each mixer and of the classifiers."""
    reading: Literal["bidirectional", "last"] = "bidirectional"
    """bidirectional: every block reads the text forwards and backwards, and the classifier sees the tokens' mean state.
    last: forwards only, and it sees the last token's state."""
    exits: tuple[PositiveInt, ...] = ()
    """Blocks, counted from 1 and below the last, behind which a further classifier stands."""
    init: Literal["none", "embeddings"] = "embeddings"
    """What is taken from the pre-trained encoder at the start: nothing, or its table of embeddings."""
    tokenizer: str | None = None
    """Tokenizer folder or id; None: the teacher's. Another one leaves only classes to be compared."""
    neuron: NeuronConfig = NeuronConfig()
    """Neurons in front of the receptance, key, value, output and channel-mix key products."""
    hidden_neuron: NeuronConfig = NeuronConfig()
    """Neurons in front of the channel mix's last product, behind relu^2 or the gate."""
    wkv_backend: Literal["auto", "native", "fla", "torch_chunk", "reference"] = "auto"
    """Form of the WKV-7 recurrence, as in a language model's student."""
    wkv_chunk: PositiveInt = 32
    """Tokens per chunk of the chunked form."""


class GeneralConfig(Settings):
    """The first stage: every block's states against the pre-trained encoder's on text without labels."""

    tokens: PositiveInt = 1_000_000
    """Training tokens, special ones included."""
    batch_size: PositiveInt = 16
    """Pieces of text per optimiser step."""
    window: int = Field(default=64, ge=4)
    """Tokens of a piece, special ones included."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    lr_end: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak (cosine)."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the stage in which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decoupled weight decay, on matrices only."""
    data: DataConfig = DataConfig()
    """The text; of its documents the training split is read."""

    def of_length(self, multiple: float) -> "GeneralConfig":
        """The same stage on ``multiple`` times as many tokens, one at least."""
        return self.model_copy(update={"tokens": max(1, round(multiple * self.tokens))})


class ClassLosses(Settings):
    """Weights of the second stage's terms; the total is their weighted sum. A term of weight 0 is not computed."""

    ce: NonNegativeFloat = 0.1
    """Cross-entropy with the labels, nats, mean over texts."""
    kl: NonNegativeFloat = 1.0
    """T^2 KL(teacher || student) of the classes, nats, mean over texts."""
    features: NonNegativeFloat = 0.1
    """Squared error of each block's states behind a linear map with a LayerNorm, mean over channels, tokens, blocks."""
    embeddings: NonNegativeFloat = 0.1
    """Squared difference of the two tables of embeddings, mean over their elements."""
    temperature: PositiveFloat = 1.0
    """T of the KL."""


class ExitLosses(Settings):
    """What shallow classifiers learn from the labels and from the deepest one (losses/classification.py)."""

    ce: NonNegativeFloat = 0.9
    """Weight of the cross-entropy with the labels."""
    kl: NonNegativeFloat = 0.1
    """Weight of T^2 KL(deepest || shallow)."""
    hint: NonNegativeFloat = 0.0
    """Weight of the squared difference between the states that the two classifiers see."""
    temperature: PositiveFloat = 3.0
    """T of the KL."""


class TaskTrainConfig(Settings):
    """How long and how fast the second stage trains."""

    devices: ClassVar[int] = 1
    scale: Literal["smoke", "cpu", "gpu"]
    """Name of this group, as --scale gives it."""
    epochs: PositiveFloat = 2.0
    """Passes over the training texts; rounded to whole optimiser steps."""
    length: float = Field(default=1.0, gt=0.0, le=1e6)
    """Length of the run as a multiple of what epochs says."""
    general_length: float = Field(default=1.0, gt=0.0, le=1e6)
    """Length of the first stage as a multiple of what general.tokens says."""
    batch_size: PositiveInt = 16
    """Texts per optimiser step."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    lr_end: float = Field(default=0.05, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak (cosine)."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the steps during which the learning rate rises."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.98, ge=0.0, lt=1.0)
    """AdamW's decay of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decoupled weight decay, on matrices only."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of matrix products; state, softmax, losses and optimiser stay float32. auto: bfloat16 where faster."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    log_every: PositiveInt = 10
    """Optimiser steps between two lines of metrics.jsonl."""
    eval_every: PositiveInt = 100
    """Optimiser steps between two looks at validation."""
    checkpoint_every: PositiveInt = 100
    """Optimiser steps between two checkpoints."""
    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    """Weights & Biases; auto: online for a user who is logged in, else offline."""


class ClassifierExperiment(Settings):
    """One version of a classifier's distillation: its parent plus one change."""

    version: str
    """Short name, also the folder of its runs and reports."""
    parent: str | None = None
    """Version that this one changes."""
    question: str
    """What the run is to answer, as one sentence."""
    change: str
    """The one difference from the parent, as one sentence."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of initialisation and order of the texts."""
    task: TaskConfig
    teacher: EncoderConfig
    student: ClassifierConfig
    general: GeneralConfig | None = None
    """The first stage; None: straight to the task."""
    losses: ClassLosses
    exit_losses: ExitLosses = ExitLosses()
    """Terms of the shallow classifiers, where student.exits names any."""
    train: TaskTrainConfig

    @model_validator(mode="after")
    def _terms_fit(self):
        losses, student = self.losses, self.student
        if not losses.ce + losses.kl > 0:
            raise ValueError("losses.ce and losses.kl are both 0, so nothing teaches the classes: give one a weight")
        if student.tokenizer is not None:
            apart = {"losses.features": losses.features, "losses.embeddings": losses.embeddings}
            for key, weight in apart.items():
                if weight:
                    raise ValueError(
                        f"{key} compares token by token, and student.tokenizer {student.tokenizer!r} cuts others than "
                        "the teacher: set it to 0, or student.tokenizer to null"
                    )
            if self.general is not None or student.init != "none":
                raise ValueError(
                    f"with student.tokenizer {student.tokenizer!r} nothing of the encoder's tokens fits: set general "
                    "to null and student.init to none"
                )
        for key, neuron in (("neuron", student.neuron), ("hidden_neuron", student.hidden_neuron)):
            if neuron.sparsity is not None:
                raise ValueError(
                    f"student.{key}.sparsity {neuron.sparsity} is set from the text of a language model: set it to null"
                )
        if losses.embeddings and student.width is not None:
            raise ValueError("losses.embeddings compares tables of one width: set student.width to null, or it to 0")
        return self
