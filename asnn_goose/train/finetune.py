"""A teacher learns its task: an encoder is fine-tuned on labelled texts once, and kept for every run after.

Shapes: N texts of a split, C classes.
"""

import copy
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save

from asnn_goose.cache import cache_root, is_whole, locked, replacing, seal
from asnn_goose.config.task import FinetuneConfig, TaskConfig
from asnn_goose.data.classification import Task
from asnn_goose.data.corpora import SPLITS
from asnn_goose.data.labelled_texts import LabelledTexts, TrainingTexts, tokenise_texts
from asnn_goose.errors import UserError
from asnn_goose.evaluation.classification import Scored, score
from asnn_goose.huggingface import save_tokenizer
from asnn_goose.models.encoder import new_classifier
from asnn_goose.train.class_targets import class_logits, texts_digest
from asnn_goose.train.engine import Engine
from asnn_goose.train.optimisers import plain_adamw, set_warmup_cosine
from asnn_goose.train.progress import watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

VERSION = 1
"""Enters the key; one more whenever the same settings give another classifier."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the training texts."""

    loss: float
    """Cross-entropy in nats, mean over the epoch's steps, with dropout."""
    validation_accuracy: float
    """After the pass, in [0, 1]."""
    seconds: float
    """Of training and validation, by the run that computed it."""


@dataclass(frozen=True)
class Finetuned:
    """A classifier that was fine-tuned, and how well it knows its task."""

    folder: Path
    """A transformers model with its tokenizer, as load_classifier reads it."""
    epochs: tuple[Epoch, ...]
    best: int
    """The epoch, counted from 1, whose weights were kept: the first with the highest validation accuracy."""
    validation: Scored
    test: Scored
    """Of the kept weights; the test split is read after they are chosen."""
    truncated: dict[str, int]
    """Split -> texts longer than the window."""


def finetuned(
    name: str, task: Task, settings: TaskConfig, config: FinetuneConfig, seed: int, engine: Engine
) -> Finetuned:
    """The encoder ``name`` with classes for ``task``, from the cache or trained into it.

    All weights move, under AdamW with warm-up and cosine, on the mean cross-entropy of a batch.

    Raises:
        UserError: an encoder that cannot be read, a window longer than it reads, a loss that is not finite, a
            validation accuracy below ``least_accuracy``.
    """
    # A run that finds the classifier must go on with the same random numbers as the one that trains it.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, tokenizer, fingerprint = new_classifier(name, task.labels)
        texts = {split: tokenise_texts(task.splits[split], tokenizer, settings.window) for split in SPLITS}
        recipe = config.model_dump(exclude={"least_accuracy"})
        facts = [VERSION, fingerprint, task.labels, settings.window, recipe, seed, engine.precision]
        digest = texts_digest(facts, *texts.values())
        folder = cache_root() / "classifiers" / digest
        with locked(folder):
            if not is_whole(folder):
                _log.info("fine-tuning %s on task %s (once): %s", name, task.name, _sizes(texts))
                record = _train(model, texts, config, seed, engine)
                with replacing(folder) as part:
                    part.mkdir()
                    model.config.save_pretrained(part)
                    tensors = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
                    # Not save_pretrained: a full disk is an OSError here, as the cache expects.
                    (part / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
                    save_tokenizer(tokenizer, part)
                    (part / "finetuned.json").write_text(json.dumps(record))
                    seal(part, encoder=name, task=task.name)
            found = _read(folder)
    reached = found.validation.accuracy
    _log.info("teacher %s on task %s: validation accuracy %.4f", name, task.name, reached)
    if reached < config.least_accuracy:
        raise UserError(
            f"teacher {name!r} reaches a validation accuracy of {reached:.4f} on task {task.name!r}, below "
            f"least_accuracy {config.least_accuracy}: raise epochs, change lr, or choose another encoder"
        )
    return found


def _sizes(texts: dict[str, LabelledTexts]) -> str:
    return ", ".join(f"{name} {len(part.ids):,} texts ({part.truncated:,} cut)" for name, part in texts.items())


def _train(
    model: "PreTrainedModel", texts: dict[str, LabelledTexts], config: FinetuneConfig, seed: int, engine: Engine
) -> dict:
    """Train in place and leave the best epoch's weights; what ``finetuned.json`` keeps."""
    torch.nn.Module.to(model, engine.device)
    batches = TrainingTexts(texts["train"], config.batch_size, seed)
    optimiser = plain_adamw(model.named_parameters(), config.lr, config.weight_decay)
    steps, step = config.epochs * batches.batches_per_epoch, 0
    epochs: list[Epoch] = []
    best, best_weights = 0, {}
    for number in range(1, config.epochs + 1):
        begun, losses = time.monotonic(), []
        model.train()
        for _ in watch(range(batches.batches_per_epoch), f"fine-tuning, epoch {number}/{config.epochs}"):
            set_warmup_cosine(optimiser, config, step, steps)
            losses.append(_step(model, batches, optimiser, config, engine))
            step += 1
        seen = _scored(model, texts["validation"], engine)
        loss = sum(losses) / len(losses)
        epochs.append(Epoch(loss, seen.accuracy, time.monotonic() - begun))
        _log.info("epoch %d/%d  loss %.4g  validation accuracy %.4f", number, config.epochs, loss, seen.accuracy)
        if not best or seen.accuracy > epochs[best - 1].validation_accuracy:
            best, best_weights = number, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    confusions = {name: _scored(model, texts[name], engine).confusion_CC.tolist() for name in ("validation", "test")}
    truncated = {name: part.truncated for name, part in texts.items()}
    return {"epochs": [asdict(epoch) for epoch in epochs], "best": best, "truncated": truncated, **confusions}


def _step(model, batches: TrainingTexts, optimiser: torch.optim.Optimizer, config: FinetuneConfig, engine: Engine):
    """One update; returns its loss."""
    batch = next(batches)
    ids, mask, labels = (x.to(engine.device) for x in batch[:3])
    with engine.autocast():
        logits_BC = model(input_ids=ids, attention_mask=mask.long()).logits
    loss = torch.nn.functional.cross_entropy(logits_BC.float(), labels)
    if not math.isfinite(loss.item()):
        raise UserError(f"fine-tuning broke down with a loss of {loss.item()}: lower the learning rate {config.lr}")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss.item()


def _scored(model, texts: LabelledTexts, engine: Engine) -> Scored:
    """The model's predictions of a split."""
    classes = model.config.num_labels
    model.eval()
    logits_NC = class_logits(lambda ids, mask: model(ids, attention_mask=mask.long()).logits, texts, classes, engine)
    return score(texts.labels_N, logits_NC.argmax(1).numpy(), classes)


def _read(folder: Path) -> Finetuned:
    record = json.loads((folder / "finetuned.json").read_text())
    return Finetuned(
        folder=folder,
        epochs=tuple(Epoch(**epoch) for epoch in record["epochs"]),
        best=record["best"],
        validation=Scored(np.array(record["validation"])),
        test=Scored(np.array(record["test"])),
        truncated=record["truncated"],
    )
