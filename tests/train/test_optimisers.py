"""Who is in which group, what a single update does to them, and what clipping leaves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.config.distillation import TemperatureConfig
from asnn_goose.config.schema import TrainConfig
from asnn_goose.train.optimisers import clip, plain_adamw, set_learning_rates
from asnn_goose.train.setting import Setting, prepare
from asnn_goose.train.step import accumulate_gradients

NEURONS = {
    "student__neuron__learn_threshold": "channel",
    "student__neuron__learn_decay": "layer",
    "student__neuron__decay": 0.9,
}


@pytest.fixture
def build(tiny_experiment):
    def built(**changes) -> Setting:
        return prepare(tiny_experiment(**changes))

    return built


def groups(setting: Setting) -> dict[str, dict]:
    return {group["name"]: group for group in setting.optimisers.student.param_groups}


def names_of(setting: Setting, parameters) -> set[str]:
    names = {id(p): name for name, p in setting.module.named_parameters()}
    return {names[id(p)] for p in parameters}


def one_step(setting: Setting) -> dict[str, torch.Tensor]:
    """Take the run's first step; returns the parameters as they were."""
    before = {name: p.detach().clone() for name, p in setting.module.named_parameters()}
    train = setting.experiment.train
    set_learning_rates(setting.optimisers.student, train, 0, setting.context.total_steps)
    accumulate_gradients(setting.context, [next(setting.windows) for _ in range(train.accumulate)], 0)
    clip(setting.module, train, setting.experiment.distillation.temperature)
    for optimiser in setting.optimisers.present():
        optimiser.step()
    return before


@pytest.mark.parametrize("changes", [{}, NEURONS, {"train__embeddings": "trained"}, {"student__width": 16}])
def test_every_trainable_parameter_is_in_exactly_one_group(build, changes):
    setting = build(**changes)
    grouped = [p for o in setting.optimisers.present() for group in o.param_groups for p in group["params"]]
    trainable = [p for p in setting.module.parameters() if p.requires_grad]
    assert len(grouped) == len({id(p) for p in grouped}) == len(trainable)
    assert {id(p) for p in grouped} == {id(p) for p in trainable}
    assert not {id(p) for p in grouped} & {id(p) for p in setting.teacher.model.parameters()}
    assert {p.dtype for p in grouped} == {torch.float32}


def test_frozen_embeddings_are_in_no_group_and_trained_ones_count_once(build):
    frozen = build()
    named = {name for group in groups(frozen).values() for name in names_of(frozen, group["params"])}
    assert named and not any("embeddings" in name or "lm_head" in name for name in named)
    setting = build(train__embeddings="trained")
    student = setting.module.student
    assert student.lm_head.weight is student.model.embeddings.weight
    inside = [
        p for group in groups(setting).values() for p in group["params"] if p.shape[:1] == (setting.teacher.vocab_size,)
    ]
    assert len(inside) == 1 and inside[0] is student.lm_head.weight


def test_the_groups_hold_what_their_names_say(build):
    setting = build(**NEURONS, student__norm="rms")
    named = {name: names_of(setting, group["params"]) for name, group in groups(setting).items()}
    last = {name: {n.rpartition(".")[2] for n in names} for name, names in named.items()}
    assert last["neurons"] == {"log_threshold", "decay_logit"}
    assert last["matrices"] == {"weight", "down", "up"}
    # Norms, biases, mixing ratios, and RWKV-7's bonus, which has two dimensions but multiplies element by element.
    assert {"bonus_HD", "bias_C", "mix_k_C", "mix_C", "norm_weight_C", "bias", "weight"} <= last["vectors"]
    assert all(p.ndim == 1 for n, p in setting.module.named_parameters() if n in named["vectors"] and "bonus" not in n)
    assert all(p.ndim == 2 for n, p in setting.module.named_parameters() if n in named["matrices"])


def test_without_a_gradient_only_matrices_decay(build):
    setting = build(**NEURONS, train__weight_decay=0.1)
    for parameter in setting.module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    matrices = names_of(setting, groups(setting)["matrices"]["params"])
    before = {name: p.detach().clone() for name, p in setting.module.named_parameters()}
    lr = set_learning_rates(setting.optimisers.student, setting.experiment.train, 0, 4)
    for optimiser in setting.optimisers.present():
        optimiser.step()
    assert lr > 0
    for name, parameter in setting.module.named_parameters():
        # AdamW's decoupled decay; one float32 product.
        expected = before[name] * (1.0 - lr * 0.1) if name in matrices else before[name]
        torch.testing.assert_close(parameter, expected, rtol=3e-7, atol=0.0)
        assert name in matrices or torch.equal(parameter, before[name])


