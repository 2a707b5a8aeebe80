"""Everything a run needs to go on bit for bit, in one file, replaced in one step."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from asnn_goose.errors import UserError
from asnn_goose.reporting.run_folder import replacing

NAME = "last.pt"
BEST = "best.pt"
PARTS = ("fingerprint", "parameters", "optimisers", "parts", "progress", "random")
"""What ``last.pt`` holds."""


class Stateful(Protocol):
    """A part of a run, beside weights and optimisers, that remembers something."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclass
class Progress:
    """What the loop counts, besides weights and optimisers."""

    step: int = 0
    """Optimiser steps taken."""
    tokens: int = 0
    """Training tokens seen, all processes together."""
    skipped: int = 0
    """Steps that were left out, since a loss or the gradient was not finite."""
    stopped: bool = False
    """Whether early stopping has ended the training."""
    train_seconds: float = 0.0
    """Time spent in training steps over all sessions."""
    wall_seconds: float = 0.0
    """Time spent in the training of earlier sessions, evaluations included, preparation not."""


def save(
    folder: Path,
    module: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    parts: Mapping[str, Stateful],
    progress: Progress,
    fingerprint: str,
) -> Path:
    """Write ``last.pt``: weights, optimisers, the parts' states, random states, counters, the run's fingerprint.

    Raises:
        UserError: the disk is full; the former checkpoint stays.
    """
    device = _device(module)
    content = {
        "fingerprint": fingerprint,
        "parameters": _trained(module),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "progress": asdict(progress),
        "random": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        },
    }
    return _write(content, folder / NAME)


def save_best(folder: Path, module: nn.Module) -> Path:
    """Write ``best.pt``, the trained weights alone; errors as of :func:`save`."""
    return _write(_trained(module), folder / BEST)


def load_best(folder: Path, module: nn.Module) -> None:
    """Put the weights of ``best.pt`` back.

    Raises:
        UserError: code with other parameters wrote it.
    """
    _copy(torch.load(folder / BEST, weights_only=True, map_location="cpu"), module, folder / BEST)


def _device(module: nn.Module) -> torch.device:
    """Where it draws: of all the GPUs that a process sees, one that another process may number otherwise."""
    return next(module.parameters()).device


def _trained(module: nn.Module) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    # Every other buffer is as the start made it.
    return parameters | {name: b for name, b in module.named_buffers() if name.startswith("temperature.")}


def _copy(values: Mapping[str, Tensor], module: nn.Module, path: Path) -> None:
    """Put back what lay in ``path``; a buffer that it does not hold stays as it is."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if strange := (trained - values.keys()) | (values.keys() - tensors.keys()):
        raise UserError(
            f"{path} was written by code whose parameters have other names (first: {min(strange)}): resume with the "
            "commit in provenance.json, or start a new run"
        )
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


def _write(content: Any, path: Path) -> Path:
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch reports a full disk as a position that it did not expect; what the file said is the context.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    return path


def load(
    folder: Path,
    module: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    parts: Mapping[str, Stateful],
    fingerprint: str,
) -> Progress:
    """Put everything back as :func:`save` found it.

    Parameters that do not train (the teacher's embedding) are not in the file: they come from the teacher again, whose
    hash is part of the fingerprint.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or it belongs to another configuration or to code with
            other parameters.
    """
    path = folder / NAME
    if not path.exists():
        raise UserError(
            f"{path} does not exist: the run stopped before its first checkpoint; remove {folder.parent} and start it "
            "again without --resume"
        )
    try:
        # The random states are plain Python and numpy objects, which weights_only refuses; the file is the user's own.
        content: dict[str, Any] = torch.load(path, weights_only=False, map_location="cpu")
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}): start the run again without --resume, in another folder"
        ) from error
    if not isinstance(content, dict) or not set(PARTS) <= content.keys():
        raise UserError(f"{path} holds no checkpoint: start the run again without --resume, in another folder")
    if content["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} belongs to a run with fingerprint {content['fingerprint'][:8]}, and this configuration has "
            f"{fingerprint[:8]}: resume with the flags of that run, or start a new one"
        )
    _copy(content["parameters"], module, path)
    for optimiser, state in zip(optimisers, content["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    for name, part in parts.items():
        part.load_state_dict(content["parts"][name])
    random.setstate(content["random"]["python"])
    np.random.set_state(content["random"]["numpy"])
    torch.set_rng_state(content["random"]["torch"])
    if content["random"]["cuda"] is not None:
        torch.cuda.set_rng_state(content["random"]["cuda"], _device(module))
    return Progress(**content["progress"])
