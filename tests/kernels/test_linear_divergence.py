"""linear_divergence against numpy float64 row by row, finite differences, and its forms against each other.

Shapes: N rows, D student channels, E teacher channels, V vocabulary.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asnn_goose.kernels.linear_divergence import ce_rows, forward_kl_rows, linear_divergence
from asnn_goose.kernels.linear_divergence.tiles import TILE

BACKENDS = ("reference", "tiled")
"""The forms that take float64."""
ALL = (*BACKENDS, "native")
BOTH = {"ce": 0.3, "forward_kl": 0.7}


def softmax(row: np.ndarray) -> np.ndarray:
    odds = np.exp(row - row.max())
    return odds / odds.sum()


def oracle(h, W, ht, Wt, targets, T: float) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(name -> sum, name -> gradient on the student's logits) by the formulas, one row and token at a time."""
    h, W, ht, Wt = (np.asarray(x, dtype=np.float64) for x in (h, W, ht, Wt))
    sums = {"ce": 0.0, "forward_kl": 0.0}
    grads = {name: np.zeros((len(h), len(W))) for name in sums}
    for n in range(len(h)):
        s, t = W @ h[n], Wt @ ht[n]
        p, q, q1 = softmax(t / T), softmax(s / T), softmax(s)
        sums["ce"] -= math.log(q1[targets[n]])
        sums["forward_kl"] += T**2 * sum(p[i] * math.log(p[i] / q[i]) for i in range(len(s)))
        grads["ce"][n] = q1 - np.eye(len(s))[targets[n]]
        grads["forward_kl"][n] = T * (q - p)
    return sums, grads


