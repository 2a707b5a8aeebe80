"""Balancing by norms and by learned weights: printed values, toy updates worked out by hand, laws, resumption."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asnn_goose.train.balance import (
    BALANCERS,
    GradientNorms,
    GradNorm,
    Uncertainty,
    gradnorm_objective,
    uncertainty_objective,
)
from asnn_goose.train.term_gradients import Balancer, inner_products, weighted_sum

# The printed values of the papers' worked examples have at least 8 digits.
PRINTED = 5e-9
TERMS = ("ce", "forward_kl")
# Norms 2 and 0.5, inner product -0.6.
TOY = {"ce": [2.0, 0.0], "forward_kl": [-0.3, 0.4]}
TOY_LOSSES = {"ce": 4.0, "forward_kl": 1.0}


def gradients(values: dict[str, list[float]]) -> dict[str, list[Tensor | None]]:
    """One parameter of as many entries."""
    return {name: [torch.tensor(value, dtype=torch.float64)] for name, value in values.items()}


def combine(balancer: Balancer, step: int, given_now, losses: dict[str, float]):
    """(the update's gradient, the factors that made it)."""
    factors = balancer.factors(step, given_now, losses)
    return weighted_sum(given_now, factors), factors


def numbers(parts: list[Tensor | None]) -> list[float]:
    return torch.cat([part.flatten() for part in parts if part is not None]).tolist()


def float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def started(balancer: Balancer) -> Balancer:
    if isinstance(balancer, GradNorm):
        balancer.record_start({"ce": 8.0, "forward_kl": 1.0})
    return balancer


@pytest.mark.parametrize(
    ("mode", "options", "updates"),
    [
        ("none", {}, [[1.7, 0.4], [1.7, 0.4]]),
        # Factor 0.5 * 2 / 0.5 = 2 for the KL.
        ("gradient_norm", {"ratio": 0.5}, [[1.4, 0.8], [1.4, 0.8]]),
        # Norms 2, 0.5, r = 2/3, 4/3: targets 1.25 r^1.5 = 0.68, 1.92, slopes +2, -0.5; w = 1 - 0.2, 1 + 0.05 of sum
        # 1.85, which act from the second step on.
        ("gradnorm", {"lr": 0.1}, [[1.7, 0.4], [(1.6 - 0.315) / 0.925, 0.42 / 0.925]]),
        # Slopes 0.5 - 0.5 L = -1.5, 0, so s = 0.15, 0.
        ("uncertainty", {"lr": 0.1}, [[0.85, 0.2], [math.exp(-0.15) - 0.15, 0.2]]),
        # CE gives way by 0.6 / 0.25 of the KL, the KL by 0.6 / 4 of CE.
        ("pcgrad", {}, [[1.15 * 2 - 3.4 * 0.3, 3.4 * 0.4]] * 2),
        ("project_kd", {}, [[2.0, 0.4], [2.0, 0.4]]),
    ],
)
def test_each_mode_changes_the_update_as_stated(mode: str, options: dict, updates: list[list[float]]):
    balancer = started(BALANCERS[mode](TERMS, **options))
    for step, wanted in enumerate(updates):
        found, factors = combine(balancer, step, gradients(TOY), TOY_LOSSES)
        # float64 sums of two products.
        assert numbers(found) == pytest.approx(wanted, rel=1e-14)
        assert numbers(weighted_sum(gradients(TOY), factors)) == numbers(found)
    assert (updates[-1] == [1.7, 0.4]) == (mode == "none")


def test_every_mode_is_covered_above():
    (mark,) = (m for m in test_each_mode_changes_the_update_as_stated.pytestmark if m.name == "parametrize")
    assert [case[0] for case in mark.args[1]] == list(BALANCERS)


@pytest.mark.parametrize("mode", BALANCERS)
def test_a_resumed_run_goes_on_bit_for_bit(mode: str):
    def run(balancer: Balancer, steps: range) -> list[list[float]]:
        made = []
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            given_now = {name: [torch.randn(5, generator=draw), None] for name in (*TERMS, "hidden")}
            losses = {name: 0.1 + abs(math.sin(step + i)) for i, name in enumerate(given_now)}
            if balancer.needs_gradients(step):
                made.append(numbers(combine(balancer, step, given_now, losses)[0]))
            else:
                made.append(numbers(weighted_sum(given_now, balancer.weights())))
                balancer.observe(losses)
        return made

    def new() -> Balancer:
        return BALANCERS[mode]((*TERMS, "hidden"), **({"every": 3} if mode == "gradient_norm" else {}))

    whole, first, second = new(), new(), new()
    for balancer in (whole, first):
        if isinstance(balancer, GradNorm):
            balancer.record_start({"ce": 3.0, "forward_kl": 1.0, "hidden": 2.0})
    wanted = run(whole, range(13))
    before = run(first, range(7))
    kept = first.state_dict()
    written = copy.deepcopy(kept)
    second.load_state_dict(kept)
    assert before + run(second, range(7, 13)) == wanted
    run(first, range(7, 13))
    assert kept == written  # Neither run's later steps reach what was saved.


@given(
    norms=st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)),
    ratio=st.floats(0.1, 2.0),
    angle=st.floats(0.0, 6.28),
)
def test_balanced_norms_stand_in_the_ratio_or_at_a_clamp(norms: tuple[float, ...], ratio: float, angle: float):
    names = ("forward_kl", "ce", "hidden")
    balancer = GradientNorms(names, ratio=ratio, low=0.05, high=50.0)
    values = {
        n: [x * math.cos(angle * i), x * math.sin(angle * i)] for i, (n, x) in enumerate(zip(names, norms, strict=True))
    }
    _, factors = combine(balancer, 0, gradients(values), dict.fromkeys(names, 1.0))
    assert factors["ce"] == 1.0 and factors == balancer.weights()
    for name, norm in zip(names, norms, strict=True):
        if name != "ce":
            wanted = min(max(ratio * norms[1] / norm, 0.05), 50.0)
            assert factors[name] == pytest.approx(wanted, rel=1e-12)


