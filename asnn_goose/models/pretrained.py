"""A causal language model as it was saved: found by name, read whole or refused, with its fingerprint."""

import difflib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from asnn_goose.assets import ASSETS
from asnn_goose.cache import remembered_sha256
from asnn_goose.errors import UserError
from asnn_goose.huggingface import import_transformers, quiet_transformers
from asnn_goose.models.gguf import dequantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def local_folder(name: str, key: str = "teacher.name") -> Path | None:
    """Folder of the teacher that is an asset, or of the user's; None for what can only be an id of the hub.

    Args:
        key: the setting that has the name, for the error.

    Raises:
        UserError: an asset of another kind, a path that is not there, a misspelt asset.
    """
    if name in ASSETS:
        if ASSETS[name].kind != "teacher":
            raise UserError(
                f"{key} {name!r} is {ASSETS[name].what}, not a causal language model: use smollm2, a folder or "
                "a model id of the hub"
            )
        return dequantised(name)
    return users_folder(name, "teacher", key)


def users_folder(name: str, kind: str, key: str = "teacher.name") -> Path | None:
    """Folder of the user's with a saved model; None for what can only be an id of the hub.

    Args:
        kind: of the assets for which the name may be misspelt.
        key: the setting that has the name, for the error.

    Raises:
        UserError: a path that is not there, a misspelt asset.
    """
    name = str(name)
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key} {name!r} is a folder that does not exist: give one with a saved model")
    # Asking the hub takes up to a minute without a network: too long for a slip of the finger.
    near = difflib.get_close_matches(name, [asset.name for asset in ASSETS.values() if asset.kind == kind], cutoff=0.8)
    if near:
        raise UserError(f"{key} {name!r} is neither an asset nor a folder: did you mean {near[0]!r}?")
    return None


def read_causal_lm(name: str, source: str, dtype: torch.dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of ``source``, a folder or a hub id; the hub is asked for what is not on the disk.

    Args:
        name: what the user called it, for the error.

    Raises:
        UserError: nothing there or no way to it; not a causal language model; a missing weight or tokenizer.
    """
    from safetensors import SafetensorError

    transformers = import_transformers()
    is_folder = Path(source).is_dir()

    def read(local_files_only: bool):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, local_files_only=local_files_only
        )
        return model, report, transformers.AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)

    try:
        with quiet_transformers():
            try:
                model, report, tokenizer = read(local_files_only=True)
            except OSError:
                if is_folder:
                    raise
                logger.info("fetching model %s from the hub", name)
                model, report, tokenizer = read(local_files_only=False)
    # A damaged tokenizer.json is a KeyError, and weights of another shape than config.json says a RuntimeError.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".:")
        if is_folder:
            raise UserError(
                f"{name!r} is a folder without a whole causal language model ({reason}): save one there with "
                "save_pretrained, its tokenizer too"
            ) from error
        raise UserError(
            f"{name!r} is neither an asset nor a folder, and no causal language model of that id came from the hub or "
            f"its cache ({reason}): check the name and the connection, or use smollm2"
        ) from error
    # Transformers fills what is missing with random numbers and tells no more than a warning.
    absent = sorted(report["missing_keys"])
    if absent:
        raise UserError(
            f"{name!r} lacks {len(absent)} weights of a {type(model).__name__} (first: {absent[0]}): use a model that "
            "was saved whole, as a causal language model"
        )
    return model, tokenizer


def model_fingerprint(name: str, source: str) -> str:
    """Hexadecimal sha256 of the weights, and of config.json unless the model is an asset, whose file is pinned.

    The same weights under another epsilon, rotary base or scale of the logits are another model.

    Raises:
        UserError: no weight file of a known name.
    """
    weights = _weights_fingerprint(name, source)
    if name in ASSETS:
        return weights
    return hashlib.sha256((weights + remembered_sha256(_folder(source) / "config.json")).encode()).hexdigest()


def _weights_fingerprint(name: str, source: str) -> str:
    """Hexadecimal sha256 of the weight file; of the files' sha256s, in the order of their names, if there are several.

    Raises:
        UserError: no weight file of a known name.
    """
    digests = [remembered_sha256(path) for path in _weight_files(name, source)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _folder(source: str) -> Path:
    """Where the files of a folder, or of a hub id that is in the hub's cache, lie."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(source, "config.json"))).parent


def _weight_files(name: str, source: str) -> list[Path]:
    folder = _folder(source)
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).is_file():
            return [folder / file]
        index = folder / f"{file}.index.json"
        if index.is_file():
            return [folder / part for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise UserError(f"{name!r} has no model.safetensors or pytorch_model.bin in {folder}: save it with save_pretrained")


def refuse_train_mode(name: str, model: nn.Module) -> None:
    """Raise RuntimeError for a teacher in train mode."""
    if model.training:
        raise RuntimeError(f"teacher {name!r} was put in train mode: its dropout would change the targets")


def block_list(model: "PreTrainedModel") -> tuple[nn.Module, nn.ModuleList] | None:
    """The outermost list with as many entries as there are layers, and the module that holds it; None without one."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == layers:
                return parent, child
    return None


@contextmanager
def capturing(blocks: nn.ModuleList, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Within it a pass fills the mapping with the residual stream at each layer: 0 is what goes into the first block.

    Hooks, since the last of transformers' own hidden_states has gone through a final norm already where there is one.
    """
    hidden: dict[int, Tensor] = {}
    hooks = [_capture(blocks, layer, hidden) for layer in set(layers)]
    try:
        yield hidden
    finally:
        for hook in hooks:
            hook.remove()


def _capture(blocks: nn.ModuleList, layer: int, into: dict[int, Tensor]) -> RemovableHandle:
    def before(_block, arguments, keywords):
        into[layer] = arguments[0] if arguments else keywords["hidden_states"]

    def after(_block, _arguments, output):
        into[layer] = output[0] if isinstance(output, tuple) else output

    if layer == 0:
        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return blocks[layer - 1].register_forward_hook(after)
