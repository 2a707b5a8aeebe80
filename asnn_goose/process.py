"""What the process tells its libraries before they are imported."""

import os

WAITING_SPINS = "3000"
"""How often a thread of GNU OpenMP looks whether the others are there, before it sleeps."""


def prepare_libraries() -> None:
    """Keep libraries from talking over the progress bar, and from wasting time; must precede their import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _wait_briefly()


def _wait_briefly() -> None:
    """Tell OpenMP's threads to sleep soon where they wait for each other (benchmarks/busy_core.py).

    While they spin, as GNU's do for milliseconds, one whose core another program has taken cannot go on, and all wait.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", WAITING_SPINS)