def test_norms_are_averaged_over_measurements_and_kept_between_them():
    balancer = GradientNorms(TERMS, every=5, decay=0.75, high=100.0)
    assert [balancer.needs_gradients(step) for step in (0, 1, 5)] == [True, True, True]
    for step in range(10):
        now = gradients({"ce": [4.0, 0.0], "forward_kl": [0.0, 1.0 if step == 0 else 0.2]})
        _, factors = combine(balancer, step, now, TOY_LOSSES)
        assert balancer.needs_gradients(step + 1) == (step in (4, 9))
        # The average is 1 after the first measurement and 0.75 + 0.25 * 0.2 = 0.8 after the one of step 5.
        assert factors["forward_kl"] == pytest.approx(4.0 if step < 5 else 5.0, rel=1e-14)
    assert balancer.state_dict() == {"norms": pytest.approx({"ce": 4.0, "forward_kl": 0.8}, rel=1e-14)}


def test_terms_without_a_gradient_do_not_spoil_the_average():
    balancer = GradientNorms(TERMS, every=1, decay=0.5)
    for ce, kd, wanted in ((0.0, 1.0, 1.0), (2.0, 0.0, 1.0), (2.0, 1.0, 2.0), (0.0, 9.0, 2.0), (2.0, 0.0, 2.0)):
        now = gradients({"ce": [ce], "forward_kl": [kd]})
        assert combine(balancer, 0, now, TOY_LOSSES)[1] == {"ce": 1.0, "forward_kl": wanted}


def test_a_term_of_equal_value_but_smaller_gradient_is_raised():
    """Equal losses do not mean equal gradients: x^2/2 and 10 (1 - cos(x / 10)) at x = 1 differ by a factor of 10."""
    x = float64([1.0]).requires_grad_()
    terms = {"ce": 0.5 * x.square().sum(), "hidden": (10.0 * (1.0 - torch.cos(x / 10.0)) + 0.45).sum()}
    assert terms["hidden"].item() == pytest.approx(terms["ce"].item(), rel=1e-4)
    given_now = {name: list(torch.autograd.grad(term, x)) for name, term in terms.items()}
    losses = {name: term.item() for name, term in terms.items()}
    _, factors = combine(GradientNorms(tuple(terms), high=100.0), 0, given_now, losses)
    assert factors["hidden"] == pytest.approx(1.0 / math.sin(0.1), rel=1e-12)


