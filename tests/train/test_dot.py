"""DOT by its worked example, its steady state, SGD as its special case, and what it refuses."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from asnn_goose.config.schema import TrainConfig
from asnn_goose.train.dot import DOT
from asnn_goose.train.engine import Engine


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step(optimiser: DOT, task: list[Tensor | None], kd: list[Tensor | None]) -> None:
    (group,) = optimiser.param_groups
    for p, gradient in zip(group["params"], task, strict=True):
        p.grad = gradient
    optimiser.hand_over(kd)
    optimiser.step()


def scalar(value: float) -> list[Tensor | None]:
    return [torch.tensor([value], dtype=torch.float64)]


def test_by_the_worked_example():
    theta = parameter(5.0)
    optimiser = DOT([theta], lr=0.1)
    # First gradients become the buffers.
    step(optimiser, scalar(1.0), scalar(1.0))
    assert theta.item() == pytest.approx(4.8, rel=1e-14)
    step(optimiser, scalar(2.0), scalar(-1.0))
    state = optimiser.state[theta]
    assert state["task"].item() == pytest.approx(2.825, rel=1e-14)
    assert state["kd"].item() == pytest.approx(-0.025, rel=1e-12)
    assert theta.item() - 4.8 == pytest.approx(-0.28, rel=1e-13)


def test_steady_state_multiplies_distillation_by_seven():
    theta = parameter(0.0)
    optimiser = DOT([theta], lr=0.0)
    for _ in range(1_500):  # 0.975^1500 = 3e-17.
        step(optimiser, scalar(1.0), scalar(1.0))
    task, kd = optimiser.state[theta]["task"].item(), optimiser.state[theta]["kd"].item()
    assert (task, kd) == pytest.approx((5.714285714285714, 40.0), rel=1e-12)
    assert kd / task == pytest.approx(7.0, rel=1e-12)


@given(
    seed=st.integers(0, 1000), momentum=st.floats(0.0, 0.99), weight_decay=st.floats(0.0, 0.5), steps=st.integers(1, 5)
)
def test_without_delta_it_is_sgd_on_the_sum(seed: int, momentum: float, weight_decay: float, steps: int):
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(3, generator=draw, dtype=torch.float64)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    dot = DOT([one], lr=0.1, momentum=momentum, delta=0.0, weight_decay=weight_decay)
    sgd = torch.optim.SGD([other], lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for _ in range(steps):
        task, kd = torch.randn(2, 3, generator=draw, dtype=torch.float64)
        step(dot, [task], [kd])
        other.grad = task + kd
        sgd.step()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_two_gradients_do_not_share_a_momentum():
    """Swapping them swaps their gains: the update differs from SGD on the sum, and from that of the swap."""
    moves = []
    for task, kd in ((1.0, 0.0), (0.0, 1.0)):
        theta = parameter(0.0)
        optimiser = DOT([theta], lr=1.0)
        step(optimiser, scalar(task), scalar(kd))
        step(optimiser, scalar(0.0), scalar(0.0))
        moves.append(theta.item())
    assert moves == pytest.approx([-1.825, -1.975], rel=1e-14)


@pytest.mark.parametrize("reached_by", ["task", "kd"])
def test_a_parameter_with_one_gradient_has_plain_momentum_and_decays_once(reached_by: str):
    lone, both, untouched = parameter(2.0), parameter(3.0), parameter(4.0)
    twin = parameter(2.0)
    optimiser = DOT([lone, both, untouched], lr=0.1, weight_decay=0.01)
    sgd = torch.optim.SGD([twin], lr=0.1, momentum=0.9, weight_decay=0.01)
    for value in (1.0, -0.5, 0.25):
        (g,) = scalar(value)
        task: list[Tensor | None] = [g if reached_by == "task" else None, g, None]
        kd: list[Tensor | None] = [g if reached_by == "kd" else None, g, None]
        step(optimiser, task, kd)
        twin.grad = g
        sgd.step()
    assert lone.item() == pytest.approx(twin.item(), rel=1e-14)
    assert set(optimiser.state[lone]) == {reached_by}
    assert untouched.item() == 4.0 and untouched not in optimiser.state
    # By hand for the other: wd theta enters the task's buffer alone.
    theta, v_task, v_kd = 3.0, 0.0, 0.0
    for value in (1.0, -0.5, 0.25):
        v_task, v_kd = 0.825 * v_task + value + 0.01 * theta, 0.975 * v_kd + value
        theta -= 0.1 * (v_task + v_kd)
    assert both.item() == pytest.approx(theta, rel=1e-13)


def test_a_resumed_run_goes_on_bit_for_bit():
    def gradients(number: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
        draw = torch.Generator().manual_seed(number)
        return [torch.randn(4, generator=draw)], [torch.randn(4, generator=draw)]

    theta = nn.Parameter(torch.linspace(-1, 1, 4))
    optimiser = DOT([theta], lr=0.1, weight_decay=0.1)
    for number in range(3):
        step(optimiser, *gradients(number))
    again = nn.Parameter(theta.detach().clone())
    resumed = DOT([again], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for number in range(3, 6):
        step(optimiser, *gradients(number))
        step(resumed, *gradients(number))
    assert torch.equal(theta, again)


def test_gradients_and_theta_are_left_alone():
    theta, (task,), (kd,) = parameter(1.0), scalar(2.0), scalar(3.0)
    assert task is not None and kd is not None
    optimiser = DOT([theta], lr=0.1, weight_decay=0.1)
    step(optimiser, [task], [kd])
    step(optimiser, [task], [kd])
    assert (task.item(), kd.item()) == (2.0, 3.0)


def test_through_the_engines_wrapper():
    """The wrapper imitates the optimiser's class, so its methods run on an object without its attributes."""
    engine = Engine(TrainConfig(scale="smoke", tokens=1, device="cpu", precision="float32"))
    engine.launch()
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 5.0)
    wrapped, (optimiser,) = engine.setup(module, DOT(module.parameters(), lr=0.1))
    # d/dw of 0.5 w^2 is 5, of 2 w is 2.
    weight = wrapped.module.weight
    (kd,) = torch.autograd.grad((2 * weight).sum(), weight)
    engine.backward((0.5 * weight.square()).sum())
    optimiser.hand_over([kd])
    optimiser.step()
    assert weight.item() == pytest.approx(5.0 - 0.1 * 7.0, rel=1e-6)
    with pytest.raises(RuntimeError, match="DOT has no distillation gradients for this step: call hand_over before"):
        optimiser.step()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: DOT([{"params": [p]}, {"params": [parameter(1.0)]}], lr=0.1), NotImplementedError, "one group of"),
        (
            lambda p: DOT([p], lr=0.1).add_param_group({"params": [parameter(1.0)]}),
            NotImplementedError,
            "DOT is defined for one group of parameters: put all of them into one",
        ),
        (lambda p: DOT([p], lr=0.1, momentum=0.9, delta=0.1), ValueError, r"delta \(0\.1\) must leave both momenta"),
        (lambda p: DOT([p], lr=0.1, momentum=0.05), ValueError, r"delta \(0\.075\) must leave both momenta"),
        (lambda p: DOT([p], lr=0.1, delta=-0.1), ValueError, r"delta \(-0\.1\) must leave both momenta"),
        (lambda p: DOT([p], lr=-0.1), ValueError, r"lr must be at least 0, not -0\.1"),
        (lambda p: DOT([p], lr=0.1, weight_decay=math.nan), ValueError, "weight_decay must be at least 0, not nan"),
        (lambda p: DOT([p], lr=0.1).hand_over([None, None]), ValueError, "DOT has 1 parameters, but 2 gradients came"),
        (lambda p: DOT([p], lr=0.1).step(lambda: 0.0), NotImplementedError, "DOT needs two gradients"),
        (lambda p: DOT([p], lr=0.1).step(), RuntimeError, "call hand_over before step"),
    ],
)
def test_what_it_refuses(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message) as told:
        call(parameter(1.0))
    assert "\n" not in str(told.value)
