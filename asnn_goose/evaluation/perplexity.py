"""One pass over an evaluation set: what student and teacher each predict, and how far they agree.

Shapes: B windows, L tokens, N predicted positions, E channels, V vocabulary, W windows of the set, D documents.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256
"""Positions whose logits exist at one time."""


@dataclass(frozen=True)
class Comparison:
    """Sums over the predicted positions of a set; all logarithms natural, all at temperature 1."""

    student_nll_W: np.ndarray
    """-log q(token), summed per window."""
    teacher_nll_W: np.ndarray
    """-log p(token), summed per window."""
    tokens_W: np.ndarray
    """Predicted positions per window."""
    kl: float
    """Sum of KL(p || q)."""
    same_top1: int
    """Positions where both rank the same token first."""
    teacher_right: int
    """Positions where the teacher's first token is the text's."""
    both_right: int
    """Those among them where the student's first token is the text's too."""

    @property
    def tokens(self) -> int:
        return int(self.tokens_W.sum())

    @property
    def student_ppl(self) -> float:
        """exp of the token-mean cross-entropy; infinite for a student so far astray that float64 ends before it."""
        return self._perplexity(self.student_nll_W)

    @property
    def teacher_ppl(self) -> float:
        return self._perplexity(self.teacher_nll_W)

    def _perplexity(self, nll_W: np.ndarray) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(nll_W.sum() / self.tokens))

    @property
    def kl_to_teacher(self) -> float:
        """KL(p || q), mean over positions in nats."""
        return self.kl / self.tokens

    @property
    def top1_agreement(self) -> float:
        return self.same_top1 / self.tokens

    @property
    def knowledge_retention(self) -> float:
        """Share of the teacher's right tokens that the student also gets right (0 if the teacher has none)."""
        return self.both_right / max(1, self.teacher_right)

    def interval(self, documents_W: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
        """95 % bootstrap interval of the student's perplexity: whole documents are drawn with replacement.

        Windows of one document are alike, so that drawing windows would give too narrow an interval.

        Args:
            documents_W: number of the document that each window is of; one document leaves no interval.
        """
        _, unit_W = np.unique(documents_W, return_inverse=True)
        nll_D, tokens_D = np.bincount(unit_W, self.student_nll_W), np.bincount(unit_W, self.tokens_W)
        documents = len(tokens_D)
        if documents < 2:
            return None
        drawn = np.random.default_rng(seed).integers(0, documents, (resamples, documents))
        means = nll_D[drawn].sum(1) / tokens_D[drawn].sum(1)
        low, high = np.exp(np.quantile(means, [0.025, 0.975]))
        return float(low), float(high)


def bits_per_byte(nll_nats: float, predicted_bytes: int) -> float:
    """Cross-entropy in bits per UTF-8 byte of the predicted text."""
    return nll_nats / math.log(2.0) / predicted_bytes


@torch.no_grad()
def compare(
    student_states: Callable[[Tensor], Tensor],
    student_head_VE: Tensor,
    teacher_states: Sequence[Tensor],
    teacher_head_VE: Tensor,
    batches: Iterable[Any],
) -> Comparison:
    """Run the student over ``batches`` and set it beside the teacher's states of the same batches.

    Args:
        student_states: input_ids [B, L] -> states in front of the head.
        student_head_VE, teacher_head_VE: heads; their dtype is that of the products, softmax is float32.
        teacher_states: one [B, L, E] per batch, behind the teacher's final norm.
        batches: with ``input_ids`` and ``mask``.

    Raises:
        ValueError: no token is predicted.
    """
    student_W, teacher_W, tokens_W = [], [], []
    kl, counts = 0.0, torch.zeros(3, dtype=torch.int64)
    device = student_head_VE.device
    for batch, teacher_BLE in zip(batches, teacher_states, strict=True):
        ids, mask = batch.input_ids.to(device), batch.mask.to(device)[:, 1:]
        student_BLE = student_states(ids)
        window_N = mask.nonzero()[:, 0]
        targets_N = ids[:, 1:][mask]
        per_window = torch.zeros(2, ids.shape[0], dtype=torch.float64, device=device)
        rows = zip(
            student_BLE[:, :-1][mask].split(ROWS),
            teacher_BLE.to(device)[:, :-1][mask].split(ROWS),
            targets_N.split(ROWS),
            window_N.split(ROWS),
            strict=True,
        )
        for student_NE, teacher_NE, target_N, window in rows:
            log_q_NV, log_p_NV = _log_softmax(student_NE, student_head_VE), _log_softmax(teacher_NE, teacher_head_VE)
            for row, log_NV in enumerate((log_q_NV, log_p_NV)):
                per_window[row].index_add_(0, window, -log_NV.gather(1, target_N[:, None])[:, 0].double())
            kl += F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True).item()
            first_q, first_p = log_q_NV.argmax(-1), log_p_NV.argmax(-1)
            right_q, right_p = first_q == target_N, first_p == target_N
            counts += torch.stack([(first_q == first_p).sum(), right_p.sum(), (right_q & right_p).sum()]).cpu()
        student_W.append(per_window[0].cpu())
        teacher_W.append(per_window[1].cpu())
        tokens_W.append(mask.sum(1).cpu())
    if not sum(tokens_B.sum().item() for tokens_B in tokens_W):
        raise ValueError("no token is predicted: give windows with two or more tokens that the mask counts")
    return Comparison(
        torch.cat(student_W).numpy(),
        torch.cat(teacher_W).numpy(),
        torch.cat(tokens_W).numpy(),
        kl,
        *(int(count) for count in counts),
    )


def _log_softmax(states_NE: Tensor, head_VE: Tensor) -> Tensor:
    # Autocast would multiply a float32 teacher's states in bfloat16 too.
    with torch.autocast(head_VE.device.type, enabled=False):
        return F.log_softmax(F.linear(states_NE.to(head_VE.dtype), head_VE).float(), -1)


def arrays(batches: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, mask) as numpy arrays, for the counting baselines."""
    for batch in batches:
        yield batch.input_ids.numpy(), batch.mask.numpy()
