"""How the numba forms are compiled, and on how many threads they run: never more than torch's."""

from typing import Any

import numba
import torch

COMPILE: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
"""For numba.njit. No fast-math: a fused multiply-add would flip spikes at their threshold; who may, adds it."""


def numba_threads() -> int:
    """As many as torch uses, but never more than numba was started with."""
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # pyright: ignore


def bound_numba_threads() -> None:
    """To be called before a parallel numba function."""
    threads = torch.get_num_threads()
    numba.set_num_threads(numba_threads())
    # Where both use OpenMP, numba's start sets the thread count of the whole process, torch's too, to all cores.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
