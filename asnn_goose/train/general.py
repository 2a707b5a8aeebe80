"""The first stage of a classifier: its blocks' states against a pre-trained encoder's, on text without labels, once for
all tasks and versions that start alike.

Shapes: B pieces of text, L tokens.
"""

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from asnn_goose.cache import cache_root, is_whole, locked, replacing, seal
from asnn_goose.config.classifier import ClassifierConfig, GeneralConfig
from asnn_goose.data.corpora import load_corpus, split_documents
from asnn_goose.data.labelled_texts import LabelledTexts, TrainingTexts
from asnn_goose.data.unlabelled_texts import pieces
from asnn_goose.errors import UserError
from asnn_goose.models.encoder import Encoder
from asnn_goose.train.class_targets import texts_digest
from asnn_goose.train.classifier_objective import ClassifierDistillation
from asnn_goose.train.engine import Engine
from asnn_goose.train.optimisers import plain_adamw, set_warmup_cosine
from asnn_goose.train.progress import watch

_log = logging.getLogger(__name__)

VERSION = 2
"""Enters the key; one more whenever the same settings give other weights."""
CLIP = 1.0
"""Largest global norm of the gradient."""
LAST = 20
"""Steps that the error at the end is the mean of."""


@dataclass(frozen=True)
class General:
    """What became of the stage."""

    tokens: int
    """Read, special ones included."""
    seconds: float
    """Of the run that computed it."""
    first: float
    """Squared error of the features at the first step, before its update."""
    last: float
    """Mean over the last steps."""

    def sentence(self) -> str:
        """For the report."""
        return (
            f"First stage: the blocks' states were matched to the pre-trained encoder's on {self.tokens:,} tokens of "
            f"text without labels ({self.seconds:.0f} s, once): squared error {self.first:.3g} to {self.last:.3g}."
        )


def general_texts(config: GeneralConfig, encoder: Encoder) -> tuple[LabelledTexts, str]:
    """The pieces that the stage reads once, and the corpus's key."""
    corpus = load_corpus(config.data)
    splits = split_documents(corpus, config.data.validation_fraction, config.data.test_fraction)
    return pieces(splits["train"], encoder.tokenizer, config.window, config.tokens), corpus.key


def learn_generally(
    module: ClassifierDistillation,
    encoder: Encoder,
    texts: LabelledTexts,
    config: GeneralConfig,
    student: ClassifierConfig,
    engine: Engine,
) -> General:
    """Take body and projectors through the stage, or give them the weights that it left behind once before.

    Args:
        module: at its start; its classifiers are left alone.
        encoder: pre-trained, not fine-tuned.
        texts: what :func:`general_texts` gives.
    """
    told = config.model_dump(exclude={"data"})
    shape = student.model_dump(mode="json", exclude={"exits", "tokenizer"})
    facts = [VERSION, encoder.fingerprint, told, shape, engine.precision]
    folder = cache_root() / "general" / texts_digest(facts, texts)
    with locked(folder):
        if not is_whole(folder):
            _log.info("first stage: %d pieces of text, %d tokens (once)", len(texts.ids), int(texts.lengths_N.sum()))
            stage = _train(module, encoder, texts, config, engine)
            _write(folder, module, stage)
        # Also after computing, so that what a run starts from does not depend on whether it was the first.
        weights = load_file(folder / "body.safetensors")
        for name, tensor in _body(module).items():
            tensor.copy_(weights[name])
        return General(**json.loads((folder / "stage.json").read_text()))


def _body(module: ClassifierDistillation) -> dict[str, Tensor]:
    """What the stage trains, by name: all of the student below its classifiers, and the projectors."""
    parts = {"model": module.student.model, "both_ways": module.student.both_ways, "projectors": module.projectors}
    return {f"{part}.{name}": p.detach() for part, each in parts.items() for name, p in each.named_parameters()}


def _write(folder: Path, module: ClassifierDistillation, stage: dict[str, float]) -> None:
    with replacing(folder) as part:
        part.mkdir()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in _body(module).items()}
        (part / "body.safetensors").write_bytes(save(tensors))
        (part / "stage.json").write_text(json.dumps(stage))
        seal(part)


def _train(
    module: ClassifierDistillation, encoder: Encoder, texts: LabelledTexts, config: GeneralConfig, engine: Engine
) -> dict[str, float]:
    nn.Module.to(module, engine.device)
    encoder.model.to(engine.device)
    names = set(_body(module))
    named = [(name, p) for name, p in module.named_parameters() if name.removeprefix("student.") in names]
    trained = [p for _, p in named]
    optimiser = plain_adamw(named, config.lr, config.weight_decay, betas=(0.9, 0.98))
    batches = TrainingTexts(texts, config.batch_size, seed=0)
    steps, began, errors = batches.batches_per_epoch, time.monotonic(), []
    module.train()
    for step in watch(range(steps), "first stage"):
        set_warmup_cosine(optimiser, config, step, steps)
        ids, mask = (x.to(engine.device) for x in next(batches)[:2])
        with engine.autocast():
            states = encoder.states(ids, mask, sorted(set(module.layers)))
            hidden = module.student(ids, mask, output_hidden_states=True).hidden_states
        error = module.features(hidden, states, mask)
        errors.append(error.item())
        if not math.isfinite(errors[-1]):
            raise UserError(f"the first stage broke down with an error of {errors[-1]}: lower general.lr {config.lr}")
        error.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // 20) == 0:
            _log.info("first stage, step %d/%d  squared error %.4g", step + 1, steps, errors[-1])
    last = errors[-LAST:]
    return {
        "tokens": int(texts.lengths_N.sum()),
        "seconds": time.monotonic() - began,
        "first": errors[0],
        "last": sum(last) / len(last),
    }
