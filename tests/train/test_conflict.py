"""PCGrad and the one-sided projection: printed values, projection vector by vector, order, laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from asnn_goose.train.conflict import PCGrad, ProjectKD, project_conflicts
from asnn_goose.train.term_gradients import inner_products, weighted_sum

NAMES = ("ce", "forward_kl", "hidden", "cka")

vectors = st.tuples(st.integers(2, 4), st.integers(1, 5)).flatmap(
    # Eighths: products and their sums are exact, so that no sign depends on rounding.
    lambda shape: hnp.arrays(np.float64, shape, elements=st.integers(-40, 40).map(lambda x: x / 8))
)


def combined(balancer: PCGrad | ProjectKD, rows: np.ndarray, step: int = 0) -> np.ndarray:
    given_now: dict[str, list[Tensor | None]] = {
        name: [torch.from_numpy(row.copy())] for name, row in zip(balancer.names, rows, strict=True)
    }
    (found,) = weighted_sum(given_now, balancer.factors(step, given_now, dict.fromkeys(balancer.names, 1.0)))
    assert found is not None
    return found.numpy()


def by_vectors(rows: np.ndarray, orders: list[list[int]]) -> np.ndarray:
    """The projections as the papers write them, on the vectors themselves; one per row."""
    made = rows.copy()
    for i, others in enumerate(orders):
        for j in others:
            overlap = made[i] @ rows[j]
            if overlap < 0:
                made[i] -= overlap / (rows[j] @ rows[j]) * rows[j]
    return made


def test_by_the_worked_example():
    rows = np.array([[1.0, 0.0], [-1.0, 1.0]])
    products = torch.tensor(rows @ rows.T)
    projected = project_conflicts(products, [[1], [0]]).numpy() @ rows
    assert projected.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert combined(PCGrad(NAMES[:2]), rows).tolist() == [0.5, 1.5]
    assert combined(ProjectKD(NAMES[:2]), rows).tolist() == [1.0, 1.0]
    assert combined(ProjectKD(NAMES[:2], reference="forward_kl"), rows).tolist() == [-0.5, 1.5]


@given(rows=vectors, seed=st.integers(0, 5), step=st.integers(0, 100))
def test_as_projecting_the_vectors(rows: np.ndarray, seed: int, step: int):
    for balancer in (PCGrad(NAMES[: len(rows)], seed), ProjectKD(NAMES[: len(rows)])):
        with np.errstate(invalid="ignore"):
            wanted = by_vectors(rows, balancer.order(step)).sum(0)
        found = combined(balancer, rows, step)
        # A projected vector can be exactly orthogonal to the next one: then rounding decides, and by 1e-15 at most.
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(rows=vectors)
def test_the_reference_stays_and_nothing_pulls_against_it(rows: np.ndarray):
    names = NAMES[: len(rows)]
    found = combined(ProjectKD(names), rows)
    others = found - rows[0]
    assert others @ rows[0] >= -1e-9
    if (rows[1:] @ rows[0] < 0).all():
        assert others @ rows[0] == pytest.approx(0.0, abs=1e-9)


@given(rows=vectors)
def test_without_a_conflict_the_update_is_the_sum(rows: np.ndarray):
    rows = np.abs(rows)
    for balancer in (PCGrad(NAMES[: len(rows)]), ProjectKD(NAMES[: len(rows)])):
        assert combined(balancer, rows) == pytest.approx(rows.sum(0), rel=1e-14, abs=1e-14)


@given(rows=vectors.filter(lambda rows: len(rows) == 2), scale=st.sampled_from([2.0**-20, 2.0**20]))
def test_two_projected_gradients_no_longer_conflict_at_any_scale(rows: np.ndarray, scale: float):
    made = project_conflicts(torch.tensor(rows @ rows.T), [[1], [0]]).numpy() @ rows
    assert made[0] @ rows[1] >= -1e-9 and made[1] @ rows[0] >= -1e-9
    # A power of two changes no digit.
    assert combined(PCGrad(NAMES[:2]), scale * rows).tolist() == (scale * combined(PCGrad(NAMES[:2]), rows)).tolist()


@pytest.mark.parametrize("tiny", [0.0, 1e-23, 1e-40])
def test_a_vanishing_gradient_neither_divides_by_zero_nor_acts(tiny: float):
    """In float32 the squared norm of 1e-23 is 0, while its product with 1 is not."""
    given_now: dict[str, list[Tensor | None]] = {
        "ce": [torch.tensor([-tiny, 0.0])],
        "forward_kl": [torch.tensor([1.0, 2.0])],
    }
    for balancer in (PCGrad(NAMES[:2]), ProjectKD(NAMES[:2])):
        factors = balancer.factors(0, given_now, {"ce": 1.0, "forward_kl": 1.0})
        (found,) = weighted_sum(given_now, factors)
        assert found is not None and found.tolist() == pytest.approx([1.0, 2.0], rel=1e-6)
        assert all(math.isfinite(factor) for factor in factors.values())


def test_parameters_are_one_vector():
    """Signs of the parts may differ; only the product over all parameters counts."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (), (4,)]
    parts: dict[str, list[Tensor | None]] = {
        name: [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes] for name in NAMES
    }
    rows = np.stack([np.concatenate([x.numpy().ravel() for x in p if x is not None]) for p in parts.values()])
    assert inner_products(parts).numpy() == pytest.approx(rows @ rows.T, rel=1e-12, abs=1e-14)
    assert (rows @ rows.T < 0).any()
    balancer = PCGrad(NAMES, seed=3)
    found = weighted_sum(parts, balancer.factors(7, parts, dict.fromkeys(NAMES, 1.0)))
    assert [x.shape if x is not None else None for x in found] == [torch.Size(shape) for shape in shapes]
    flat = np.concatenate([x.numpy().ravel() for x in found if x is not None])
    assert flat == pytest.approx(by_vectors(rows, balancer.order(7)).sum(0), rel=1e-10)


def test_the_order_comes_from_seed_and_step_alone():
    balancer = PCGrad(NAMES, seed=1)
    drawn = [balancer.order(step) for step in range(50)]
    torch.manual_seed(99)
    np.random.seed(99)
    assert drawn == [PCGrad(NAMES, seed=1).order(step) for step in range(50)]
    assert drawn != [PCGrad(NAMES, seed=2).order(step) for step in range(50)]
    for orders in drawn:
        assert [sorted(order) for order in orders] == [[j for j in range(4) if j != i] for i in range(4)]
    for i in range(4):
        # Of 6 orders each, 50 draws miss one with probability 6 (5/6)^50 = 7e-4; the seed is fixed.
        assert len({tuple(orders[i]) for orders in drawn}) == 6


def test_the_order_matters_with_three_terms():
    rows = np.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]])
    balancer = PCGrad(NAMES[:3])
    assert len({tuple(combined(balancer, rows, step).round(9)) for step in range(20)}) > 1


def test_an_unknown_reference_is_told_in_one_sentence():
    with pytest.raises(ValueError, match=r"the reference ce is not among the loss terms \['hidden'\]: give"):
        ProjectKD(["hidden"])
