"""Feature dynamics: the printed example, tiles against one piece, masks, Gram matrices."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from softmax_oracle import float64
from torch import Tensor

from asnn_goose.losses.feature_dynamics import (
    dynamics_rows,
    feature_dynamics,
    raw_dynamics_cka,
)
from asnn_goose.losses.tiles import TILE, tiled_sum


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def identity(x: Tensor) -> Tensor:
    return x


def test_printed_example():
    teacher = [float64([[1, 0, 0]]), float64([[2, 0, 0]])]
    student = [float64([[1, 0, 0]]), float64([[1, 1, 0]])]
    trajectory, derivative = dynamics_rows(student, teacher)
    assert trajectory.item() == pytest.approx(0.30292910107876403 / 2, rel=1e-14)
    assert derivative.item() == pytest.approx(1.42806813722119, rel=1e-14)
    deltas = [torch.log_softmax(x[1], -1) - torch.log_softmax(x[0], -1) for x in (teacher, student)]
    assert deltas[0][0].tolist() == pytest.approx([0.31189995, -0.68810005, -0.68810005], abs=1e-8)
    assert deltas[1][0].tolist() == pytest.approx([-0.31055009, 0.68944991, -0.31055009], abs=1e-8)


def test_a_token_that_the_teacher_bans_adds_nothing():
    """p = (1/2, 0, 1/2) against a uniform q: KL = log 3/2."""
    s = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    trajectory, _ = dynamics_rows([s], [float64([[1.0, -torch.inf, 1.0]])])
    assert trajectory.item() == pytest.approx(math.log(1.5), rel=1e-14)
    (grad,) = torch.autograd.grad(trajectory.sum(), s)
    assert grad[0].tolist() == pytest.approx([-1 / 6, 1 / 3, -1 / 6], rel=1e-14)


def test_tiles_masks_and_gradients_equal_one_piece():
    shape = (2, TILE + 9, 6)
    students = [normal(*shape, seed=i).requires_grad_() for i in range(3)]
    teachers = [normal(2, TILE + 9, 4, seed=10 + i) for i in range(3)]
    heads = normal(11, 6, seed=20), normal(11, 4, seed=21)
    readouts = [partial(F.linear, weight=head) for head in heads]
    mask = torch.rand(2, TILE + 9, generator=torch.Generator().manual_seed(3)) > 0.3
    found = feature_dynamics(students, teachers, *readouts, mask=mask)
    grads = torch.autograd.grad(found[0] + 2 * found[1], students)
    rows = dynamics_rows([readouts[0](x[mask]) for x in students], [readouts[1](x[mask]) for x in teachers])
    wanted = rows[0].mean(), rows[1].mean()
    wanted_grads = torch.autograd.grad(wanted[0] + 2 * wanted[1], students)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads, wanted_grads)
    assert all(grad[~mask].eq(0).all() for grad in grads)


@pytest.mark.parametrize("tokens", [0, 1, TILE, TILE + 1, 2 * TILE + 1])
def test_a_tiled_sum_has_every_token_once(tokens: int):
    x = torch.ones(tokens, 2, requires_grad=True)
    total = tiled_sum(lambda x: x.sum(), x)
    total.backward()
    assert total.item() == 2 * tokens
    assert x.grad is not None and torch.equal(x.grad, torch.ones(tokens, 2))


def test_a_constant_added_to_a_layers_logits_moves_neither_term():
    students = [normal(4, 5, seed=i).double().requires_grad_() for i in range(3)]
    for term in dynamics_rows(students, [normal(4, 5, seed=10 + i).double() for i in range(3)]):
        for grad in torch.autograd.grad(term.sum(), students, retain_graph=True):
            # Float64 sums of five numbers below 1.
            assert grad.abs().max() > 1e-3 and grad.sum(-1).abs().max() < 1e-12


def test_layers_that_change_nothing_have_cosine_0_and_no_gradient():
    same = normal(3, 5).requires_grad_()
    _, derivative = dynamics_rows([same, same], [normal(3, 5, seed=1), normal(3, 5, seed=2)])
    assert derivative.tolist() == [1.0, 1.0, 1.0]
    (grad,) = torch.autograd.grad(derivative.sum(), same)
    assert grad.eq(0).all()


def test_a_frozen_layer_and_an_empty_mask_give_numbers():
    still = [normal(4, 3).requires_grad_()] * 2
    trajectory, derivative = feature_dynamics(still, [normal(4, 3, seed=1)] * 2, identity, identity)
    (trajectory + derivative).backward()
    assert derivative.item() == 1.0 and still[0].grad is not None and still[0].grad.isfinite().all()
    empty = feature_dynamics(still, still, identity, identity, torch.zeros(4, dtype=torch.bool))
    assert [value.item() for value in empty] == [0.0, 0.0]
    sum(empty).backward()  # pyright: ignore[reportAttributeAccessIssue]


def test_equal_models_cost_nothing():
    states = [normal(4, 3, seed=i) for i in range(3)]
    trajectory, derivative = feature_dynamics(states, states, identity, identity)
    assert abs(trajectory.item()) <= 1e-6 and abs(derivative.item()) <= 1e-6
    assert raw_dynamics_cka(states, [2 * x for x in states]).item() == pytest.approx(0.0, abs=1e-5)


def hsic1(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of arXiv 2010.15327, with n x n matrices."""
    n, K, L = len(x), x @ x.T, y @ y.T
    np.fill_diagonal(K, 0.0)
    np.fill_diagonal(L, 0.0)
    mean = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K @ L).sum()
    return float((np.trace(K @ L) + mean) / (n * (n - 3)))


def test_raw_dynamics_are_a_mean_over_neighbours_of_debiased_cka():
    students, teachers = ([normal(9, d, seed=15 * d + i).double() for i in range(3)] for d in (3, 5))
    distances = []
    for i in (1, 2):
        x, y = ((layers[i] - layers[i - 1]).numpy() for layers in (students, teachers))
        distances.append(1 - hsic1(x, y) / np.sqrt(hsic1(x, x) * hsic1(y, y)))
    assert abs(distances[0] - distances[1]) > 0.1
    # Differences of float64 sums over 81 pairs.
    assert raw_dynamics_cka(students, teachers).item() == pytest.approx(np.mean(distances), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_dynamics([], [], identity, identity), "not 0 and 0"),
        (lambda: feature_dynamics([normal(2, 3)], [], identity, identity), "not 1 and 0"),
        (lambda: raw_dynamics_cka([normal(5, 3)], [normal(5, 3)]), "two or more layers on both sides, not 1 and 1"),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