def test_gradnorm_by_its_worked_example():
    weights = float64([1.0, 1.0]).requires_grad_()
    value, targets = gradnorm_objective(weights, float64([3.0, 1.0]), float64([1.0 / 2.0, 1.0 / 1.0]), 1.5)
    value.backward()
    assert targets.tolist() == pytest.approx([1.08866211, 3.07920144], rel=PRINTED)
    assert value.item() == pytest.approx(3.990539327774369, rel=1e-14)
    assert weights.grad is not None and weights.grad.tolist() == [3.0, -1.0]
    assert not targets.requires_grad

    balancer = GradNorm(TERMS, lr=0.025)
    balancer.record_start({"ce": 2.0, "forward_kl": 1.0})
    now = gradients({"ce": [3.0, 0.0], "forward_kl": [0.0, 1.0]})
    found, factors = combine(balancer, 0, now, {"ce": 1.0, "forward_kl": 1.0})
    assert factors == {"ce": 1.0, "forward_kl": 1.0} and numbers(found) == [3.0, 1.0]
    assert list(balancer.weights().values()) == pytest.approx([0.94871795, 1.05128205], rel=PRINTED)
    assert numbers(combine(balancer, 1, now, {"ce": 1.0, "forward_kl": 1.0})[0]) == pytest.approx(
        [3 * 0.94871795, 1.05128205], rel=PRINTED
    )


@given(
    norms=st.lists(st.floats(0.0, 100.0), min_size=2, max_size=4),
    progress=st.lists(st.floats(0.0, 10.0), min_size=4, max_size=4),
    lr=st.floats(1e-4, 10.0),
)
def test_gradnorms_weights_stay_positive_and_sum_to_n(norms: list[float], progress: list[float], lr: float):
    names = [f"term{i}" for i in range(len(norms))]
    balancer = GradNorm(names, lr=lr)
    balancer.record_start(dict.fromkeys(names, 1.0))
    for step in range(3):
        losses = dict(zip(names, progress, strict=False))
        combine(balancer, step, gradients({name: [norm] for name, norm in zip(names, norms, strict=True)}), losses)
        weights = balancer.weights().values()
        assert min(weights) > 0.0 and sum(weights) == pytest.approx(len(norms), rel=1e-12)


def test_gradnorm_settles_where_the_steeper_term_meets_its_target():
    """Raw norms 3 and 1, r = 2/3 and 4/3: both cannot meet, since r_1^1.5 + r_2^1.5 > 2. Below its target the steeper
    one gains from a step and the scaling back, above it loses: 3 w = r_1^1.5 (3 w + 2 - w) / 2."""
    balancer = GradNorm(TERMS, lr=1e-3)
    balancer.record_start({"ce": 2.0, "forward_kl": 1.0})
    for step in range(1_000):
        combine(balancer, step, gradients({"ce": [3.0], "forward_kl": [1.0]}), {"ce": 1.0, "forward_kl": 1.0})
    wanted = (2 / 3) ** 1.5 / (3 - (2 / 3) ** 1.5)
    # A step of fixed size, lr times the slope 3, circles around the point.
    assert balancer.weights()["ce"] == pytest.approx(wanted, abs=3e-3)


def test_gradnorm_waits_for_its_start():
    balancer = GradNorm(TERMS)
    assert not balancer.needs_gradients(0)
    assert combine(balancer, 0, gradients(TOY), TOY_LOSSES)[1] == balancer.weights() == {"ce": 1.0, "forward_kl": 1.0}
    with pytest.raises(ValueError, match=r"loss term forward_kl is 0\.0 as GradNorm starts: start when it is above 0"):
        balancer.record_start({"ce": 1.0, "forward_kl": 0.0})
    assert not balancer.needs_gradients(1)
    balancer.record_start(TOY_LOSSES)
    assert balancer.needs_gradients(1)
    # Where every term has reached 0, nothing is left to compare.
    combine(balancer, 1, gradients(TOY), {"ce": 0.0, "forward_kl": 0.0})
    assert balancer.weights() == {"ce": 1.0, "forward_kl": 1.0}


def test_uncertainty_by_its_worked_example():
    s = float64([0.0, 0.0]).requires_grad_()
    value = uncertainty_objective(float64([2.0, 0.5]), s)
    value.backward()
    assert value.item() == 1.25
    assert s.grad is not None and s.grad.tolist() == [-0.5, 0.25]
    optimum = float64([2.0, 0.5]).log()
    assert uncertainty_objective(float64([2.0, 0.5]), optimum).item() == pytest.approx(1.0, rel=1e-14)
    # Without a bound on s the total falls for ever while the loss goes to 0.
    tiny = float64([1e-4])
    assert uncertainty_objective(tiny, tiny.log()).item() == pytest.approx(-4.105, abs=5e-4)

    balancer = Uncertainty(TERMS, lr=0.1)
    balancer.observe({"ce": 2.0, "forward_kl": 0.5})
    assert balancer.state_dict()["log_variances"] == pytest.approx({"ce": 0.05, "forward_kl": -0.025}, rel=1e-14)


