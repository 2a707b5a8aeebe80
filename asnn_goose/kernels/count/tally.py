"""What the operands of a product are, added up over tokens: spikes, zeros, values that are no count.

Shapes: ... any, C channels, K = N + 1 sizes of a count.
"""

from torch import Tensor

from asnn_goose.kernels.count import count_backend
from asnn_goose.kernels.count.reference import on_and_off_levels_reference, tally_reference


def tally(s_xC: Tensor, levels: int, spikes_K: Tensor, steps: int) -> Tensor:
    """[3, C], int64: over the tokens of s = k / N, the spikes, the k other than 0, and the k of ``steps`` spikes.

    Args:
        s_xC: on the levels k / N; what lies beyond counts as 1, what is no number as 0.
        levels: N.
        spikes_K: spikes of |k| = 0 to N, int64.
        steps: micro-steps per token.

    Raises:
        ValueError: spikes_K has not N + 1 entries.
    """
    if spikes_K.shape != (levels + 1,):
        raise ValueError(
            f"spikes_K must have an entry for each |k| from 0 to levels, {levels + 1}, not {tuple(spikes_K.shape)}"
        )
    if count_backend("auto", s_xC.device, s_xC.dtype) == "numba":
        from asnn_goose.kernels.count import native

        return native.tally(s_xC.float(), levels, spikes_K, steps)
    return tally_reference(s_xC, levels, spikes_K, steps)


def on_and_off_levels(s: Tensor, levels: int) -> tuple[int, int]:
    """(values other than 0 that are k / N with |k| <= N, values that are none of these levels).

    A 0 is on the levels, but, as relu^2 gives it too, tells nothing.
    """
    if count_backend("auto", s.device, s.dtype) == "numba":
        from asnn_goose.kernels.count import native

        return native.on_and_off_levels(s.float(), levels)
    return on_and_off_levels_reference(s, levels)
