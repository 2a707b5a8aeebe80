"""The Triton form of linear_divergence: in Triton's interpreter against numba and float64, and compiled for GPUs.

conftest.py sets TRITON_INTERPRET before anything imports Triton; compilation happens in a process without it.
"""

import importlib
import math

import pytest
import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence import tiles
from asnn_goose.kernels.linear_divergence.rows import ce_rows, forward_kl_rows
from asnn_goose.kernels.linear_divergence.teacher import DenseTeacher
from asnn_goose.kernels.linear_divergence.tiled import TiledSums

MIXTURES = [(0.3, 0.7), (None, 2.0), (1.0, None), (0.0, 1.0)]
"""Weights of ce and forward_kl; None leaves a term out."""


def logits(N: int, V: int, size: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits of a standard deviation, and targets."""
    draw = torch.Generator().manual_seed(seed)
    s, t = (size * torch.randn(N, V, generator=draw) for _ in range(2))
    return s, t, torch.randint(0, V, (N,), generator=draw)


def tile(form: str, s: Tensor, t: Tensor, targets: Tensor, w_ce, w_kl, T: float, slope: bool = True):
    """(sums and slope over the rows, gradient on the logits) of a compiled form."""
    module = importlib.import_module(f"asnn_goose.kernels.linear_divergence.{form}")
    grad, T_N = s.clone(), torch.full((len(s),), T, dtype=torch.float64, device=s.device)
    return module.tile(grad, None if w_kl is None else t, targets, T_N, w_ce, w_kl, slope).sum(-1), grad


def exact(s: Tensor, t: Tensor, targets: Tensor, w_ce, w_kl, T: float):
    """The same by autograd in float64."""
    leaf, temperature = s.double().requires_grad_(), torch.tensor(T, dtype=torch.float64, requires_grad=True)
    ce, kl = ce_rows(leaf, targets).sum(), forward_kl_rows(leaf, t.double(), temperature).sum()
    (slope,) = torch.autograd.grad(kl, temperature, retain_graph=True)
    (grad,) = torch.autograd.grad((w_ce or 0.0) * ce + (w_kl or 0.0) * kl, leaf)
    wanted = [0.0 if w_ce is None else ce.item(), *((0.0, 0.0) if w_kl is None else (kl.item(), slope.item()))]
    return torch.tensor(wanted, dtype=torch.float64), grad


@pytest.mark.parametrize("form", ["triton", "native"])
def test_each_row_has_its_own_temperature(form: str):
    s, t, targets = logits(3, 2100, size=2.0)
    module = importlib.import_module(f"asnn_goose.kernels.linear_divergence.{form}")
    T_N = torch.tensor([1.0, 2.5, 0.7], dtype=torch.float64)
    grad = s.clone()
    found_3N = module.tile(grad, t, targets, T_N, 0.3, 0.7, True)
    for n in range(3):
        row = slice(n, n + 1)
        alone = s[row].clone()
        assert torch.equal(module.tile(alone, t[row], targets[row], T_N[row], 0.3, 0.7, True), found_3N[:, row])
        assert torch.equal(alone, grad[row])


@pytest.mark.parametrize("T", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("w_ce", "w_kl"), MIXTURES)
def test_a_tile_equals_float64(w_ce: float | None, w_kl: float | None, T: float):
    """Two blocks and a ragged one, and logits up to 20 apart."""
    parts = logits(3, 4500, size=4.0)
    found, grad = tile("triton", *parts, w_ce, w_kl, T)
    wanted, wanted_grad = exact(*parts, w_ce, w_kl, T)
    # Logits of size 20 are rounded by 2^-21; the slope is a difference of terms as large as 2 T KL.
    size = torch.tensor([1.0, 1.0, 1.0 / T]) * wanted[[0, 1, 1]].abs()
    assert ((found - wanted).abs() <= 2e-6 * size).all()
    assert (grad - wanted_grad).abs().max() <= 2e-6 * wanted_grad.abs().max()


@pytest.mark.parametrize("V", [1, 7, 2048])
def test_vocabularies_below_a_block_and_as_large(V: int):
    parts = logits(2, V, size=1.0)
    found, grad = tile("triton", *parts, 0.3, 0.7, 2.0)
    wanted, wanted_grad = exact(*parts, 0.3, 0.7, 2.0)
    # The slope is a difference of terms of size 2 T; a vocabulary of one token has nothing else.
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2 * 2 * 2.0 * 2**-21)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=2e-5, atol=1e-6)


def test_a_large_vocabulary_and_a_near_student_agree_with_the_native_form():
    """Near its root the slope is the small difference of sums over log p and log q, which are about -11 each."""
    s, t, targets = logits(2, 49_152, size=2.0)
    parts = t + 0.3 * s / 2.0, t, targets
    wanted, wanted_grad = exact(*parts, 1.0, 1.0, 2.0)
    for form in ("triton", "native"):
        found, grad = tile(form, *parts, 1.0, 1.0, 2.0)
        assert found[:2].tolist() == pytest.approx(wanted[:2].tolist(), rel=2e-6)
        # log q is rounded by 2^-21 and a row's sum over it likewise.
        assert abs(found[2] - wanted[2]) <= 2 * 2.0 * 2**-21 + 5e-7 * wanted[1]
        assert (grad - wanted_grad).norm() <= 2e-6 * wanted_grad.norm()


def test_nan_in_a_row_stays_in_that_row():
    s, t, targets = logits(3, 50, size=1.0)
    s[1, 20] = math.nan
    found, grad = tile("triton", s, t, targets, 0.3, 0.7, 2.0)
    assert found.isnan().all()
    assert grad.isnan().any(-1).tolist() == [False, True, False]


def test_the_whole_op_through_triton_tiles_equals_the_tiles_of_torch(monkeypatch: pytest.MonkeyPatch):
    """A whole tile and a ragged one, heads of float32 and of bfloat16."""
    monkeypatch.setattr(tiles, "TILE", 4)
    N, V = 6, 40
    draw = torch.Generator().manual_seed(3)
    h, W, ht, Wt = (torch.randn(*shape, generator=draw) for shape in ((N, 6), (V, 6), (N, 5), (V, 5)))
    targets = torch.randint(0, V, (N, 2), generator=draw)[:, 0]  # a view
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8)):
        results = []
        for form in ("triton", "tiled"):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in (h, W)] + [torch.tensor(1.7, requires_grad=True)]
            weights = {"forward_kl": 0.5, "ce": 1.0}
            sums = TiledSums.apply(*leaves, DenseTeacher(ht.to(dtype), Wt.to(dtype)), targets, weights, {}, form)
            assert isinstance(sums, Tensor)
            (0.5 * sums[0] + sums[1]).backward()
            results.append([sums.detach(), *(leaf.grad for leaf in leaves)])
        # The slope in T is a difference of terms as large as the KL.
        sizes = [other.abs().max() for other in results[1][:-1]] + [0.5 * results[1][0][0]]
        for ours, other, size in zip(*results, sizes, strict=True):
            assert (ours - other).abs().max() <= tolerance * size


def test_the_kernel_compiles_for_gpus_without_one(compiled):
    from asnn_goose.kernels.linear_divergence.triton import BLOCK

    types = {
        "V": "i32", "temperatures": "*fp64", "log_V": "fp32", "w_ce": "fp32", "w_kl": "fp32", "targets": "*i64",
        "results": "*fp64",
    }  # fmt: skip
    kernels = [
        ("_tile_kernel", {"HAS_CE": ce, "HAS_KL": kl, "SLOPE": slope, "BLOCK": BLOCK})
        for ce, kl, slope in ((True, True, True), (False, True, False), (True, False, False))
    ]
    lines = compiled("asnn_goose.kernels.linear_divergence.triton", kernels, types, num_warps=8)
    assert len(lines) == 6
