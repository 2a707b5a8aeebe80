"""The student's tokenizer, which must have the teacher's tokens under the teacher's ids."""

import json
import logging
from typing import TYPE_CHECKING

from asnn_goose.assets import ASSETS, fetch
from asnn_goose.errors import UserError
from asnn_goose.huggingface import import_transformers, quiet_transformers
from asnn_goose.models.pretrained import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of that name: an asset's, a saved folder's, or that of a model id of the hub.

    Raises:
        UserError: there is none.
    """
    transformers = import_transformers()
    if name_or_path in ASSETS and ASSETS[name_or_path].kind == "encoder":
        source = str(fetch(name_or_path))
    else:
        source = str(local_folder(name_or_path, "student.tokenizer") or name_or_path)
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"student.tokenizer {name_or_path!r} cannot be read ({str(error).strip().splitlines()[0]}): "
            "set it to null for the teacher's own"
        ) from error


def require_same_vocabulary(
    teacher_tokenizer: "PreTrainedTokenizerBase", student_tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Refuse a student whose tokens or ids are not the teacher's: a divergence per position compares equal ids.

    Other rules for splitting a text into those tokens are warned of: the teacher then reads a text as it was not taught
    to.

    Raises:
        UserError: the maps from token to id differ.
    """
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours == theirs:
        if _rules(student_tokenizer) != _rules(teacher_tokenizer):
            _log.warning(
                "student.tokenizer has the teacher's tokens but other rules for splitting text into them, and both "
                "models read its tokens: set it to null for the teacher's own"
            )
        return
    token = min((token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)), key=repr)
    raise UserError(
        f"student.tokenizer ({len(ours)} tokens) and the teacher's ({len(theirs)}) differ, for one at token {token!r} "
        f"with id {ours.get(token)} and {theirs.get(token)}: set student.tokenizer to null for the teacher's own, or "
        "choose a teacher with the student's vocabulary"
    )


def _rules(tokenizer: "PreTrainedTokenizerBase") -> tuple[object, ...]:
    """What decides how a fast tokenizer splits text, its vocabulary apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ()
    facts = json.loads(backend.to_str())
    return facts["normalizer"], facts["pre_tokenizer"], facts["model"].get("merges")
