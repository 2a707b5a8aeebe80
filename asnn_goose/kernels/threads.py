"""numba's threads, never more than torch's."""

import numba
import torch


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
