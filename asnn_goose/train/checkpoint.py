"""Everything a run needs to go on bit for bit, in one file, replaced in one step."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from asnn_goose.data.loader import TrainingWindows
from asnn_goose.errors import UserError
from asnn_goose.reporting.run_folder import replacing
from asnn_goose.train.term_gradients import Balancer

NAME = "last.pt"


@dataclass
class Progress:
    """What the loop counts, besides weights and optimisers."""

    step: int = 0
    """Optimiser steps taken."""
    tokens: int = 0
    """Training tokens seen, all processes together."""
    skipped: int = 0
    """Steps that were left out, since a loss or the gradient was not finite."""
    train_seconds: float = 0.0
    """Time spent in training steps over all sessions."""
    wall_seconds: float = 0.0
    """Time spent in earlier sessions, everything included."""


def save(
    folder: Path,
    module: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    windows: TrainingWindows,
    balancer: Balancer,
    progress: Progress,
    fingerprint: str,
) -> Path:
    """Write ``last.pt``: weights, optimisers, data position, balance, random states, counters, the run's fingerprint.

    Raises:
        UserError: the disk is full; the former checkpoint stays.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    content = {
        "fingerprint": fingerprint,
        "parameters": {name: p.detach() for name, p in trained.items()},
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "windows": windows.state_dict(),
        "balancer": balancer.state_dict(),
        "progress": asdict(progress),
        "random": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }
    path = folder / NAME
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
    windows: TrainingWindows,
    balancer: Balancer,
    fingerprint: str,
) -> Progress:
    """Put everything back as :func:`save` found it.

    Parameters that do not train (the teacher's embedding) are not in the file: they come from the teacher again, whose
    hash is part of the fingerprint.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or it belongs to another configuration.
    """
    path = folder / NAME
    if not path.exists():
        raise UserError(
            f"{path} does not exist: the run stopped before its first checkpoint; start it again without --resume"
        )
    try:
        # The random states are plain Python and numpy objects, which weights_only refuses; the file is the user's own.
        content: dict[str, Any] = torch.load(path, weights_only=False, map_location="cpu")
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}): start the run again without --resume"
        ) from error
    if content["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} belongs to a run with fingerprint {content['fingerprint'][:8]}, and this configuration has "
            f"{fingerprint[:8]}: resume with the flags of that run, or start a new one"
        )
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in content["parameters"].items():
            parameters[name].copy_(value)
    for optimiser, state in zip(optimisers, content["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    windows.load_state_dict(content["windows"])
    balancer.load_state_dict(content["balancer"])
    random.setstate(content["random"]["python"])
    np.random.set_state(content["random"]["numpy"])
    torch.set_rng_state(content["random"]["torch"])
    if content["random"]["cuda"]:
        torch.cuda.set_rng_state_all(content["random"]["cuda"])
    return Progress(**content["progress"])
