"""What a classifier says of every text of a split, computed once.

Shapes: N texts of a split, V classes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from asnn_goose.cache import cache_root, is_whole, locked, replacing, seal
from asnn_goose.data.labelled_texts import LabelledBatch, LabelledTexts
from asnn_goose.models.encoder import Encoder
from asnn_goose.train.engine import Engine

VERSION = 1
"""Enters the key; one more whenever the same inputs give something else."""
EVALUATION_BATCH = 32
"""Texts per forward pass."""

Watch = Callable[[Sequence[LabelledBatch]], Iterable[LabelledBatch]]
"""Wraps a loop over batches, to show progress."""


def class_logits(
    compute: Callable[[Tensor, Tensor], Tensor], texts: LabelledTexts, classes: int, engine: Engine, watch: Watch = iter
) -> Tensor:
    """float32 [N, V], on the CPU, row n of text n; ``compute`` goes from (input_ids, mask) to logits."""
    logits_NV = torch.empty(len(texts.ids), classes)
    with torch.no_grad(), engine.autocast():
        for batch in watch(texts.batches(EVALUATION_BATCH)):
            logits_BV = compute(batch.input_ids.to(engine.device), batch.mask.to(engine.device))
            logits_NV[batch.rows] = logits_BV.float().cpu()
    return logits_NV


def stored_class_logits(teacher: Encoder, texts: LabelledTexts, engine: Engine, watch: Watch = iter) -> Tensor:
    """:func:`class_logits` of a teacher, from the store if they are there and whole, else computed and stored."""
    facts = [VERSION, teacher.fingerprint, engine.precision, len(teacher.labels)]
    folder = cache_root() / "targets" / f"classes-{texts_digest(facts, texts)}"
    with locked(folder):
        if not is_whole(folder):
            teacher.model.to(engine.device)  # pyright: ignore[reportArgumentType]
            logits_NV = class_logits(teacher.logits, texts, len(teacher.labels), engine, watch)
            with replacing(folder) as part:
                part.mkdir()
                (part / "logits.safetensors").write_bytes(save({"logits": logits_NV}))
                seal(part)
        return load_file(folder / "logits.safetensors")["logits"]


def texts_digest(facts: object, *splits: LabelledTexts) -> str:
    """Hexadecimal sha256 of ``facts``, which json can write, and of every token and label of the splits."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for texts in splits:
        digest.update(texts.lengths_N.tobytes() + texts.labels_N.tobytes())
        for ids in texts.ids:
            digest.update(ids.tobytes())
    return digest.hexdigest()
