"""Losses of a classifier that learns from labels, from a teacher's class logits, and from its own deepest exit.

Teacher and student may cut a text into different tokens: they share its classes alone.

Shapes: B texts, V classes, C channels, I exits before the deepest one.
"""

import torch
from torch import Tensor

from asnn_goose.errors import UserError
from asnn_goose.losses.alignment import mse
from asnn_goose.losses.divergence import cross_entropy, forward_kl


def classification_kd(
    student_logits_BV: Tensor,
    teacher_logits_BV: Tensor,
    labels_B: Tensor,
    w_ce: float = 1.0,
    w_kd: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """w_ce CE(s, label) + w_kd T^2 KL(softmax(t/T) || softmax(s/T)), mean over texts in nats (arXiv 1503.02531).

    Args:
        student_logits_BV: with gradient.
        teacher_logits_BV: receive none.
        labels_B: int64.
        w_ce, w_kd: weights of the two terms.
        temperature: T > 0.

    Raises:
        UserError: the teacher tells apart another number of classes.
    """
    require_as_many_classes(student_logits_BV.shape[-1], teacher_logits_BV.shape[-1])
    distilled = forward_kl(student_logits_BV, teacher_logits_BV, temperature=temperature)
    return w_ce * cross_entropy(student_logits_BV, labels_B) + w_kd * distilled


def require_as_many_classes(student: int, teacher: int) -> None:
    """Refuse two classifiers whose logits cannot be set side by side.

    Raises:
        UserError: their numbers of classes differ.
    """
    if student != teacher:
        raise UserError(
            f"the student tells {student} labels apart and the teacher {teacher}: choose a teacher that was trained on "
            "the student's task, since the number of labels must match"
        )


def self_distillation(
    exit_logits_BIV: Tensor,
    exit_states_BIC: Tensor,
    final_logits_BV: Tensor,
    final_states_BC: Tensor,
    labels_B: Tensor,
    w_ce: float = 0.9,
    w_kd: float = 0.1,
    w_hint: float = 0.0,
    temperature: float = 3.0,
) -> Tensor:
    """What the shallow exits learn from the labels and from the deepest one (arXiv 1905.08094):

        sum_i w_ce CE(q_i, label) + w_kd T^2 KL(q_final || q_i) + w_hint MSE(F_i, F_final)

    The deepest exit is a constant here; it learns from its own loss. The hint is a mean over channels, where the
    published code takes their sum, which is C times larger.

    Args:
        exit_logits_BIV, exit_states_BIC: of the shallow exits, and what their classifiers saw.
        final_logits_BV, final_states_BC: of the deepest exit.
        labels_B: int64.
        w_ce, w_kd, w_hint: weights of the terms; temperature: T > 0.
    """
    target_BV, hint_BC = final_logits_BV.detach(), final_states_BC.detach()
    terms = [
        classification_kd(logits_BV, target_BV, labels_B, w_ce, w_kd, temperature) + w_hint * mse(states_BC, hint_BC)
        for logits_BV, states_BC in zip(exit_logits_BIV.unbind(1), exit_states_BIC.unbind(1), strict=True)
    ]
    return torch.stack(terms).sum()