def test_uncertainty_finds_its_optimum():
    balancer = Uncertainty(TERMS, lr=0.5)
    for _ in range(200):
        balancer.observe({"ce": 2.0, "forward_kl": 0.5})
    # factor = 1 / (2 L): the contraction is at most 0.76 a step.
    assert balancer.weights() == pytest.approx({"ce": 0.25, "forward_kl": 1.0}, rel=1e-12)


def test_uncertainty_is_clamped_and_comes_back():
    balancer = Uncertainty(TERMS, lr=0.5)
    for _ in range(200):
        balancer.observe({"ce": 1e9, "forward_kl": 1e-9})
    # exp(3) / 2: a weight of 10, where the optimum's would be 5e8.
    assert balancer.weights() == pytest.approx({"ce": math.exp(-3) / 2, "forward_kl": math.exp(3) / 2}, rel=1e-12)
    balancer.observe({"ce": 1.0, "forward_kl": 1.0})
    (ce, kd) = balancer.weights().values()
    assert ce > math.exp(-3) / 2 and kd < math.exp(3) / 2


def test_uncertainty_learns_the_same_from_losses_alone():
    one, other = Uncertainty(TERMS), Uncertainty(TERMS)
    combine(one, 0, gradients(TOY), TOY_LOSSES)
    other.observe(TOY_LOSSES)
    assert one.state_dict() == other.state_dict() and not one.needs_gradients(0)


def test_parameters_that_a_term_does_not_reach():
    given_now = {
        "ce": [torch.tensor([[1.0, 2.0]]), None, torch.tensor(3.0), None],
        "forward_kl": [torch.tensor([[4.0, -1.0]]), torch.ones(2), None, None],
    }
    before = {name: [None if x is None else x.clone() for x in parts] for name, parts in given_now.items()}
    assert inner_products(given_now).tolist() == [[14.0, 2.0], [2.0, 19.0]]
    found = weighted_sum(given_now, {"ce": 2.0, "forward_kl": -1.0})
    assert [None if x is None else x.tolist() for x in found] == [[[-2.0, 5.0]], [-1.0, -1.0], 6.0, None]
    for name, parts in given_now.items():
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(parts, before[name], strict=True))  # pyright: ignore[reportArgumentType]
    assert inner_products({"ce": [None], "hidden": [torch.ones(1)]}).tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_bfloat16_gradients_are_summed_in_float32():
    # bfloat16 has 8 bits: 257 would become 256.
    assert inner_products({"ce": [torch.ones(257, dtype=torch.bfloat16)]}).tolist() == [[257.0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradientNorms(TERMS, reference="hidden"), ValueError, r"the reference hidden is not among the loss"),
        (lambda: GradientNorms(TERMS, low=2.0, high=1.0), ValueError, r"low \(2\.0\) must be above 0 and at most high"),
        (lambda: GradNorm(TERMS, floor=0.0), ValueError, "floor must lie strictly between 0 and 1, not 0"),
        (lambda: Uncertainty(TERMS, low=1.0), ValueError, r"s starts at 0, which must lie between low \(1\.0\) and"),
        (lambda: Uncertainty(TERMS).observe({"ce": 1.0}), KeyError, r"the balancer is for the loss terms .* came"),
        (
            lambda: Uncertainty(TERMS).observe({"ce": 1.0, "forward_kl": math.nan}),
            FloatingPointError,
            r"loss term forward_kl is nan: lower train\.lr",
        ),
        (
            lambda: GradNorm(TERMS).record_start({"ce": 1.0, "forward_kl": -1.0}),
            ValueError,
            r"loss term forward_kl is -1\.0, and GradNorm compares shares of losses of at least 0",
        ),
        (
            lambda: combine(GradientNorms(TERMS), 0, gradients(TOY | {"ce": [math.inf, 0.0]}), TOY_LOSSES),
            FloatingPointError,
            r"the gradient of loss term ce is not finite: lower train\.lr",
        ),
        (
            lambda: combine(Balancer(TERMS), 0, dict(reversed(gradients(TOY).items())), TOY_LOSSES),
            ValueError,
            r"gradients must be lists of one length for \['ce', 'forward_kl'\] in this order, not \{'forward_kl': 1",
        ),
        (
            lambda: combine(Balancer(TERMS), 0, {"ce": [None], "forward_kl": []}, TOY_LOSSES),
            ValueError,
            r"not \{'ce': 1, 'forward_kl': 0\}",
        ),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message) as told:
        call()
    assert "\n" not in str(told.value)
