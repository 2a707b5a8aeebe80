"""Relation losses: printed values, numpy triple loops, masks, blocks."""

import itertools

import numpy as np
import pytest
import torch
from softmax_oracle import float64, softmax
from torch import Tensor

from asnn_goose.losses.relation import (
    info_nce,
    minilmv2,
    relation_kl,
    rkd_angle,
    rkd_distance,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_value_relation_by_hand():
    teacher, student = float64([[[1, 0], [0, 1]]]), float64([[[1, 0], [1, 0]]])
    value = relation_kl(student, teacher, heads=1).item()
    assert value == pytest.approx(0.05879980620958283, rel=1e-14)
    turn = float64([[0.6, -0.8], [0.8, 0.6]])
    assert relation_kl(student, teacher @ turn, heads=1).item() == pytest.approx(value, rel=1e-12)


def test_relation_heads_of_unequal_widths():
    teacher = float64([[[1, 0, 0, 1], [0, 1, 1, 0]]])
    student = torch.zeros(1, 2, 6)
    assert relation_kl(student, teacher, heads=2).item() == pytest.approx(0.05879980620958283, rel=1e-6)
    # One head: rows [0.73105858, 0.26894142] against uniform ones.
    p = np.array([0.7310585786, 0.2689414214])
    assert relation_kl(student, teacher, heads=1).item() == pytest.approx((p * np.log(2 * p)).sum(), rel=1e-6)


def loop(student: np.ndarray, teacher: np.ndarray, heads: int, mask: np.ndarray, block: int) -> float:
    """Sequence by sequence, block by block, head by head, row by row."""
    total, rows = 0.0, 0
    for b, start in itertools.product(range(len(mask)), range(0, mask.shape[1], block)):
        keep = np.flatnonzero(mask[b, start : start + block]) + start
        for h in range(heads):
            relations = []
            for x in (student, teacher):
                d = x.shape[-1] // heads
                part = x[b, keep, h * d : (h + 1) * d]
                relations.append(softmax(part @ part.T / d**0.5) if len(keep) else np.zeros((0, 0)))
            q, p = relations
            total += float((p * (np.log(p) - np.log(q))).sum())
            rows += len(keep)
    return total / rows


@pytest.mark.parametrize("block", [None, 1, 3, 4, 100])
def test_masks_blocks_and_heads_equal_the_loop(block: int | None):
    student, teacher = normal(2, 10, 6), normal(2, 10, 4, seed=1)
    mask = torch.rand(2, 10, generator=torch.Generator().manual_seed(2)) > 0.3
    wanted = loop(student.double().numpy(), teacher.double().numpy(), 2, mask.numpy(), block or 10)
    student[~mask], teacher[~mask] = 7.0, -3.0
    student.requires_grad_()
    found = relation_kl(student, teacher, 2, mask, block)
    found.backward()
    assert found.item() == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert student.grad is not None and student.grad.isfinite().all() and student.grad[~mask].eq(0).all()


def test_padding_that_holds_nan_stays_out_of_value_and_gradients():
    student, teacher, mask = normal(2, 4, 6), normal(2, 4, 6, seed=1), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    wanted = relation_kl(student, teacher, 2, mask).item()
    student[0, 3], teacher[0, 3] = torch.nan, torch.nan
    student.requires_grad_()
    value = relation_kl(student, teacher, 2, mask)
    value.backward()
    assert value.item() == wanted
    assert student.grad is not None and student.grad.isfinite().all() and student.grad[0, 3].eq(0).all()


def test_autocast_changes_nothing():
    student, teacher = normal(2, 4, 6), normal(2, 4, 6, seed=1)

    def losses() -> list[Tensor]:
        pooled = student[:, 0], teacher[:, 0]
        return [relation_kl(student, teacher, 2), rkd_angle(*pooled), rkd_distance(*pooled), info_nce(*pooled)]

    wanted = losses()
    with torch.autocast("cpu", torch.bfloat16):
        found = losses()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_an_empty_mask_gives_0_with_a_graph():
    student = normal(1, 3, 4).requires_grad_()
    loss = relation_kl(student, normal(1, 3, 4, seed=1), 2, torch.zeros(1, 3))
    loss.backward()
    assert loss.item() == 0.0 and student.grad is not None and student.grad.eq(0).all()


def test_the_projections_are_summed():
    student = {name: normal(1, 5, 4, seed=i) for i, name in enumerate(("query", "key", "value"))}
    teacher = {name: normal(1, 5, 8, seed=9 + i) for i, name in enumerate(("query", "key", "value"))}
    parts = sum(relation_kl(student[name], teacher[name], 2).item() for name in student)
    assert minilmv2(student, teacher, 2).item() == pytest.approx(parts, rel=1e-6)
    with pytest.raises(ValueError, match="must have the same names"):
        minilmv2({"key": student["key"]}, teacher, 2)


def huber(a: np.ndarray, b: np.ndarray) -> float:
    gap = np.abs(a - b)
    return float(np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean())


def test_rkd_equals_the_loops():
    student, teacher = normal(5, 3), normal(5, 7, seed=1)
    sides, angles = [], []
    for x in (student.double().numpy(), teacher.double().numpy()):
        distance = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        sides.append(distance / distance[distance > 0].mean())
        cosine = np.zeros((5, 5, 5))
        for j, i, k in itertools.product(range(5), repeat=3):
            a, b = x[i] - x[j], x[k] - x[j]
            if i != j and k != j:
                cosine[j, i, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        angles.append(cosine)
    assert rkd_distance(student, teacher).item() == pytest.approx(huber(*sides), rel=1e-5)
    assert rkd_angle(student, teacher).item() == pytest.approx(huber(*angles), rel=1e-5)
    assert rkd_distance(5 * student, student).item() == pytest.approx(0.0, abs=1e-10)
    assert rkd_angle(5 * student + 2, student).item() == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle, info_nce, lambda s, t: relation_kl(s[None], t[None], 2)])
