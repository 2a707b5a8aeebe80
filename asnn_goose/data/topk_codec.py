"""The teacher's distribution in few bytes: its k best tokens, their log-probabilities, and the tail at any temperature.

A token's row of bytes, little-endian, for K = min(k, V) kept tokens in falling order of probability:

=============  ==============  ===================================================================================
ids            uint16 or int32  K token ids; int32 for vocabularies above 65,536
first gap      uint16           lp_1 - lp_2 in steps of 2^-11, at most 32; not there for K = 1
other gaps     uint8            lp_{i-1} - lp_i for i > 2 in steps that grow as exp(0.45 gap), from 0.0087 at a gap of 0
tail's mass    uint16           L(1) on the scale sqrt(-L(1) / 128)
tail's curve   uint16           L(u) - u L(1) >= 0 at the other six NODES, in steps of 2^-12
=============  ==============  ===================================================================================

L(u) is the log partition of the tail (kernels/linear_divergence/tail.py). The first log-probability is what makes head
and tail add up to 1. Each gap is measured from the value that the decoder will have reached, so that the errors do not
add up; the curve likewise from the mass that the decoder reads. An empty tail reads L(1) = -128, and L(u) = -128 u.

Shapes: N tokens, V vocabulary, K kept tokens, J nodes of the tail, B bytes of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from asnn_goose.kernels.linear_divergence.tail import NODES

FIRST_GAP_STEP = 2.0**-11
GROWTH = 0.45
"""Of the step of a gap, which goes as exp(GROWTH gap): below it a probability is at most exp(-gap), or exp(-gap / T)
when tempered, so that coarse steps lie where little depends on them."""
GAP_SCALE = 255.02
"""Just above the largest code, whose gap is then 21 and not infinite."""
FINE = 160
"""Largest code of a gap, here 2.2 nats, that is always the nearest one."""
EMPTY = -128.0
"""Lowest L(1); exp(-128 / 5) is below 1e-11, so that an empty tail has no mass at any temperature that NODES serve."""
CURVE_STEP = 2.0**-12


def row_bytes(vocab_size: int, k: int) -> int:
    """B, bytes of a token's row."""
    k = min(k, vocab_size)
    ids = (2 if vocab_size <= 2**16 else 4) * k
    return ids + (k if k > 1 else 0) + 2 * len(NODES)


def encode(logits_NV: Tensor, k: int) -> Tensor:
    """Rows of bytes [N, B], uint8, of softmax(logits), computed in float32.

    Args:
        logits_NV: logits or log-probabilities; -inf bans a token.
        k: kept tokens, at least 1; a k above V keeps all.

    Raises:
        ValueError: k below 1; a row with a NaN, or without a finite logit.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    V = logits_NV.shape[-1]
    k = min(k, V)
    log_p_NV = torch.log_softmax(logits_NV.float(), -1)
    # Of the logits: two that differ may have one log-probability in float32.
    ids_NK = logits_NV.topk(k, -1).indices
    head_NK = log_p_NV.gather(-1, ids_NK)
    if head_NK.isnan().any():
        raise ValueError("the logits hold NaN or infinity, or all of a row are -inf: they are no distribution")
    tail_NJ = _log_tail(log_p_NV.scatter(-1, ids_NK, -torch.inf))
    fields = [ids_NK.to(torch.uint16 if V <= 2**16 else torch.int32)]
    if k > 1:
        first_N, rest_NK = _gap_codes(head_NK.double())
        fields += [first_N[:, None].to(torch.uint16), rest_NK.to(torch.uint8)]
    fields.append(_tail_codes(tail_NJ.double()).to(torch.uint16))
    return torch.cat([field.contiguous().view(torch.uint8) for field in fields], -1)


def decode(rows_NB: Tensor, vocab_size: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, K] int64, log-probabilities [N, K] float32 in falling order, L at NODES [N, J] float32).

    exp of the log-probabilities and of L(1) = L at NODES[0] adds up to 1.

    Raises:
        ValueError: rows of another k or vocabulary.
    """
    k = min(k, vocab_size)
    if rows_NB.shape[-1] != row_bytes(vocab_size, k):
        raise ValueError(
            f"rows of {rows_NB.shape[-1]} bytes are not those of k = {k} and {vocab_size} tokens, "
            f"{row_bytes(vocab_size, k)} bytes"
        )
    wide = torch.uint16 if vocab_size <= 2**16 else torch.int32
    sizes = [wide.itemsize * k, *([2, k - 2] if k > 1 else [0, 0]), 2 * len(NODES)]
    # Copies: a view of other numbers must start at a multiple of their size.
    ids, first, rest, tail = (x.clone(memory_format=torch.contiguous_format) for x in rows_NB.split(sizes, -1))
    tail_NJ = _tail_values(tail.view(torch.uint16).double())
    below_NK = tail_NJ.new_zeros(len(rows_NB), k)
    if k > 1:
        below_NK[:, 1] = first.view(torch.uint16).double().squeeze(-1) * FIRST_GAP_STEP
        below_NK[:, 2:] = _gap(rest.double())
        below_NK = below_NK.cumsum(-1)
    head_N1 = torch.log(-torch.expm1(tail_NJ[:, :1])) - torch.logsumexp(-below_NK, -1, keepdim=True)
    return ids.view(wide).long(), (head_N1 - below_NK).float(), tail_NJ.float()


