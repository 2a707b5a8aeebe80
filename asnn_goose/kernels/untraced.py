"""Operations that torch.compile leaves as they are."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """The function, which torch.compile calls and does not trace: it would go on into numba's, which it cannot read."""
    return cast(F, torch.compiler.disable(function))