def test_the_teacher_receives_no_gradient(loss):
    student, teacher = normal(5, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().max() > 0.0


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_equal_rows_give_no_nan(loss):
    student = torch.ones(4, 3, requires_grad=True)
    value = loss(student, normal(4, 3))
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle, info_nce, lambda s, t: relation_kl(s[None], t[None], 1)])
@pytest.mark.parametrize("side", [0, 1])
def test_a_row_that_is_no_number_shows(loss, side):
    pair = [normal(5, 4), normal(5, 4, seed=1)]
    pair[side][2, 3] = torch.nan
    assert loss(*pair).isnan()


@pytest.mark.parametrize("loss", [rkd_angle, info_nce])
def test_rows_without_a_direction_give_gradients_of_the_others_size(loss):
    # Two rows at 0: neither they nor their difference point anywhere; x / max(|x|, epsilon) has a slope of 1 / epsilon.
    student = normal(4, 3)
    student[:2] = 0.0
    student.requires_grad_()
    loss(student, normal(4, 3, seed=1)).backward()
    assert student.grad is not None and student.grad[2:].abs().max() > 0.0 and student.grad.abs().max() < 100.0


def test_info_nce_finds_its_own():
    teacher = normal(6, 8)
    scores = torch.nn.functional.normalize(teacher, dim=-1)
    scores = (scores @ scores.T / 0.1).double().numpy()
    wanted = -np.log(softmax(scores).diagonal()).mean()
    assert info_nce(3 * teacher, teacher).item() == pytest.approx(wanted, rel=1e-4)
    assert info_nce(teacher.roll(1, 0), teacher) > info_nce(teacher, teacher)
    with pytest.raises(ValueError, match="two or more rows of equal shape"):
        info_nce(teacher[:1], teacher[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relation_kl(normal(1, 3, 6), normal(1, 3, 4), 4), "4 relation heads do not divide the width 6"),
        (lambda: relation_kl(normal(1, 3, 6), normal(1, 3, 4), 0), "0 relation heads do not divide"),
        (lambda: relation_kl(normal(1, 3, 6), normal(1, 4, 6), 2), "cannot be related"),
        (lambda: relation_kl(normal(1, 3, 6), normal(1, 3, 6), 2, block=0), "block must be at least 1 token, not 0"),
        (lambda: rkd_distance(normal(3, 6), normal(2, 6)), r"rows \(3, 6\) \(student\) and \(2, 6\) .* as many"),
        (lambda: rkd_angle(normal(0, 6), normal(0, 6)), "must be one or more"),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
