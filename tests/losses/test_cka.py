"""Linear CKA: printed values, Gram forms in numpy, invariances, bias, minibatches."""

import numpy as np
import pytest
import torch
from softmax_oracle import float64
from torch import Tensor

from asnn_goose.losses import linear_cka
from asnn_goose.losses.cka import hsic, minibatch_cka

X = float64([[1, 0], [2, 1], [3, 5], [4, -1], [0, 2]])
Y = float64([[2, 1, 0], [0, 1, 1], [1, 3, 2], [5, 0, 1], [1, 1, 4]])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_cka(x: np.ndarray, y: np.ndarray) -> float:
    """tr(KHLH) / sqrt(tr(KHKH) tr(LHLH))."""
    n = len(x)
    H = np.eye(n) - 1 / n
    K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
    return float(np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L)))


def gram_hsic1(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 with the n x n matrices."""
    n, one = len(x), np.ones(len(x))
    K, L = x @ x.T, y @ y.T
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    third = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return float((np.trace(K @ L) + third - 2 / (n - 2) * one @ K @ L @ one) / (n * (n - 3)))


def test_printed_values():
    assert linear_cka(X, Y).item() == pytest.approx(0.6724575302953902, rel=1e-13)
    assert linear_cka(X, Y, debiased=True).item() == pytest.approx(0.4001422981190508, rel=1e-12)
    assert gram_cka(X.numpy(), Y.numpy()) == pytest.approx(0.6724575302953902, rel=1e-13)


def test_one_dimension_by_hand():
    x, y = float64([[0], [1], [2], [4]]), float64([[0], [1], [4], [9]])
    found = [value.item() for value in hsic(x, y, debiased=True)]
    assert found == pytest.approx([25.8333333333, 4.6666666667, 148.1666666667], rel=1e-10)
    assert linear_cka(x, y, debiased=True).item() == pytest.approx(0.9824304211392688, rel=1e-12)
    correlation = np.corrcoef(x.flatten(), y.flatten())[0, 1]
    assert linear_cka(x, y).item() == pytest.approx(correlation**2, rel=1e-12)
    assert correlation**2 == pytest.approx(0.9801749271137026, rel=1e-12)


@pytest.mark.parametrize(("n", "d1", "d2"), [(4, 3, 2), (10, 6, 6), (30, 5, 50)])
def test_feature_form_equals_the_gram_form(n: int, d1: int, d2: int):
    x, y = normal(n, d1, seed=1), normal(n, d2, seed=2) + 3.0
    y[:, 0] += x[:, 0]
    assert linear_cka(x, y).item() == pytest.approx(gram_cka(x.numpy(), y.numpy()), rel=1e-11)
    pairs = ((x, y), (x, x), (y, y))
    wanted = [gram_hsic1(a.numpy(), b.numpy()) for a, b in pairs]
    assert [value.item() for value in hsic(x, y, debiased=True)] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
def test_invariances(debiased: bool):
    x, y = normal(12, 4, seed=3), normal(12, 5, seed=4)
    y[:, :4] += x
    value = linear_cka(x, y, debiased)
    rotation = torch.linalg.qr(normal(4, 4, seed=5)).Q
    order = torch.randperm(12, generator=torch.Generator().manual_seed(6))
    for changed in (x @ rotation, 7.0 * x, x + 100.0, 1e-9 * x, 1e30 * x):
        torch.testing.assert_close(linear_cka(changed, y, debiased), value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(linear_cka(x[order], y[order], debiased), value, rtol=1e-9, atol=1e-12)
    stretched = x * float64([1, 1, 1, 20])
    assert abs(linear_cka(stretched, y, debiased) - value) > 0.01
    assert linear_cka(x, x, debiased).item() == pytest.approx(1.0, rel=1e-12)


def test_few_tokens_of_wide_states_look_alike_unless_debiased():
    """Independent Gaussians, n = 16, d = 64: 0.803 and -0.003 on average."""
    pairs = [(normal(16, 64, seed=i), normal(16, 64, seed=1000 + i)) for i in range(200)]
    assert np.mean([linear_cka(*pair).item() for pair in pairs]) == pytest.approx(0.803, abs=0.005)
    assert np.mean([linear_cka(*pair, debiased=True).item() for pair in pairs]) == pytest.approx(0.0, abs=0.01)


def test_minibatches_average_before_the_ratio():
    x = normal(64, 6, seed=7)
    y = torch.cat([x[:, :3] + 0.5 * normal(64, 3, seed=8), normal(64, 3, seed=9)], 1)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    terms = np.array([[value.item() for value in hsic(a, b)] for a, b in batches]).mean(0)
    found = minibatch_cka(batches, debiased=False).item()
    assert found == pytest.approx(terms[0] / np.sqrt(terms[1] * terms[2]), rel=1e-12)
    ratios = np.mean([linear_cka(a, b).item() for a, b in batches])
    assert abs(found - ratios) > 1e-3


@pytest.mark.parametrize("n", [1, 6])
def test_a_side_that_does_not_vary_has_similarity_0_without_gradient(n: int):
    x = torch.ones(n, 3, dtype=torch.float64, requires_grad=True)
    value = linear_cka(x, normal(n, 2, seed=10))
    value.backward()
    assert value.item() == 0.0
    assert x.grad is not None and x.grad.eq(0).all()


@pytest.mark.parametrize("size", [1e-15, 1e-4, 1e4, 1e15])
def test_no_size_of_the_states_is_beyond_float32(size: float):
    x, y = normal(500, 64, seed=11).float(), normal(500, 8, seed=12).float()
    y[:, 0] += x[:, 0]
    assert linear_cka(size * x, size * x).item() == pytest.approx(1.0, rel=1e-5)
    wanted = linear_cka(x.double(), y.double(), debiased=True).item()
    assert linear_cka(size * x, y / size, debiased=True).item() == pytest.approx(wanted, rel=1e-3)
    leaf = (size * x).requires_grad_()
    linear_cka(leaf, y).backward()
    assert leaf.grad is not None and size * leaf.grad.norm() > 1e-4


def test_batches_of_unequal_size_keep_their_weights():
    parts = [(normal(9, 3, seed=1), normal(9, 2, seed=2)), (5.0 * normal(9, 3, seed=3), 7.0 * normal(9, 2, seed=4))]
    terms = np.array([[value.item() for value in hsic(x, y)] for x, y in parts]).mean(0)
    found = minibatch_cka(parts, debiased=False).item()
    assert found == pytest.approx(terms[0] / np.sqrt(terms[1] * terms[2]), rel=1e-12)


def test_autocast_changes_nothing():
    x, y = normal(40, 16, seed=1).float(), normal(40, 8, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cka(x, y, debiased=True)
    assert torch.equal(found, linear_cka(x, y, debiased=True))


def test_rounding_of_equal_rows_is_no_variation():
    x = torch.full((7, 3), 0.1, requires_grad=True)
    value = linear_cka(x, normal(7, 2, seed=10).float())
    value.backward()
    assert value.item() == 0.0 and x.grad is not None and x.grad.eq(0).all()


@pytest.mark.parametrize("size", [1e3, 1e4, 1e5])
def test_a_massive_token_leaves_the_others_their_digits(size: float):
    """As a window's first token is: of the products of a whole side the debiased form keeps one part in size^2."""
    x, y = normal(64, 16, seed=9), normal(64, 12, seed=10)
    y[:, :6] += x[:, :6]
    x[0] *= size
    y[0] *= size
    x, y = x.float(), y.float()
    wide_x, wide_y = (z.double().numpy() for z in (x, y))
    hsics = [gram_hsic1(*pair) for pair in ((wide_x, wide_y), (wide_x, wide_x), (wide_y, wide_y))]
    expected = hsics[0] / np.sqrt(hsics[1] * hsics[2])
    # float32 of the result; the oracle itself loses 12 digits of 16 at 1e5.
    assert linear_cka(x, y, debiased=True).item() == pytest.approx(expected, rel=1e-4 if size > 1e4 else 1e-6)


@pytest.mark.parametrize("debiased", [False, True])
def test_gradcheck(debiased: bool):
    assert torch.autograd.gradcheck(
        lambda x, y: linear_cka(x, y, debiased), (normal(6, 3, seed=12).requires_grad_(), normal(6, 2, seed=13))
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_cka(X, Y[:3]), "one row per token, the same tokens"),
        (lambda: linear_cka(X[0], Y[0]), "must be matrices"),
        (lambda: linear_cka(X[:0], Y[:0]), "at least 1 token, not 0"),
        (lambda: linear_cka(X[:, :0], Y), r"states \(\d+, 0\) and .* must have channels"),
        (lambda: linear_cka(X[:3], Y[:3], debiased=True), "at least 4 tokens, not 3"),
        (lambda: minibatch_cka([]), "at least one batch"),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
