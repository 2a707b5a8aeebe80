"""Labelled texts to classify, and how an encoder is taught them."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from asnn_goose.config.settings import Settings


class TaskConfig(Settings):
    """The labelled texts, and how they are split and cut."""

    source: Literal["asset", "files", "hub"] = "asset"
    """asset: a task that comes in a wheel. files: a file or folder of the user. hub: a data set of the hub."""
    name: str = "reuters_r8"
    """Name of the asset, or id of the hub's data set."""
    path: Path | None = None
    """For source files: one .csv, .tsv or .jsonl file, or a folder with train and test, and maybe validation."""
    text_field: str = "text"
    """Field that holds the text in the user's and the hub's records."""
    label_field: str = "label"
    """Field that holds the label there: text or a whole number."""
    group_field: str | None = None
    """Field whose value is shared by records that must not be divided between splits; None: each is on its own, as is a
    record whose field is empty."""
    window: int = Field(default=64, ge=4)
    """Tokens of a text that are read, special ones included; what a longer text has beyond them is cut off."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=0.5)
    """Share of the training texts held out for validation, chosen by a hash, where no validation split is given."""
    test_fraction: float = Field(default=0.15, gt=0.0, lt=0.5)
    """Share of all texts held out for the final test, chosen by the same hash, where no test split is given."""

    @model_validator(mode="after")
    def _path_goes_with_files(self):
        if (self.source == "files") != (self.path is not None):
            raise ValueError("path must be given with source files, and only there")
        return self


class FinetuneConfig(Settings):
    """How an encoder learns a task before it teaches it (train/finetune.py)."""

    epochs: PositiveInt = 2
    """Passes over the training texts; the weights of the best one, by validation accuracy, are kept."""
    batch_size: PositiveInt = 16
    """Texts per optimiser step."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate of AdamW."""
    lr_end: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak (cosine)."""
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps during which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decoupled weight decay, on matrices only."""
    clip: PositiveFloat = 1.0
    """Largest global norm of the gradient."""
    least_accuracy: float = Field(default=0.0, ge=0.0, le=1.0)
    """Validation accuracy that the teacher must reach, or the run ends with an error; 0: any."""
