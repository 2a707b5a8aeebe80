"""Progress bars of work that is not training itself."""

from collections.abc import Iterable

from tqdm import tqdm


def watch(items: Iterable, what: str) -> Iterable:
    """A progress bar over ``items`` that vanishes when it is full; none where stderr is not a terminal."""
    return tqdm(items, desc=what, unit="batch", leave=False, dynamic_ncols=True, disable=None)