def _log_tail(tail_NV: Tensor) -> Tensor:
    """L at NODES [N, J]; -inf for a tail without mass."""
    highest_N1 = tail_NV.amax(-1, keepdim=True).clamp_min(torch.finfo(tail_NV.dtype).min)
    below_NV = tail_NV - highest_N1
    sums = [(u * below_NV).exp_().sum(-1).log() + u * highest_N1.squeeze(-1) for u in NODES]
    return torch.stack(sums, -1)


def _gap(code: Tensor) -> Tensor:
    return -torch.log1p(-code / GAP_SCALE) / GROWTH


def _gap_codes(head_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the first gap [N] and of the others [N, K - 2]."""
    first_N = ((head_NK[:, 0] - head_NK[:, 1]) / FIRST_GAP_STEP).round().clamp(0, 2**16 - 1)
    reached_N = head_NK[:, 0] - first_N * FIRST_GAP_STEP
    rest_NK = head_NK[:, 2:]
    next_NK = F.pad(rest_NK, (0, 1), value=-torch.inf)[:, 1:]
    codes_NK = torch.empty_like(rest_NK)
    for i in range(rest_NK.shape[1]):
        exact_N = -torch.expm1(-GROWTH * (reached_N - rest_NK[:, i]).clamp_min(0.0)) * GAP_SCALE
        code_N = exact_N.round().clamp_max(255)
        # Not rounded to below the next value where the steps are coarse: behind a cliff of many nats, all that follow
        # closely would inherit the error.
        too_low_N = (code_N > FINE) & (code_N > exact_N) & (reached_N - _gap(code_N) < next_NK[:, i])
        codes_NK[:, i] = code_N - too_low_N.to(code_N.dtype)
        reached_N = reached_N - _gap(codes_NK[:, i])
    return first_N, codes_NK


def _tail_codes(tail_NJ: Tensor) -> Tensor:
    """Codes [N, J] of L; that of the mass is above 0 as long as the head holds 1e-8, which k >= 1 of V tokens do."""
    mass_N1 = ((tail_NJ[:, :1] / EMPTY).clamp(0, 1).sqrt() * (2**16 - 1)).round()
    curve_NJ = tail_NJ[:, 1:] - tail_NJ.new_tensor(NODES[1:]) * _mass(mass_N1)
    return torch.cat([mass_N1, (curve_NJ / CURVE_STEP).round().clamp(0, 2**16 - 1)], -1)


def _tail_values(codes_NJ: Tensor) -> Tensor:
    mass_N1 = _mass(codes_NJ[:, :1])
    curve_NJ = codes_NJ[:, 1:] * CURVE_STEP + codes_NJ.new_tensor(NODES[1:]) * mass_N1
    return torch.cat([mass_N1, curve_NJ], -1)


def _mass(code: Tensor) -> Tensor:
    return EMPTY * (code / (2**16 - 1)) ** 2
