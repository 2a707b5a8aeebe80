"""Feature dynamics: how a model's prediction forms over its layers (FDD, ACL 2025, long paper 1125).

A state is read out as y = log softmax(head(norm(h))), each model with its own norm and head. Over the chosen layers l,

    trajectory = mean_l KL(exp y_T(l) || exp y_S(l))
    derivative = mean_l [1 - cos(y_T(l) - y_T(l-1), y_S(l) - y_S(l-1))]      over neighbours among the chosen layers

The cosine needs log-probabilities: it would change with a constant added to raw logits.

Shapes: N tokens, D channels, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence import rows
from asnn_goose.kernels.precision import widened
from asnn_goose.kernels.unit_length import unit_length
from asnn_goose.losses.cka import linear_cka
from asnn_goose.losses.tiles import tiled_sum

Readout = Callable[[Tensor], Tensor]


def dynamics_rows(student_NV: Sequence[Tensor], teacher_NV: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(trajectory [N], derivative [N]) from the logits of each chosen layer; one that changes nothing has cosine 0."""
    y_s, y_t = ([torch.log_softmax(widened(x), -1) for x in logits] for logits in (student_NV, teacher_NV))
    gaps = [rows.relative_entropy(t, s) for s, t in zip(y_s, y_t, strict=True)]
    turns = []
    for s0, s1, t0, t1 in zip(y_s, y_s[1:], y_t, y_t[1:], strict=False):
        turns.append(1.0 - (unit_length(t1 - t0) * unit_length(s1 - s0)).sum(-1))
    trajectory = torch.stack(gaps).mean(0)
    return trajectory, torch.stack(turns).mean(0) if turns else torch.zeros_like(trajectory)


def feature_dynamics(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    student_readout: Readout,
    teacher_readout: Readout,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(trajectory, derivative), token means in nats and in [0, 2]; 0 for an empty mask.

    Args:
        student_states, teacher_states: the selected layers' states [..., D], in order, the same number of each.
        student_readout, teacher_readout: states -> logits over one vocabulary. The student's head must
            be a constant here: one that a shallow layer could train would learn to read shallow layers.
        mask: [...], true where a token counts.

    Raises:
        ValueError: no layers, or not the same number of them.
    """
    if len(student_states) != len(teacher_states) or not student_states:
        raise ValueError(
            "feature dynamics pair as many student as teacher layers, not "
            f"{len(student_states)} and {len(teacher_states)}"
        )
    keep = slice(None) if mask is None else mask.flatten().bool()
    students = [x.flatten(0, -2)[keep] for x in student_states]
    teachers = [x.detach().flatten(0, -2)[keep] for x in teacher_states]

    def tile_sums(*states: Tensor) -> Tensor:
        half = len(states) // 2
        teacher_NV = [teacher_readout(x).detach() for x in states[half:]]
        trajectory_N, derivative_N = dynamics_rows([student_readout(x) for x in states[:half]], teacher_NV)
        return torch.stack([trajectory_N.sum(), derivative_N.sum()])

    trajectory, derivative = tiled_sum(tile_sums, *students, *teachers) / max(1, students[0].shape[0])
    return trajectory, derivative


def raw_dynamics_cka(
    student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """1 - debiased CKA of the raw states' changes h(l) - h(l-1), mean over neighbours: another method, to compare with.

    Widths may differ; at least 4 unmasked tokens and two layers.
    """
    if len(student_states) != len(teacher_states) or len(student_states) < 2:
        raise ValueError(
            f"changes need two or more layers on both sides, not {len(student_states)} and {len(teacher_states)}"
        )
    keep = slice(None) if mask is None else mask.flatten().bool()
    students, teachers = ([x.flatten(0, -2)[keep] for x in states] for states in (student_states, teacher_states))
    distances = [
        1.0 - linear_cka(s1 - s0, (t1 - t0).detach(), debiased=True)
        for s0, s1, t0, t1 in zip(students, students[1:], teachers, teachers[1:], strict=False)
    ]
    return torch.stack(distances).mean()
