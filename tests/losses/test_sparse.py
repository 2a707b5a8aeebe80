"""Losses from a part of the teacher's distribution: the printed table of estimators, unbiasedness by enumeration."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from softmax_oracle import float64, softmax
from torch import Tensor

from asnn_goose.losses import draw_targets, forward_kl, random_sampling_ce, tail_bucket_kl, tcs

TEACHER = float64([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()
UNIFORM = torch.zeros(5, dtype=torch.float64)
WRONG = float64([0.02, 0.01, 0.4, 0.3, 0.27]).log()


def value_and_gradient(loss, student: Tensor) -> tuple[float, list[float]]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad.tolist()


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [
        (lambda s: forward_kl(s, TEACHER), 0.30978694888420283, [-0.3, -0.05, 0.075, 0.1375, 0.1375]),
        (lambda s: tcs(s, TEACHER, 2), 0.0566330122651324, [-1 / 6, 1 / 6, 0, 0, 0]),
        (lambda s: tail_bucket_kl(s, TEACHER, 2), 0.295064069427155, [-0.3, -0.05, *[0.35 / 3] * 3]),
    ],
)
def test_the_table_of_estimators(loss, value: float, gradient: list[float]):
    found, slope = value_and_gradient(loss, UNIFORM)
    assert found == pytest.approx(value, rel=1e-13)
    assert slope == pytest.approx(gradient, abs=1e-12)


def test_a_student_with_the_right_ratio_but_no_mass_costs_tcs_nothing():
    assert tcs(WRONG, TEACHER, 2).item() == pytest.approx(0.0, abs=1e-15)
    assert forward_kl(WRONG, TEACHER).item() == pytest.approx(2.079271059914823, rel=1e-13)
    assert tail_bucket_kl(WRONG, TEACHER, 2).item() == pytest.approx(2.075198080242355, rel=1e-13)


def test_an_over_confident_student_is_told_apart():
    student = float64([0.6, 0.3, 1 / 30, 1 / 30, 1 / 30]).log()
    assert forward_kl(student, TEACHER).item() == pytest.approx(0.10705439483012075, rel=1e-12)
    assert tail_bucket_kl(student, TEACHER, 2).item() == pytest.approx(0.09233151537307271, rel=1e-12)


def test_the_vocabulary_is_tempered_before_it_is_bucketed():
    """p = (1/2, 1/4, 1/4) at T = 2 leaves another tail than p^(1/2) of the two buckets (1/2, 1/2) would."""
    teacher = float64([0.5, 0.25, 0.25]).log()
    head = torch.softmax(teacher / 2, -1)[0].item()
    assert 1 - head == pytest.approx(2 * 0.25**0.5 / (0.5**0.5 + 2 * 0.25**0.5), rel=1e-14)
    student = float64([0.2, 0.4, 0.4]).log()
    q = torch.softmax(student / 2, -1)[0].item()
    wanted = 4 * (head * np.log(head / q) + (1 - head) * np.log((1 - head) / (1 - q)))
    assert tail_bucket_kl(student, teacher, 1, temperature=2.0).item() == pytest.approx(wanted, rel=1e-12)


@given(
    logits=st.lists(st.floats(-6, 6), min_size=12, max_size=12),
    k=st.integers(1, 8),
    T=st.floats(0.5, 5.0),
)
def test_the_tail_bucket_is_never_above_the_full_divergence(logits: list[float], k: int, T: float):
    s, t = float64(logits[:6]), float64(logits[6:])
    full, bucket = forward_kl(s, t, temperature=T).item(), tail_bucket_kl(s, t, k, temperature=T).item()
    assert -1e-12 <= bucket <= full + 1e-10
    if k >= 6:
        assert bucket == pytest.approx(full, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_tokens_banned_in_both_models_leave_no_trace(k: int):
    """Value and gradients of two models over three tokens of which one is banned are those over the other two."""
    T = float64(2.0).requires_grad_()
    few = float64([0.5, -1.0]).requires_grad_()
    wanted = tail_bucket_kl(few, float64([2.0, 0.0]), k, temperature=T)
    gradients = torch.autograd.grad(wanted, [few, T])
    s, t = float64([0.5, -1.0, -torch.inf]).requires_grad_(), float64([2.0, 0.0, -torch.inf])
    found = tail_bucket_kl(s, t, k, temperature=T)
    slope, slope_in_T = torch.autograd.grad(found, [s, T])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert slope.tolist() == pytest.approx([*gradients[0].tolist(), 0.0], abs=1e-12)
    assert slope_in_T.item() == pytest.approx(gradients[1].item(), abs=1e-12)


def test_k_of_one_ties_masks_and_the_gradient_of_the_tail():
    s = float64([[0.1, 0.2, 0.3], [1.0, 0.0, 0.0]]).requires_grad_()
    t = float64([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]])
    loss = tail_bucket_kl(s, t, 1, mask=torch.tensor([False, True]))
    loss.backward()
    assert s.grad is not None
    assert s.grad[0].eq(0).all() and s.grad[1].ne(0).all()
    # Of tied tokens any may be kept: a third and two thirds either way.
    assert tail_bucket_kl(torch.zeros(3, dtype=torch.float64), t[0], 1).item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_random_sampling_is_unbiased_by_enumeration(power: float):
    """All draws of N = 2 with their probabilities: value and gradient have the full cross-entropy's expectation."""
    p = TEACHER.exp()
    r = p**power / (p**power).sum()
    student = WRONG / 2
    expected_value, expected_gradient = 0.0, np.zeros(5)
    for draw in itertools.product(range(5), repeat=2):
        ids = torch.tensor(draw)
        weights = p[ids] / r[ids] / 2
        value, gradient = value_and_gradient(lambda s, i=ids, w=weights: random_sampling_ce(s, i, w), student)
        probability = float(r[ids].prod())
        expected_value += probability * value
        expected_gradient += probability * np.array(gradient)
    q = torch.softmax(student, -1)
    assert expected_value == pytest.approx(-(p * q.log()).sum().item(), rel=1e-12)
    assert expected_gradient.tolist() == pytest.approx((q - p).tolist(), abs=1e-12)


