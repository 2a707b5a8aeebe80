"""The store of cached teacher targets: the teacher's states for a fixed set of windows, computed once.

Shapes: B windows, L tokens, E teacher channels.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

from safetensors.torch import load_file, save
from torch import Tensor

from asnn_goose.cache import cache_root, is_whole, locked, replacing, seal
from asnn_goose.data.loader import Batch


def states_key(teacher_fingerprint: str, dtype: str, batches: Sequence[Batch]) -> str:
    """Digest of everything the states depend on: weights, dtype of the products, and every token and mask."""
    digest = hashlib.sha256(f"{teacher_fingerprint} {dtype}".encode())
    for batch in batches:
        digest.update(repr(tuple(batch.input_ids.shape)).encode())
        digest.update(batch.input_ids.numpy().tobytes())
        digest.update(batch.mask.numpy().tobytes())
    return digest.hexdigest()


def stored_states(
    key: str,
    batches: Sequence[Batch],
    compute: Callable[[Tensor], Tensor],
    watch: Callable[[Sequence[Batch]], Iterable[Batch]],
) -> list[Tensor]:
    """The states [B, L, E] of each batch, from the store if they are there and whole, else computed and stored.

    Args:
        key: of :func:`states_key`.
        batches: windows to compute for.
        compute: input_ids -> states.
        watch: wraps the loop over batches, to show progress.
    """
    folder = cache_root() / "targets" / key
    with locked(folder):
        if not is_whole(folder):
            states = {f"{i:05d}": compute(batch.input_ids).contiguous() for i, batch in enumerate(watch(batches))}
            with replacing(folder) as part:
                part.mkdir()
                # Not save_file: a full disk is an OSError here, as the cache expects.
                (part / "states.safetensors").write_bytes(save(states))
                seal(part)
        stored = load_file(folder / "states.safetensors")
    return [stored[name] for name in sorted(stored)]
