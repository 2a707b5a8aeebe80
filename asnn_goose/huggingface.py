"""The transformers library: imported late, kept quiet, and explained where the installation breaks its import."""

import contextlib
import errno
import io
import logging
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from asnn_goose.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def import_transformers() -> ModuleType:
    """The ``transformers`` package, with its model classes known to be importable.

    Raises:
        UserError: torchvision or torchaudio was built for another torch. Transformers imports them without need, and
            reports only that it "could not import module" of whatever class was asked for.
    """
    try:
        import transformers
        import transformers.modeling_utils  # the lazy package would put the failure off until a model is loaded
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        story = "".join(traceback.format_exception(error))
        for package in ("torchvision", "torchaudio"):
            if package in story:
                raise UserError(
                    f"the installed {package} does not fit the installed torch and breaks transformers: "
                    "run `pip uninstall torchvision torchaudio`, which are not needed here"
                ) from error
        raise
    return transformers


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers and the hub's client while a model is read.

    Whatever else is written on stderr meanwhile is dropped too, since some of their bars cannot be switched off; log
    handlers that were set up before keep their stream.
    """
    from transformers.utils import logging as transformers_logging

    hub_logger = logging.getLogger("huggingface_hub")
    verbosity, hub_level = transformers_logging.get_verbosity(), hub_logger.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logger.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """``tokenizer.save_pretrained``, where a full disk is the OSError that it is everywhere else."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # The tokenizers library raises the bare Exception, with the system's words.
        if f"(os error {errno.ENOSPC})" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