def test_the_first_update_moves_every_parameter_that_has_a_gradient(build):
    setting = build(train__warmup=1.0)
    before = one_step(setting)
    moved = {n for n, p in setting.module.named_parameters() if not torch.equal(p, before[n])}
    felt = {n for n, p in setting.module.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert felt <= moved
    # Output matrices start at 0, so what stands in front of them feels nothing yet; they do.
    assert {
        f"student.model.blocks.{i}.{m}.weight" for i in (0, 1) for m in ("time_mix.output", "channel_mix.value")
    } <= felt


def test_a_step_without_loss_leaves_the_temperature(build):
    setting = build(distillation__temperature__init=3.0, distillation__temperature__anchor=2.0)
    assert setting.module.temperature is not None
    raw = setting.module.temperature.raw
    start = raw.detach().clone()
    for gradient in (None, torch.zeros(())):
        raw.grad = gradient
        setting.optimisers.present()[1].step()
        assert torch.equal(raw, start)
    raw.grad = torch.tensor(0.5)
    setting.optimisers.present()[1].step()
    # Plain SGD: lr times the gradient, in float32.
    assert (start - raw).item() == pytest.approx(0.01 * 0.5, rel=1e-5)


def test_the_temperature_has_a_constant_rate_and_no_decay(build):
    setting = build(distillation__temperature__lr=0.25)
    (group,) = setting.optimisers.present()[1].param_groups
    assert isinstance(setting.optimisers.present()[1], torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.25, 0, 0)
    for step in range(4):
        set_learning_rates(setting.optimisers.student, setting.experiment.train, step, 4)
    assert group["lr"] == 0.25


def test_student_and_temperature_are_clipped_apart(build):
    setting = build(train__clip=1e6)
    module, train, temperature = setting.module, setting.experiment.train, TemperatureConfig(clip=5.0)
    assert module.temperature is not None
    accumulate_gradients(setting.context, [next(setting.windows)], 0)
    gradients = {n: p.grad.clone() for n, p in module.student.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    for huge in (1e6, -1e6):
        module.temperature.raw.grad = torch.tensor(huge)
        # float32 sum of squares.
        assert clip(module, train, temperature) == pytest.approx(norm, rel=1e-5)
        assert module.temperature.raw.grad.item() == math.copysign(5.0, huge)
    for name, parameter in module.student.named_parameters():
        assert name not in gradients or torch.equal(parameter.grad, gradients[name])
    module.temperature.raw.grad = torch.tensor(0.125)
    clip(module, train.model_copy(update={"clip": norm / 4}), temperature)
    assert module.temperature.raw.grad.item() == 0.125
    for name, parameter in module.student.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name] / 4, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(build, value):
    setting = build()
    accumulate_gradients(setting.context, [next(setting.windows)], 0)
    setting.module.student.model.norm.get_parameter("weight").grad[3] = value  # pyright: ignore[reportOptionalSubscript]
    with pytest.raises(FloatingPointError, match=r"norm of the gradient is (nan|inf): lower train\.lr"):
        clip(setting.module, setting.experiment.train, setting.experiment.distillation.temperature)


def test_rates_follow_the_schedule_with_each_groups_factor(build):
    setting = build(train__neuron_lr_factor=7.0, train__lr=1e-2, train__lr_end=0.1, train__warmup=0.1)
    optimiser, train, total = setting.optimisers.student, setting.experiment.train, 50
    for step in (0, 3, 20, 50):
        x = step / total
        expected = 1e-2 * min(1.0, (step + 1) / 5) * (0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2)
        assert set_learning_rates(optimiser, train, step, total) == pytest.approx(expected, rel=1e-12)
        rates = {name: group["lr"] for name, group in groups(setting).items()}
        assert rates == pytest.approx({"matrices": expected, "vectors": expected, "neurons": 7 * expected}, rel=1e-12)


def test_adamw_averages_as_configured(build):
    setting = build(train__beta1=0.7, train__beta2=0.6)
    one_step(setting)
    optimiser = setting.optimisers.student
    assert {group["betas"] for group in optimiser.param_groups} == {(0.7, 0.6)}
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    for parameter in parameters:
        state, gradient = optimiser.state[parameter], parameter.grad
        # The first averages, of zeros and the gradient, in float32.
        torch.testing.assert_close(state["exp_avg"], 0.3 * gradient, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(state["exp_avg_sq"], 0.4 * gradient.square(), rtol=1e-6, atol=0.0)
    assert len(parameters) > 30


def test_group_names_and_factors_survive_a_state_dict(build):
    one, other = build(train__neuron_lr_factor=7.0), build(train__neuron_lr_factor=7.0)
    one_step(one)
    other.optimisers.student.load_state_dict(one.optimisers.student.state_dict())
    assert {n: (g["factor"], g["weight_decay"], g["lr"]) for n, g in groups(other).items()} == {
        n: (g["factor"], g["weight_decay"], g["lr"]) for n, g in groups(one).items()
    }
    # The wrapped optimiser must see the rates that are written after loading.
    set_learning_rates(other.optimisers.student, other.experiment.train, 1, 4)
    before = {name: p.detach().clone() for name, p in other.module.named_parameters()}
    for parameter in other.module.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    for group in other.optimisers.student.param_groups:
        group["lr"] = 0.0
    other.optimisers.student.step()
    assert all(torch.equal(p, before[n]) for n, p in other.module.named_parameters())


@given(total=st.integers(1, 100_000), warmup=st.floats(0.0, 1.0), end=st.floats(0.0, 1.0), share=st.floats(0.0, 1.0))
def test_no_update_before_the_last_is_wasted(total, warmup, end, share):
    train = TrainConfig(scale="smoke", tokens=1, warmup=warmup, lr_end=end)
    optimiser = torch.optim.SGD([{"params": [torch.zeros(1)], "factor": 1.0}], lr=1.0)
    first = set_learning_rates(optimiser, train, 0, total)
    some = set_learning_rates(optimiser, train, round(share * (total - 1)), total)
    assert 0.0 < first <= train.lr and 0.0 < some <= train.lr


def test_the_plain_optimiser_lets_matrices_alone_decay():
    block = torch.nn.ParameterDict(
        {
            "weight": torch.ones(2, 3),
            "bonus_HD": torch.ones(2, 3),
            "bias": torch.ones(3),
            "log_threshold": torch.ones(()),
        }
    )
    optimiser = plain_adamw(block.named_parameters("student.block"), lr=0.5, weight_decay=0.1)
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    kept = {name: bool((parameter == 1.0).all()) for name, parameter in block.items()}
    assert kept == {"weight": False, "bonus_HD": True, "bias": True, "log_threshold": True}
    # AdamW's decay is apart from its moments: w <- w - lr wd w.
    torch.testing.assert_close(block["weight"].detach(), torch.full((2, 3), 1.0 - 0.5 * 0.1))