def problem(N: int, V: int = 11, D: int = 5, E: int = 4, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """hidden, head, teacher hidden, teacher head, targets; floats rounded to float32."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (N, D), (V, D), (N, E), (V, E)
    floats = [torch.randn(*shape, generator=draw).to(dtype) for shape in shapes]
    return *floats, torch.randint(0, V, (N,), generator=draw)


def run(parts: tuple[Tensor, ...], **options: Any) -> tuple[dict[str, Tensor], int]:
    h, W, ht, Wt, targets = parts
    arguments: dict[str, Any] = {"weights": BOTH, **options}
    return linear_divergence(h, W, ht, Wt, targets_N=targets, **arguments)


def with_gradients(
    parts: tuple[Tensor, ...], T: float = 1.7, autocast: bool = False, **options: Any
) -> tuple[list[float], list[Tensor]]:
    """Raw sums, and the gradients of 0.01 times their weighted sum in hidden, head and T."""
    h, W, ht, Wt, targets = parts
    h, W = (x.detach().clone().requires_grad_() for x in (h, W))
    temperature = torch.tensor(T, dtype=torch.float64, requires_grad=True)
    weights = options.get("weights", BOTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums, _ = run((h, W, ht, Wt, targets), temperature=temperature, **options)
    total = sum(weights[name] * value for name, value in sums.items()) * 0.01
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, [h, W, temperature], allow_unused=True)
    return [value.item() for value in sums.values()], [torch.zeros(()) if g is None else g for g in grads]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("weights", [BOTH, {"forward_kl": 2.0}, {"ce": 1.0}, {"forward_kl": 1.0, "ce": 0.0}])
def test_values_and_gradients_equal_the_formulas(weights: dict[str, float], T: float, backend: str):
    parts = problem(9)
    h, W, ht, Wt, targets = (x.numpy() for x in parts)
    sums, grads = oracle(h, W, ht, Wt, targets, T)
    values, (grad_h, grad_W, grad_T) = with_gradients(parts, T, weights=weights, backend=backend)
    assert values == pytest.approx([sums[name] for name in weights], rel=1e-12)
    grad_s = np.sum([0.01 * weight * grads[name] for name, weight in weights.items()], axis=0)
    np.testing.assert_allclose(grad_h.numpy(), grad_s @ W, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(grad_W.numpy(), grad_s.T @ h, rtol=1e-10, atol=1e-13)
    up, down = (oracle(h, W, ht, Wt, targets, T + d)[0]["forward_kl"] for d in (1e-5, -1e-5))
    slope = 0.01 * weights.get("forward_kl", 0.0) * (up - down) / 2e-5
    assert grad_T.item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("N", [1, TILE - 1, TILE, TILE + 1, 2 * TILE + 4])
def test_tiles_equal_the_reference(N: int):
    parts = problem(N, V=257)
    wanted, wanted_grads = with_gradients(parts, backend="reference")
    found, found_grads = with_gradients(parts, backend="tiled")
    assert found == pytest.approx(wanted, rel=1e-12)
    for a, b in zip(found_grads, wanted_grads, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    single, single_grads = with_gradients(tuple(x.float() if x.is_floating_point() else x for x in parts))
    # float32 softmaxes over 257 tokens, summed in float64. The slope in T is a difference of terms as large as T^2 KL.
    assert single == pytest.approx(wanted, rel=1e-6)
    sizes = [b.abs().max() for b in wanted_grads[:2]] + [0.007 * wanted[1]]
    for a, b, size in zip(single_grads, wanted_grads, sizes, strict=True):
        assert (a - b).abs().max() <= 5e-6 * size


def test_gradcheck_of_the_tiled_form():
    h, W, ht, Wt, targets = problem(4)
    T = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    def mixture(h, W, T):
        sums, _ = linear_divergence(h, W, ht, Wt, targets_N=targets, weights=BOTH, temperature=T, backend="tiled")
        return 0.3 * sums["ce"] + 0.7 * sums["forward_kl"]

    assert torch.autograd.gradcheck(mixture, (h.requires_grad_(), W.requires_grad_(), T))


MIXTURES: list[tuple[dict[str, float], dict[str, dict[str, Any]]]] = [
    ({"reverse_kl": 0.7}, {}),
    ({"ce": 0.3, "jensen_shannon": 0.7}, {"jensen_shannon": {"beta": 0.3}}),
    ({"skew_kl": 0.5, "ce": 1.0}, {"skew_kl": {"skew": 0.2, "reverse": True}}),
    ({"adaptive_kl": 2.0}, {}),
    ({"total_variation": 1.0, "forward_kl": 0.5}, {}),
    ({"tail_bucket_kl": 0.5, "ce": 0.1}, {"tail_bucket_kl": {"k": 7}}),
    ({"tcs": 0.5}, {"tcs": {"k": 7}}),
]


@pytest.mark.parametrize(("weights", "choices"), MIXTURES, ids=lambda value: "+".join(value))
def test_every_divergence_in_tiles_equals_all_logits_at_once(weights: dict[str, float], choices):
    parts = problem(TILE + 13, V=61)
    arguments = {"weights": weights, "options": choices}
    wanted, wanted_grads = with_gradients(parts, backend="reference", **arguments)
    found, found_grads = with_gradients(parts, backend="tiled", **arguments)
    assert found == pytest.approx(wanted, rel=1e-12)
    for a, b in zip(found_grads, wanted_grads, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    # auto goes on to the tiles where the compiled form does not know a term.
    single, _ = with_gradients(tuple(x.float() if x.is_floating_point() else x for x in parts), **arguments)
    assert single == pytest.approx(wanted, rel=1e-4)


def test_the_table_of_three_logits():
    """With identity heads the states are the logits."""
    t, s, one = torch.tensor([[2.0, 1, 0]]), torch.tensor([[0.5, 1, -0.5]]), torch.eye(3)
    for T, value in ((1, 0.2394013611), (2, 0.2304818042), (5, 0.2119025995), (1000, 0.1945400862)):
        sums, count = linear_divergence(s.double(), one.double(), t.double(), one.double(), temperature=float(T))
        assert count == 1
        # The table's digits, and log-probabilities rounded by 2^-53 that T^2 multiplies.
        assert sums["forward_kl"].item() == pytest.approx(value, abs=max(1e-10, T**2 * 2**-52))


@pytest.mark.parametrize("backend", ALL)
@settings(max_examples=60)
@given(
    distance=st.sampled_from([1e-4, 1e-3, 0.05, 1.0]),
    T=st.sampled_from([1.0, 3.0, 5.0, 100.0, 1000.0]),
    V=st.sampled_from([3, 100, 5000]),
    seed=st.integers(0, 99),
)
def test_no_row_is_negative_or_far_off_in_float32(distance, T, V, seed, backend: str):
    """T^2 multiplies what rounding leaves of the KL, which falls with the distance and with T, each squared."""
    draw = torch.Generator().manual_seed(seed)
    t = 2 * torch.randn(1, V, generator=draw)
    s, one = t + distance * torch.randn(1, V, generator=draw), torch.eye(1)
    exact = forward_kl_rows(s.double(), t.double(), T).item()
    sums, _ = linear_divergence(one, s.T.contiguous(), one, t.T.contiguous(), temperature=T, backend=backend)
    assert sums["forward_kl"].item() >= 0.0
    # The KL is half the mean square of the gaps between log-probabilities. The reference's near -9 are rounded by
    # 2^-21, on both sides; near -1 by 2^-24, a hundredth of the gaps of 1e-5 that are left at T = 100.
    assert sums["forward_kl"].item() == pytest.approx(exact, rel=0.03, abs=T**2 * 2.0**-40)


@pytest.mark.parametrize("backend", ALL)
def test_the_table_of_three_logits_in_float32(backend: str):
    t, s, one = torch.tensor([[2.0, 1, 0]]), torch.tensor([[0.5, 1, -0.5]]), torch.eye(3)
    for T, value in ((1, 0.2394013611), (2, 0.2304818042), (5, 0.2119025995), (1000, 0.1945400862)):
        sums, _ = linear_divergence(s, one, t, one, temperature=float(T), backend=backend)
        # Logits of 1/1000 are rounded by 2^-34, a ten-thousandth of the gaps whose squares add up to it.
        assert sums["forward_kl"].item() == pytest.approx(value, rel=1e-3 if T == 1000 else 1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_bfloat16_heads_cost_no_more_than_the_rounding_of_their_products(backend: str):
    wide = problem(150, V=499, D=32, E=48, seed=3)
    narrow = tuple(x.bfloat16() if x.is_floating_point() else x for x in wide)
    h, W, ht, Wt, targets = narrow
    found, found_grads = with_gradients(narrow, backend=backend)
    # Exactly the sums of the rounded logits, up to float32.
    s, t = (h @ W.T).double(), (ht @ Wt.T).double()
    assert found == pytest.approx([ce_rows(s, targets).sum().item(), forward_kl_rows(s, t, 1.7).sum().item()], rel=1e-5)
    # Logits of size up to 40 are rounded by 2^-9 of themselves, and a row's slope in them is at most 2 T.
    exact, exact_grads = with_gradients(tuple(x.double() if x.is_floating_point() else x for x in narrow))
    assert np.abs(np.subtract(found, exact)).max() <= 150 * 2 * 1.7 * 40 * 2**-9
    assert found == pytest.approx(exact, rel=0.01)
    for a, b in zip(found_grads, exact_grads, strict=True):
        # Two roundings of 2^-9, of the logits and of their gradient, spread over products of 499 and 150 terms.
        assert (a.double() - b).norm() <= 0.02 * b.norm()


def large_vocabulary(rows: int, V: int, distance: float) -> tuple[Tensor, ...]:
    """Teacher logits of std 2 and a student at a distance, as heads behind one-hot states."""
    draw = torch.Generator().manual_seed(0)
    t = 2 * torch.randn(rows, V, generator=draw)
    s = t + distance * torch.randn(rows, V, generator=draw)
    return torch.eye(rows), s.T.contiguous(), torch.eye(rows), t.T.contiguous(), t.argmax(-1)


@pytest.mark.parametrize("backend", ALL)
def test_a_small_divergence_over_a_large_vocabulary_is_not_lost(backend: str):
    """50,257 logits of std 2, a student 0.05 away, KL 0.00124; computed in bfloat16 it was negative."""
    parts = large_vocabulary(1, 50_257, 0.05)
    exact = forward_kl_rows(parts[1].T.double(), parts[3].T.double()).item()
    assert exact == pytest.approx(0.00124, rel=0.05)
    sums, _ = run(parts, weights={"forward_kl": 1.0}, backend=backend)
    assert sums["forward_kl"].item() == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("distance", [0.3, 3.0])
@pytest.mark.parametrize("backend", ALL)
def test_the_temperatures_gradient_over_a_large_vocabulary_survives_float32(backend: str, distance: float):
    """Near its root dL/dT is the small difference of sums over log p and log q, which are about -11 each."""
    parts = large_vocabulary(16, 49_152, distance)
    options: dict[str, Any] = {"T": 2.0, "weights": {"forward_kl": 100.0}}
    (value,), (*_, exact) = with_gradients(
        tuple(x.double() for x in parts[:4]) + parts[4:], backend="reference", **options
    )
    _, (*_, found) = with_gradients(parts, backend=backend, **options)
    # log q is rounded by 2^-21 and a row's sum over it likewise; the rest is relative to 2 T KL.
    assert abs(found - exact) <= 16 * 2.0 * 2**-21 + 5e-7 * value


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(kept=st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_mask_deletes_rows(kept: list[bool], backend: str):
    mask = torch.tensor(kept)
    parts = problem(len(kept))
    parts[0][~mask], parts[2][~mask], parts[4][~mask] = torch.nan, torch.inf, -100
    values, grads = with_gradients(parts, mask=mask, backend=backend)
    h, W, ht, Wt, targets = parts
    shorter = (h[mask], W, ht[mask], Wt, targets[mask])
    wanted, wanted_grads = with_gradients(shorter, backend=backend)
    assert values == pytest.approx(wanted, rel=1e-12)
    assert run(parts, mask=mask, backend=backend)[1] == sum(kept)
    torch.testing.assert_close(grads[0][mask], wanted_grads[0])
    assert grads[0][~mask].eq(0).all()
    torch.testing.assert_close(grads[1:], wanted_grads[1:])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_mask_of_zeros_and_ones_is_one_of_truths(dtype: torch.dtype):
    parts, mask = problem(4), torch.tensor([True, False, True, True])
    assert run(parts, mask=mask.to(dtype), backend="reference") == run(parts, mask=mask, backend="reference")


@pytest.mark.parametrize("backend", ALL)
def test_an_empty_mask_gives_zeros_with_a_graph(backend: str):
    parts = problem(6, dtype=torch.float32)
    values, grads = with_gradients(parts, mask=torch.zeros(6, dtype=torch.bool), backend=backend)
    assert values == [0.0, 0.0]
    assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(shift=st.floats(-50, 50), teacher_shift=st.floats(-50, 50), order=st.permutations(range(11)))
def test_shifts_and_the_order_of_the_vocabulary_do_not_matter(shift, teacher_shift, order, backend: str):
    parts = problem(5)
    values, grads = with_gradients(parts, backend=backend)
    h, W, ht, Wt, targets = parts
    constant = torch.ones(5, 1, dtype=torch.float64), torch.ones(11, 1, dtype=torch.float64)
    h, W = torch.cat([h, shift * constant[0]], 1), torch.cat([W, constant[1]], 1)
    ht, Wt = torch.cat([ht, teacher_shift * constant[0]], 1), torch.cat([Wt, constant[1]], 1)
    place = torch.tensor(order).argsort()
    moved, moved_grads = with_gradients((h, W[order], ht, Wt[order], place[targets]), backend=backend)
    assert moved == pytest.approx(values, rel=1e-9)
    torch.testing.assert_close(moved_grads[0][:, :-1], grads[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(moved_grads[1][place, :-1], grads[1], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(moved_grads[2], grads[2], rtol=1e-7, atol=1e-10)


def test_the_native_form_equals_the_reference_of_wide_rows():
    """Rows of several blocks with a ragged end, logits far apart, and two tiles."""
    parts = problem(TILE + 3, V=2500)
    for head in (parts[1], parts[3]):
        head.mul_(8.0)
    wanted, wanted_grads = with_gradients(parts, backend="reference")
    found, grads = with_gradients(
        tuple(x.float() if x.is_floating_point() else x for x in parts), backend="native"
    )  # fmt: skip
    # Logits of size 40 are rounded by 2^-20, and a row's slope in each is at most 2 T.
    assert found == pytest.approx(wanted, rel=2e-6)
    for a, b in zip(grads[:2], wanted_grads[:2], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert abs(grads[2] - wanted_grads[2]) <= 1e-5 * 0.007 * wanted[1]


@settings(max_examples=25)
@given(kept=st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_mask_deletes_rows_in_the_native_form(kept: list[bool]):
    mask = torch.tensor(kept)
    parts = problem(len(kept), dtype=torch.float32)
    parts[0][~mask], parts[2][~mask], parts[4][~mask] = torch.nan, torch.inf, -100
    values, grads = with_gradients(parts, mask=mask, backend="native")
    h, W, ht, Wt, targets = parts
    wanted, wanted_grads = with_gradients((h[mask], W, ht[mask], Wt, targets[mask]), backend="native")
    assert values == wanted
    assert torch.equal(grads[0][mask], wanted_grads[0])
    assert grads[0][~mask].eq(0).all()


def test_nan_in_a_state_reaches_the_native_sums_and_gradients():
    parts = problem(4, dtype=torch.float32)
    parts[0][2] = torch.nan
    values, grads = with_gradients(parts, backend="native")
    assert all(map(math.isnan, values))
    assert grads[0].isnan().any(-1).tolist() == [False, False, True, False]


class LargestTensor(TorchDispatchMode):
    """Notes the element count of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(("backend", "rows"), [("tiled", TILE), ("native", TILE), ("reference", 2 * TILE)])
def test_the_tiled_form_never_holds_all_logits(backend: str, rows: int):
    with LargestTensor() as largest:
        with_gradients(problem(2 * TILE, V=1000, dtype=torch.float32), backend=backend)
    assert largest.elements == rows * 1000


@pytest.mark.parametrize("backend", ALL)
def test_autocast_leaves_the_products_in_the_heads_dtype(backend: str):
    parts = problem(20, dtype=torch.float32)
    values, grads = with_gradients(parts, backend=backend)
    found, found_grads = with_gradients(parts, backend=backend, autocast=True)
    assert found == values
    assert all(torch.equal(a, b) for a, b in zip(found_grads, grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_receives_no_gradient(backend: str):
    h, W, ht, Wt, targets = (x.requires_grad_() if x.is_floating_point() else x for x in problem(4))
    sums, _ = run((h, W, ht, Wt, targets), backend=backend)
    (0.3 * sums["ce"] + 0.7 * sums["forward_kl"]).backward()
    assert h.grad is not None and W.grad is not None
    assert ht.grad is None and Wt.grad is None


def test_a_frozen_head_and_a_frozen_body():
    h, W, ht, Wt, targets = problem(4)
    full = with_gradients((h, W, ht, Wt, targets))[1]
    for trained, place in ((h, 0), (W, 1)):
        leaf = trained.clone().requires_grad_()
        parts = (leaf, W, ht, Wt, targets) if place == 0 else (h, leaf, ht, Wt, targets)
        sums, _ = run(parts, temperature=1.7)
        (0.003 * sums["ce"] + 0.007 * sums["forward_kl"]).backward()
        torch.testing.assert_close(leaf.grad, full[place])


@pytest.mark.parametrize("weights", [BOTH, {"ce": 1.0, "forward_kl": 0.0}, {"ce": 0.0, "forward_kl": 0.0}])
@pytest.mark.parametrize("other", [(0.7, 0.3), (1.0, 0.0), (0.0, 0.7), (-0.3, 0.7), (0.3, 0.7 * 1.001), (3e-7, 7e-7)])
def test_a_mixture_that_was_not_prepared_has_its_own_gradient(other: tuple[float, float], weights: dict[str, float]):
    """The tiles are gone through again; also for one sum alone, and for a sum that was given no weight."""
    found = {}
    for backend in BACKENDS:
        h, W, ht, Wt, targets = problem(4)
        leaves = [h.requires_grad_(), W.requires_grad_(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)]
        sums, _ = run((*leaves[:2], ht, Wt, targets), temperature=leaves[2], weights=weights, backend=backend)
        (other[0] * sums["ce"] + other[1] * sums["forward_kl"]).backward()
        found[backend] = [leaf.grad for leaf in leaves]
    torch.testing.assert_close(found["tiled"], found["reference"], rtol=1e-9, atol=1e-20)


def test_weights_of_zero_and_a_total_of_zero():
    h, W, ht, Wt, targets = problem(4)
    for weights in ({"ce": 0.0}, {"ce": 0.0, "forward_kl": 0.0}, BOTH):
        leaf = h.clone().requires_grad_()
        sums, _ = run((leaf, W, ht, Wt, targets), weights=weights, backend="tiled")
        sum(0.0 * value for value in sums.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        assert leaf.grad is not None and leaf.grad.eq(0).all()


def test_a_second_derivative_through_tiles_is_refused_not_dropped():
    h, W, ht, Wt, targets = problem(4)
    sums, _ = run((h.requires_grad_(), W, ht, Wt, targets), weights={"forward_kl": 1.0}, backend="tiled")
    # The gradient of a plain sum depends on nothing, which PyTorch's own mark takes for a constant.
    for value in (sums["forward_kl"] ** 2, sums["forward_kl"]):
        (grad,) = torch.autograd.grad(value, h, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