def _cross_entropy_of_draws(s: np.ndarray, ids: np.ndarray, weights: np.ndarray, T: float) -> np.ndarray:
    """Of each token, in numpy."""
    return -(weights * np.take_along_axis(np.log(softmax(s / T)), ids, -1)).sum(-1)


@pytest.mark.parametrize("T", [1.0, 2.5])
def test_random_sampling_is_a_mean_over_unmasked_tokens_of_tempered_log_probabilities(T: float):
    draw = torch.Generator().manual_seed(0)
    s = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64)
    ids, weights = torch.randint(5, (2, 3, 4), generator=draw), torch.rand(2, 3, 4, generator=draw, dtype=torch.float64)
    mask = np.array([[False, True, True], [True, False, True]])
    wanted = _cross_entropy_of_draws(s.numpy(), ids.numpy(), weights.numpy(), T)[mask].mean()
    found = random_sampling_ce(s, ids, weights, torch.from_numpy(mask), T).item()
    assert found == pytest.approx(wanted, rel=1e-12)


def test_random_sampling_of_bfloat16_logits_is_computed_in_float32():
    draw = torch.Generator().manual_seed(1)
    s = (3.0 * torch.randn(50, 40, generator=draw)).bfloat16()
    ids, weights = torch.randint(40, (50, 6), generator=draw), torch.rand(50, 6, generator=draw)
    found = random_sampling_ce(s, ids, weights, temperature=1.5)
    wanted = _cross_entropy_of_draws(s.double().numpy(), ids.numpy(), weights.double().numpy(), 1.5).mean()
    # Float32 sums of 40 and of 300 terms; bfloat16 would be off by 1e-3.
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted, rel=1e-5)


