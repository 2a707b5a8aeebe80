"""Losses between hidden states of student and teacher, and the projections that bring them to one width.

Every loss takes states [..., D] of equal width and a mask [...] and returns the mean over unmasked tokens, in float32
at least; an empty mask gives 0 with a graph. Student states are block outputs computed from time-averaged spikes.

Shapes: ... tokens in any arrangement, D channels, S student width, E teacher width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from asnn_goose.kernels.precision import widened
from asnn_goose.kernels.unit_length import unit_length
from asnn_goose.losses.cka import ROUNDING
from asnn_goose.losses.divergence import token_mean

SILENT = 1e-12
"""A share of the largest mean square below which a channel counts as one that the teacher does not use."""


def token_mask(mask_BL: Tensor, skip_first: bool = False) -> Tensor:
    """The padding mask, with each window's first token left out where ``skip_first``: its state is an outlier that
    carries no text, and in most language models dwarfs the others."""
    mask_BL = mask_BL.bool()
    return mask_BL & (mask_BL.cumsum(-1) > 1) if skip_first else mask_BL


def standardised(x: Tensor) -> Tensor:
    """(x - mean) / deviation over channels; 0 without a gradient where all channels are alike, up to rounding."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = centred.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    # NaN compares false, and is to come out as NaN.
    alike = deviation <= ROUNDING * torch.finfo(x.dtype).eps * x.abs().amax(-1, keepdim=True)
    return torch.where(alike, 0.0, centred / torch.where(alike, 1.0, deviation))


def _compare(formula: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, mask: Tensor | None):
    if student.shape != teacher.shape:
        raise ValueError(
            f"states of shape {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher) cannot be "
            "compared: project the student's to the teacher's width"
        )
    if mask is not None and mask.shape != student.shape[:-1]:
        raise ValueError(f"mask {tuple(mask.shape)} must have the states' leading shape {tuple(student.shape[:-1])}")
    student, teacher = (widened(x) for x in (student, teacher.detach()))
    return token_mean(formula, student, teacher, mask=mask)


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over channels of (s - t)^2, token mean (TinyBERT's element mean without its padding, arXiv 1909.10351)."""
    return _compare(lambda s, t: (s - t).square().mean(-1), student, teacher, mask)


def normalised_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same after each token's state is brought to mean 0 and variance 1, on both sides.

    The few huge channels of a decoder's states dominate the plain form; here the value lies in [0, 4].
    """

    def formula(s: Tensor, t: Tensor) -> Tensor:
        return (standardised(s) - standardised(t)).square().mean(-1)

    return _compare(formula, student, teacher, mask)


def channel_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over channels of (s - t)^2 / m_c, m_c the mean of t_c^2 over the counted tokens, token mean.

    Each channel counts by how far it is off its own size: 1 is what a student of zeros has. One that the teacher leaves
    at 0 has no size and adds nothing.
    """

    def formula(s: Tensor, t: Tensor) -> Tensor:
        size_D = t.square().mean(0)
        silent_D = size_D <= SILENT * size_D.amax()
        return torch.where(silent_D, 0.0, (s - t).square() / torch.where(silent_D, 1.0, size_D)).mean(-1)

    return _compare(formula, student, teacher, mask)


def pkd(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """|s/|s| - t/|t||^2 = 2 - 2 cos(s, t), token mean (PKD, arXiv 1908.09355, whose code divides it by D)."""

    return _compare(lambda s, t: (unit_length(s) - unit_length(t)).square().sum(-1), student, teacher, mask)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cos(s, t), token mean (DistilBERT, arXiv 1910.01108); blind to the states' size."""
    return _compare(lambda s, t: 1.0 - (unit_length(s) * unit_length(t)).sum(-1), student, teacher, mask)


class Projector(nn.Module):
    """Student states [..., S] -> [..., E], in training only.

    Trained together with the student. A trainable projection of the teacher's side instead would let the target
    collapse.

    Args:
        student_width, teacher_width: S and E.
        kind: linear, linear_norm (with a LayerNorm behind it, as SpikeBERT's transforms, arXiv 2308.15122), mlp (one
            hidden layer of width E with GELU), or none, for equal widths.

    Raises:
        ValueError: an unknown kind, or none with unequal widths.
    """

    def __init__(self, student_width: int, teacher_width: int, kind: str = "linear"):
        super().__init__()
        if kind == "none" and student_width != teacher_width:
            raise ValueError(f"projector none needs equal widths, not {student_width} (student) and {teacher_width}")
        if kind == "linear":
            self.map = nn.Linear(student_width, teacher_width)
        elif kind == "linear_norm":
            self.map = nn.Sequential(nn.Linear(student_width, teacher_width), nn.LayerNorm(teacher_width))
        elif kind == "mlp":
            self.map = nn.Sequential(
                nn.Linear(student_width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width)
            )
        elif kind == "none":
            self.map = nn.Identity()
        else:
            raise ValueError(f"projector must be linear, linear_norm, mlp or none, not {kind!r}")

    def forward(self, student: Tensor) -> Tensor:
        parameter = next(self.parameters(), None)
        return self.map(student if parameter is None else student.to(parameter.dtype))


class LayerAggregation(nn.Module):
    """A teacher target that skips no layer (after LAD, Sensors 2023, 23(3):1483; the equations are this project's).

    a_1 = h_1,  a_l = g_l h_l + (1 - g_l) a_{l-1},  g_l = sigmoid(W_l [h_l; a_{l-1}] + b_l)

    with one gate per token and layer. The gates start at 1/2. Trained by the alignment loss they would move the target
    to whatever is easiest; they take part in it only as constants, and train, if at all, on another loss.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        if layers < 1:
            raise ValueError(f"an aggregation needs at least one layer, not {layers}")
        self.gates = nn.ModuleList(nn.Linear(2 * width, 1) for _ in range(layers - 1))
        for gate in self.gates:
            nn.init.zeros_(gate.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(gate.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(aggregate [..., E], mean entropy of the gates in nats: ln 2 at the start, 0 where decided)."""
        if len(states) != len(self.gates) + 1:
            raise ValueError(f"this aggregation is for {len(self.gates) + 1} layers, not {len(states)}")
        aggregate, entropies = states[0], []
        for gate, state in zip(self.gates, states[1:], strict=True):
            share = torch.sigmoid(gate(torch.cat([state, aggregate], -1)))
            aggregate = share * state + (1.0 - share) * aggregate
            entropies.append(-(torch.xlogy(share, share) + torch.xlogy(1.0 - share, 1.0 - share)).mean())
        return aggregate, torch.stack(entropies).mean() if entropies else aggregate.new_zeros(())
