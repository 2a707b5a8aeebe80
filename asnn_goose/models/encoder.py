"""The teacher of a classifier: any model of transformers that reads whole texts, by asset, folder or hub id.

Shapes: B texts, L tokens, E teacher channels, V classes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from asnn_goose.assets import ASSETS, fetch
from asnn_goose.errors import UserError
from asnn_goose.huggingface import import_transformers, quiet_transformers
from asnn_goose.models.pretrained import (
    block_list,
    capturing,
    model_fingerprint,
    refuse_train_mode,
    users_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POOLER = frozenset({"pooler"})
HEAD = POOLER | {"classifier", "pre_classifier", "score"}
"""Parts of the names of weights that stand between a body's states and its classes."""


class Encoder:
    """A frozen model in eval mode, with its tokenizer: a body, and classes where it was taught a task."""

    def __init__(self, name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", fingerprint: str):
        self.name = name
        self.fingerprint = fingerprint
        """Hexadecimal sha256 of the weight file (of the list of sha256s, if there are several)."""
        self.tokenizer = tokenizer
        self.model: Any = model.requires_grad_(False).eval()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        names = self.model.config.id2label
        return tuple(names[index] for index in sorted(names))

    @property
    def hidden_size(self) -> int:
        """E, channels of the residual stream."""
        return self.model.config.hidden_size

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.model.config.num_hidden_layers

    @property
    def embedding_weight_VE(self) -> Tensor:
        """Table of the tokens' embeddings, a float32 copy; one row per token, V the vocabulary here."""
        return self.model.get_input_embeddings().weight[: len(self.tokenizer)].float().clone()

    @torch.no_grad()
    def logits(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Class logits [B, V] of a model that :func:`load_classifier` read."""
        refuse_train_mode(self.name, self.model)
        return self.model(input_ids=input_ids, attention_mask=mask.long()).logits

    @torch.no_grad()
    def states(self, input_ids: Tensor, mask: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Layer -> what that block gives [B, L, E], counted from 1; 0: what goes into the first.

        Args:
            input_ids: int64 [B, L].
            mask: [B, L], false on padding, whose states hold anything.

        Raises:
            UserError: a layer that the model has not got.
        """
        refuse_train_mode(self.name, self.model)
        for layer in layers:
            if not 0 <= layer <= self.num_layers:
                raise UserError(f"teacher {self.name!r} has no layer {layer}: choose 0 to {self.num_layers}")
        found = block_list(self.model)
        blocks, last = (nn.ModuleList(), ()) if found is None else (found[1], (self.num_layers,))
        with capturing(blocks, last) as hidden:
            output = self.model(input_ids=input_ids, attention_mask=mask.long(), output_hidden_states=True)
        states = dict(enumerate(output.hidden_states)) | hidden
        return {layer: states[layer] for layer in layers}


def load_encoder(name_or_path: str) -> Encoder:
    """The body of that model, in float32: an asset, else a folder with a saved model, else a model id of the hub.

    Raises:
        UserError: no such model here and no way to the hub; weights that are missing.
    """
    # What pools the states for a head is not part of them, and not every body is saved with it.
    return Encoder(name_or_path, *_read(name_or_path, import_transformers().AutoModel, POOLER))


def load_classifier(name_or_path: str) -> Encoder:
    """The same with its classes, which it must have been taught.

    Raises:
        UserError: what :func:`load_encoder` raises; a model without a trained head.
    """
    auto_class = import_transformers().AutoModelForSequenceClassification
    return Encoder(name_or_path, *_read(name_or_path, auto_class, frozenset()))


def new_classifier(name_or_path: str, labels: Sequence[str]) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, str]":
    """That model under a head for ``labels``, which is to be trained; its tokenizer; its fingerprint.

    Raises:
        UserError: what :func:`load_encoder` raises.
    """
    names = dict(enumerate(labels))
    options = {"id2label": names, "label2id": {label: index for index, label in names.items()}}
    # A body that was taught another task comes with a head of another shape.
    options["ignore_mismatched_sizes"] = True
    auto_class = import_transformers().AutoModelForSequenceClassification
    return _read(name_or_path, auto_class, HEAD, **options)


def require_same_classes(student_labels: Sequence[str], teacher_labels: Sequence[str]) -> None:
    """Refuse a teacher whose classes are not the student's; names that have nothing in common are taken to agree.

    Raises:
        UserError: another number of classes, or the same names in another order.
    """
    if len(student_labels) != len(teacher_labels):
        raise UserError(
            f"the student tells {len(student_labels)} labels apart ({', '.join(student_labels)}) and the teacher "
            f"{len(teacher_labels)} ({', '.join(teacher_labels)}): choose a teacher that was trained on the task, "
            "since the number of labels must match"
        )
    for index, (ours, theirs) in enumerate(zip(student_labels, teacher_labels, strict=True)):
        if ours != theirs and ours in teacher_labels:
            raise UserError(
                f"label {index} is {ours!r} for the student and {theirs!r} for the teacher, which has {ours!r} "
                "elsewhere: save the teacher with the task's order of labels"
            )


def _source(name: str) -> str:
    """Folder of the asset, or of the user's; else the name, as an id of the hub."""
    if name in ASSETS:
        if ASSETS[name].kind != "encoder":
            encoders = [asset.name for asset in ASSETS.values() if asset.kind == "encoder"]
            raise UserError(
                f"teacher.name {name!r} is {ASSETS[name].what}, which does not classify: use {' or '.join(encoders)}, "
                "a folder or a model id of the hub"
            )
        return str(fetch(name))
    return str(users_folder(name, "encoder") or name)


def _read(
    name: str, auto_class: Any, may_be_new: frozenset[str], **options: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, str]":
    """Model in float32, tokenizer and fingerprint; weights whose names have no part in ``may_be_new`` must all be
    there."""
    from safetensors import SafetensorError

    source = _source(name)
    try:
        with quiet_transformers():
            model, report = auto_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
            tokenizer = import_transformers().AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".:")
        raise UserError(
            f"no model that reads whole texts can be read from teacher.name {name!r} ({reason}): check the name and "
            "the connection, or use minilm"
        ) from error
    # Transformers fills what is missing with random numbers and tells no more than a warning.
    absent = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    lacking = [key for key in absent if may_be_new.isdisjoint(key.split("."))]
    if lacking:
        raise UserError(
            f"teacher {name!r} lacks {len(lacking)} weights of a {type(model).__name__} (first: {lacking[0]}): use a "
            "model that was saved whole"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Decoders find a text's last token by it.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, model_fingerprint(name, source)