def test_a_banned_token_is_never_drawn_not_even_by_power_0():
    ids, weights = draw_targets(float64([1.0, -torch.inf, 0.0]), 100, 0.0, torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == {0, 2} and weights.isfinite().all()


def test_draws_have_the_teachers_frequencies_and_variance():
    teacher = TEACHER.float().expand(20_000, 5)
    for power in (1.0, 0.5):
        ids, weights = draw_targets(teacher, 50, power, torch.Generator().manual_seed(0))
        estimate = torch.zeros(20_000, 5).scatter_add(1, ids, weights)
        error = (estimate.mean(0) - TEACHER.exp()).abs()
        # Six standard errors of 20,000 estimates.
        assert (error <= 6 * estimate.std(0) / 20_000**0.5).all()
        if power == 1.0:
            assert estimate.var(0)[0].item() == pytest.approx(0.005, rel=0.05)
            assert torch.allclose(estimate.sum(-1), torch.ones(20_000), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tail_bucket_kl(UNIFORM, TEACHER, 0), "k must be at least 1, not 0"),
        (lambda: tcs(UNIFORM, TEACHER, -3), "k must be at least 1, not -3"),
        (lambda: draw_targets(TEACHER, 0), "samples must be at least 1"),
        (
            lambda: random_sampling_ce(
                UNIFORM, torch.tensor([0]), torch.ones(1), temperature=torch.tensor(2.0, requires_grad=True)
            ),
            "cannot train a temperature: fix it, or use tail_bucket_kl",
        ),
        (lambda: random_sampling_ce(UNIFORM, torch.tensor([0, 1]), torch.ones(1)), "must be one row for each"),
        (lambda: random_sampling_ce(UNIFORM, torch.tensor([0]), torch.ones(1), temperature=0.0), "above 0, not 0.0"),
        (
            lambda: random_sampling_ce(UNIFORM, torch.tensor([0]), torch.ones(1), torch.ones(2)),
            r"mask \(2,\) must have",
        ),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, message: str):
    with pytest.raises(ValueError, match=message) as told:
        call()
    assert "\n" not in str(told.value)


def test_a_perfect_student_of_a_copy_task_has_loss_0_only_where_both_predict_the_same_token():
    """Teacher and student are sure of the next token. Without the shift the student, which says position i's own token,
    is compared with the teacher's word on token i + 1."""
    tokens = torch.tensor([3, 1, 4, 1, 5, 2, 6])
    sure = 30.0 * torch.eye(8, dtype=torch.float64)
    teacher_LV = sure[tokens[1:]]
    assert tcs(sure[tokens[1:]], teacher_LV, k=4).item() == pytest.approx(0.0, abs=1e-12)
    assert tcs(sure[tokens[:-1]], teacher_LV, k=4).item() > 1.0


def test_a_next_token_distribution_is_no_concrete_score():
    """The target of the score is p(x1 | x2), which needs the right context; p(x1) is the same whatever comes after."""
    first, second = np.array([0.6, 0.4]), np.array([[0.9, 0.1], [0.2, 0.8]])
    joint = first[:, None] * second
    given_second = joint / joint.sum(0)
    assert given_second[:, 0] == pytest.approx([0.87096774, 0.12903226], abs=5e-9)
    assert given_second[:, 1] == pytest.approx([0.15789474, 0.84210526], abs=5e-9)
    # A student that says what an autoregressive teacher says of x1 is off by KL(p(x1 | x2) || p(x1)); weighted by p(x2)
    # that is the tokens' mutual information, H(x1) + H(x2) - H(x1, x2).
    student = torch.tensor(np.log(first))
    costs = [tcs(student, torch.tensor(np.log(given_second[:, i])), k=2).item() for i in (0, 1)]
    entropy = [-(p * np.log(p)).sum() for p in (first, joint.sum(0), joint)]
    assert joint.sum(0) @ costs == pytest.approx(entropy[0] + entropy[1] - entropy[2], abs=1e-12)
