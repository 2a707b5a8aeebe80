"""What the forms of an operation can do, and the choice between them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

_log = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)


@dataclass(frozen=True)
class Backend:
    """One form of an operation, and where it runs."""

    name: str
    devices: tuple[str, ...] | None = None
    """Device types; None: every one."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    """Of the input."""
    package: str | None = None
    """What it needs beside torch, by the name it is imported under."""
    unless: Callable[..., str | None] = lambda **options: None
    """Given the operation's options, why it cannot do this, or None."""
    automatic: bool = True
    """Whether backend auto may choose it."""

    def obstacle(self, device: torch.device, dtype: torch.dtype, options) -> str | None:
        """Why it cannot run, as the end of a sentence; None if it can."""
        if self.devices is not None and device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        if dtype not in self.dtypes:
            known = ", ".join(str(known).removeprefix("torch.") for known in self.dtypes)
            return f"takes {known}, not {str(dtype).removeprefix('torch.')}"
        if self.package is not None and find_spec(self.package) is None:
            return f"needs the package {self.package}, which is not installed"
        return self.unless(**options)


@cache
def log_choice(op: str, name: str) -> None:
    """Says once per process which form an operation runs in."""
    _log.info("%s: backend %s", op, name)


def choose(
    op: str,
    backends: Sequence[Backend],
    requested: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    **options,
) -> str:
    """The backend to run: the requested one, or for auto the first that can.

    Args:
        op: the operation's name, for messages.
        backends: best first.
        requested: auto or a backend's name.
        device, dtype: of the input.
        options: the operation's own, for ``Backend.unless``.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run, with the reason.
    """
    if requested == "auto":
        fitting = (b for b in backends if b.automatic and b.obstacle(device, dtype, options) is None)
        chosen = next(fitting, None)
        if chosen is None:
            raise ValueError(f"no {op} backend takes {dtype} on {device}")
        return chosen.name
    for backend in backends:
        if backend.name == requested:
            obstacle = backend.obstacle(device, dtype, options)
            if obstacle is not None:
                raise ValueError(f"{op} backend {requested} {obstacle}; backend auto picks one that can run")
            return requested
    known = ", ".join(backend.name for backend in backends)
    raise ValueError(f"{op} backend must be auto, {known}, not {requested!r}")
