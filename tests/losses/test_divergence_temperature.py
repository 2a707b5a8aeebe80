"""The temperature in forward_kl: live in T^2 and in both softmaxes; oracle: finite differences of numpy float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from softmax_oracle import EXACT, STUDENT, TEACHER, float64, kl, softmax

from asnn_goose.kernels.linear_divergence import forward_kl_rows
from asnn_goose.losses import forward_kl, jensen_shannon, reverse_kl, tail_bucket_kl


def cross_entropy_part(s: np.ndarray, t: np.ndarray, T: float, teacher_T: float) -> float:
    return float(-(softmax(t / teacher_T) * np.log(softmax(s / T))).sum())


def tail_bucket_kl_64(s: torch.Tensor, t: torch.Tensor, temperature: float) -> torch.Tensor:
    return tail_bucket_kl(s, t, 64, temperature=temperature)


def slope_in_T(f: Callable[[float], float], T: float) -> float:
    """Richardson extrapolation of central differences: errors of 1e-13 by its order h^4, 1e-12 by rounding."""
    h = 2e-4
    narrow, wide = ((f(T + d) - f(T - d)) / (2 * d) for d in (h, 2 * h))
    return (4 * narrow - wide) / 3


def learned(T: float, teacher=TEACHER, student=STUDENT) -> tuple[float, float]:
    """(forward_kl, its derivative in T)."""
    temperature = float64(T).requires_grad_()
    value = forward_kl(float64(student), float64(teacher), temperature=temperature)
    (slope,) = torch.autograd.grad(value, temperature)
    return value.item(), slope.item()


VARIANTS: dict[str, tuple[float, float, Callable[[float, np.ndarray, np.ndarray], float]]] = {
    "everything live": (0.2304818042, -0.0112705009, lambda T, t, s: T**2 * float(kl(s, t, T))),
    "KL only": (0.0576204511, -0.0604380763, lambda T, t, s: float(kl(s, t, T))),
    "T^2 detached": (0.2304818042, -0.2417523051, lambda T, t, s: 4 * float(kl(s, t, T))),
    "teacher softmax detached": (
        0.2304818042,
        0.1854808603,
        lambda T, t, s: T**2 * (cross_entropy_part(s, t, T, 2.0) - cross_entropy_part(t, t, 2.0, 2.0)),
    ),
    "cross-entropy instead of KL": (
        4.3112471511,
        4.3646467572,
        lambda T, t, s: T**2 * cross_entropy_part(s, t, T, T),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_temperature_is_live_in_all_three_places(variant: str):
    """Of the five ways to keep T in the graph only the first is the derivative of the value."""
    printed_value, printed_slope, f = VARIANTS[variant]
    t, s = np.array(TEACHER), np.array(STUDENT)
    expected = slope_in_T(lambda T: f(T, t, s), 2.0)
    assert f(2.0, t, s) == pytest.approx(printed_value, abs=6e-11)
    assert expected == pytest.approx(printed_slope, abs=6e-11)
    value, slope = learned(2.0)
    assert (value == pytest.approx(printed_value)) == (variant not in ("KL only", "cross-entropy instead of KL"))
    assert (slope == pytest.approx(expected, abs=1e-9)) == (variant == "everything live")


def test_slope_in_T_changes_sign_at_an_interior_maximum():
    assert learned(1.0)[1] == pytest.approx(0.0068407135, abs=6e-11)
    assert learned(1.0835880 - 1e-6)[1] > 0 > learned(1.0835880 + 1e-6)[1]


def test_one_temperature_per_row():
    t, s, T = float64([[2, 1, 0], [0, 0, 3]]), float64([[0.5, 1, -0.5], [0, 1, 1]]), float64([[1], [2]])
    rows = forward_kl_rows(s, t, T)
    assert (rows / T.squeeze(1) ** 2).tolist() == pytest.approx([0.2394013611, 0.2033370201], abs=6e-11)
    assert rows.mean().item() == pytest.approx(0.526374720751891, rel=EXACT)
    means = (T.mean() ** 2 * (rows / T.squeeze(1) ** 2).mean()).item()
    assert means == pytest.approx(0.498080678884620, rel=EXACT)
    assert torch.autograd.gradcheck(lambda T: forward_kl_rows(s, t, T), T.requires_grad_())


def test_a_temperature_may_have_the_shape_of_one_number_or_of_the_tokens():
    t, s = float64([[2, 1, 0], [0, 0, 3]]), float64([[0.5, 1, -0.5], [0, 1, 1]])
    per_token = forward_kl(s, t, temperature=float64([[1], [2]]))
    assert torch.equal(forward_kl(s, t, temperature=float64([1, 2])), per_token)
    T = torch.nn.Parameter(float64([2]))
    forward_kl(s[None], t[None], temperature=T).backward()
    assert T.grad is not None and T.grad.shape == (1,)
    expected = slope_in_T(lambda T: T**2 * float(kl(s.numpy(), t.numpy(), T).mean()), 2.0)
    assert T.grad.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("T", "tolerance"), [(1.0, 1e-6), (20.0, 1e-5), (1000.0, 1e-3)])
@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jensen_shannon, tail_bucket_kl_64])
def test_float32_keeps_a_small_divergence(loss, T: float, tolerance: float):
    """T^2 multiplies what the partition functions lose to rounding, about 1e-6 at 50,000 tokens: 1 at T = 1000.

    Oracle: float64. A divergence of nearly equal softmaxes is a sum of squares of the gaps, whose relative error grows
    with T as the gaps shrink towards the rounding of log q, 1e-6.
    """
    generator = torch.Generator().manual_seed(0)
    t = 3.0 * torch.randn(4, 50_257, generator=generator)
    s = t + 0.05 * torch.randn(4, 50_257, generator=generator)
    expected = loss(s.double(), t.double(), temperature=T).item()
    assert loss(s, t, temperature=T).item() == pytest.approx(expected, rel=tolerance, abs=1e-8 * T**2)
    assert 0.0 <= loss(t, t, temperature=T).item() <= 1e-12 * T**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [60.0, 68.0, 70.0, 95.0, 110.0, 800.0])
def test_a_token_that_one_side_finds_all_but_impossible(far: float, dtype: torch.dtype):
    """Forward KL tends to log 2 for q = 1/2, and to far / 2 for p = 1/2; oracle: the closed form in Python's floats."""
    sure, torn = torch.tensor([[far, 0.0]], dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    p = 1.0 / (1.0 + math.exp(-far))
    forward = p * math.log(2 * p) + (1.0 - p) * (math.log(2.0) - far)
    half = math.log1p(math.exp(-far)) + far / 2 - math.log(2.0)
    for student, teacher, expected in ((torn, sure, forward), (sure, torn, half)):
        student = student.clone().requires_grad_()
        value = forward_kl(student, teacher)
        value.backward()
        # exp of a gap of up to 69, itself rounded to 24 bits.
        assert value.item() == pytest.approx(expected, rel=69 * 2**-24)
        gap = (student.detach().softmax(-1) - teacher.softmax(-1)).tolist()
        assert student.grad is not None and student.grad.tolist()[0] == pytest.approx(gap[0], abs=1e-6)


def test_banned_tokens_stay_banned():
    """KL over two tokens equals KL over three of which one is -inf; gradients in s and T are those of the two."""
    banned = float64([[2.0, -torch.inf, 0.5]])
    for student in ([[0.5, -torch.inf, 1.0]], [[0.5, 3.0, 1.0]]):
        s, T = float64(student).requires_grad_(), float64(2.0).requires_grad_()
        loss = forward_kl(s, banned, temperature=T)
        loss.backward()
        assert s.grad is not None and T.grad is not None
        s2, t2 = np.array(student[0]), np.array([2.0, 0.5])
        p = softmax(t2 / 2)

        def value(T: float, s2: np.ndarray = s2, t2: np.ndarray = t2) -> float:
            p, q = softmax(t2 / T), softmax(s2 / T)[[0, 2]]
            return T**2 * (p * (np.log(p) - np.log(q))).sum()

        assert loss.item() == pytest.approx(value(2.0), rel=1e-12)
        assert s.grad.flatten().tolist() == pytest.approx(list(2 * (softmax(s2 / 2) - [p[0], 0.0, p[1]])), abs=1e-12)
        assert T.grad.item() == pytest.approx(slope_in_T(value, 2.0), abs=1e-9)


def test_a_learned_temperature_needs_teacher_logits_from_no_grad():
    s, T = float64([STUDENT]).requires_grad_(), float64(2.0).requires_grad_()
    with torch.no_grad():
        plain = float64([TEACHER]) * 1.0
    with torch.inference_mode():
        inference = float64([TEACHER]) * 1.0
    forward_kl(s, plain, temperature=T).backward()
    assert T.grad is not None and T.grad.item() == pytest.approx(-0.0112705009, abs=6e-11)
    with pytest.raises(RuntimeError, match="inference_mode; use no_grad, so that T can be learned"):
        forward_kl(s, inference, temperature=T)
    # Neither a fixed T nor an evaluation without gradients needs to save them.
    forward_kl(s, inference, temperature=2.0).backward()
    with torch.inference_mode():
        assert forward_kl(s, inference, temperature=T).item() == pytest.approx(0.2304818042, abs=6e-11)


def test_an_instance_wise_temperature_by_the_printed_numbers():
    """The mean over samples of T_i^2 KL_i; mean(T)^2 mean(KL) is another number."""
    t, s = [[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]], [[0.5, 1.0, -0.5], [0.0, 1.0, 1.0]]
    taus = float64([[1.0], [2.0]]).requires_grad_()
    value = forward_kl(float64(s), float64(t), temperature=taus)
    assert value.item() == pytest.approx(0.526374720751891, rel=1e-14)
    divergences = [float(kl(np.array(b), np.array(a), T)) for a, b, T in zip(t, s, (1.0, 2.0), strict=True)]
    # Printed with nine digits and a 0.
    assert divergences == pytest.approx([0.2394013611, 0.2033370200], abs=5e-10)
    assert 1.5**2 * np.mean(divergences) == pytest.approx(0.498080678884620, rel=1e-14)
    (slopes,) = torch.autograd.grad(value, taus)
    one_by_one = [learned(T, a, b)[1] / 2 for a, b, T in zip(t, s, (1.0, 2.0), strict=True)]
    assert slopes.flatten().tolist() == pytest.approx(one_by_one, rel=1e-12)


def test_a_temperature_per_window_reaches_all_its_tokens():
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    found = forward_kl(s, t, mask, torch.tensor([1.5, 3.0])[:, None, None])
    each = [forward_kl(s[b], t[b], mask[b], T).item() * int(mask[b].sum()) for b, T in enumerate((1.5, 3.0))]
    assert found.item() == pytest.approx(sum(each) / 5, rel=1e-12)
