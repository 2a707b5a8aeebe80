"""One optimiser step against plain torch: the same sums by hand, from the logits of whole windows.

Shapes: B windows, L tokens, N predicted positions, V vocabulary.
"""

import hashlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from asnn_goose.data.loader import Batch
from asnn_goose.train.objective import Distillation
from asnn_goose.train.setting import Setting
from asnn_goose.train.step import StepContext, accumulate_gradients
from asnn_goose.train.teacher_targets import Targets

W_CE, W_KD = 0.3, 0.7
PLAIN = {
    "distillation__losses__ce__weight": W_CE,
    "distillation__losses__forward_kl__weight": W_KD,
    "distillation__targets": "online",
}
LEARNED_AT_3 = {"distillation__temperature__init": 3.0, "distillation__temperature__anchor": 2.0}


@pytest.fixture
def build(moved):
    return lambda version="v11_1", **changes: moved(version, **(PLAIN | changes))


def part(batch: Batch, *rows: int) -> Batch:
    return Batch(batch.input_ids[list(rows)], batch.mask[list(rows)])


def gradients(setting: Setting, batches: list[Batch], step: int = 0) -> tuple[dict[str, Tensor], dict[str, float]]:
    setting.module.zero_grad(set_to_none=True)
    metrics = accumulate_gradients(setting.context, batches, step)
    return {name: p.grad.clone() for name, p in setting.module.named_parameters() if p.grad is not None}, metrics


def logits_by_hand(setting: Setting, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(student's [N, V], teacher's [N, V], targets [N]) at the predicted positions, in float64."""
    student_BLV = setting.module.student(batch.input_ids).logits
    with torch.no_grad():
        teacher_BLV = setting.teacher.model(batch.input_ids).logits[..., : setting.teacher.vocab_size]
    keep = batch.mask[:, 1:]
    targets = batch.input_ids[:, 1:][keep]
    return student_BLV[:, :-1][keep].double(), teacher_BLV[:, :-1][keep].double(), targets


def kd_by_hand(student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float) -> Tensor:
    """T^2 KL(p || q), token mean."""
    log_p, log_q = F.log_softmax(teacher_NV / temperature, -1), F.log_softmax(student_NV / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def test_the_step_is_the_weighted_token_mean_of_all_its_tokens(build, ragged):
    setting = build("v10")
    batch = ragged(setting)
    found, metrics = gradients(setting, [part(batch, 0, 2), part(batch, 1), part(batch, 3)])
    student_NV, teacher_NV, targets_N = logits_by_hand(setting, batch)
    ce, kd = F.cross_entropy(student_NV, targets_N), kd_by_hand(student_NV, teacher_NV, 2.0)
    setting.module.zero_grad(set_to_none=True)
    (W_CE * ce + W_KD * kd).backward()
    expected = {name: p.grad for name, p in setting.module.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 30
    # The step's logits, softmaxes and sums are float32: about 1e-6 each.
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 2e-5, name
    assert metrics["valid_tokens"] == len(targets_N) == 16 + 9 + 2 + 13 - 4
    assert metrics["loss_ce_raw"] == pytest.approx(ce.item(), rel=1e-5)
    assert metrics["loss_forward_kl_raw"] == pytest.approx(kd.item(), rel=1e-5)
    assert metrics["loss_ce_weighted"] == pytest.approx(W_CE * metrics["loss_ce_raw"], rel=1e-12)
    assert metrics["loss_total"] == pytest.approx((W_CE * ce + W_KD * kd).item(), rel=1e-5)


@pytest.mark.parametrize("parts", [[(0, 1), (2, 3)], [(3,), (0, 1, 2)], [(0,), (1,), (2,), (3,)]])
def test_ragged_micro_batches_give_the_gradient_of_one_batch(build, ragged, parts):
    setting = build(**LEARNED_AT_3)
    batch, step = ragged(setting), setting.context.total_steps
    whole, metrics = gradients(setting, [batch], step)
    split, split_metrics = gradients(setting, [part(batch, *rows) for rows in parts], step)
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        # float32 sums in another order.
        assert relative(split[name], gradient) < 1e-5, name
    assert split_metrics == pytest.approx(metrics, rel=1e-5)


def test_the_anchor_counts_once_per_step_and_stands_outside_the_reversal(build, ragged):
    setting = build(**LEARNED_AT_3)
    batch = ragged(setting)
    for parts in ([batch], [part(batch, row) for row in range(4)]):
        found, metrics = gradients(setting, parts, step=0)
        # lambda is 0: d/draw 0.1 (T - 2)^2 at T = 3 with dT/draw = (5 - 1) / 4. In float32.
        assert metrics["temperature_lambda"] == 0.0
        assert found["temperature.raw"].item() == pytest.approx(0.2, rel=1e-6)
        assert metrics["loss_anchor"] == pytest.approx(0.1, rel=1e-6)


def test_lambda_turns_the_sign_of_the_distillation_term_alone(build, ragged):
    setting = build(**LEARNED_AT_3)
    batch = ragged(setting)
    found, metrics = gradients(setting, [part(batch, 0, 1), part(batch, 2, 3)], setting.context.total_steps)
    slope = metrics["temperature_gradient"]
    assert metrics["temperature_lambda"] == 1.0 and abs(slope) > 1e-3
    # -lambda w dL_KD/dT + 2 c (T - a), both times dT/draw = 1; in float32.
    assert found["temperature.raw"].item() == pytest.approx(-W_KD * slope + 0.2, rel=1e-5)


def test_the_logged_slope_is_the_derivative_of_the_distillation_term(build, ragged):
    setting = build(**LEARNED_AT_3)
    batch = ragged(setting)
    _, metrics = gradients(setting, [part(batch, 0, 1, 2), part(batch, 3)], 1)
    with torch.no_grad():
        student_NV, teacher_NV, _ = logits_by_hand(setting, batch)
        h = 1e-4
        up, down = (kd_by_hand(student_NV, teacher_NV, 3.0 + d).item() for d in (h, -h))
    # The slope is a small difference of float32 sums.
    assert metrics["temperature_gradient"] == pytest.approx((up - down) / (2 * h), rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_student_does_not_feel_the_reversal(build, ragged, share):
    fixed = build("v10", distillation__temperature__init=3.0)
    learned = build(**LEARNED_AT_3)
    batch, step = ragged(fixed), round(share * learned.context.total_steps)
    expected, _ = gradients(fixed, [batch], step)
    found, _ = gradients(learned, [batch], step)
    # raw = 0 gives T = 1 + 4/2 = 3 without rounding, so not a bit may differ.
    assert set(found) - set(expected) == {"temperature.raw"}
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_lambda_follows_the_optimiser_step(build, ragged):
    setting = build(train__steps=40, train__accumulate=3)
    # 0 up to 20 % of the run, then half a cosine.
    assert [setting.context.lam(step) for step in (0, 8, 24, 40)] == pytest.approx([0.0, 0.0, 0.5, 1.0], abs=1e-12)


def test_a_scheduled_temperature_is_used_logged_and_followed_by_the_anchor(build, ragged):
    ramp = {f"distillation__temperature__ramp__{key}": value for key, value in {"start": 1.5, "end": 1.0}.items()}
    for version, init in (("v10", 2.0), ("v11_1", 2.0)):
        setting = build(version, **ramp, distillation__temperature__init=init, train__steps=8)
        batch = ragged(setting)
        _, metrics = gradients(setting, [batch], step=4)
        if version == "v10":
            # Half way from 1.5 to 2.
            student_NV, teacher_NV, _ = logits_by_hand(setting, batch)
            assert metrics["temperature"] == pytest.approx(1.75)
            expected = kd_by_hand(student_NV, teacher_NV, 1.75).item()
            assert metrics["loss_forward_kl_raw"] == pytest.approx(expected, rel=1e-5)
        else:
            # The learned one starts at 1.5 and its anchor has gone on: 0.1 (1.5 - 1.75)^2.
            assert metrics["temperature"] == pytest.approx(1.5, rel=1e-6)
            assert metrics["loss_anchor"] == pytest.approx(0.1 * 0.25**2, rel=1e-5)


def test_a_minimised_temperature_climbs_where_the_adversary_turns(build, ragged):
    """Against logits for which T^2 KL falls with T: Adam goes up by its rate, the reversal down."""
    minimised = build(distillation__temperature__mode="minimised", distillation__temperature__anchor_weight=0.0)
    learned = build(distillation__temperature__anchor_weight=0.0, distillation__temperature__lambda_start=0.0)
    signs = []
    for setting in (minimised, learned):
        found, metrics = gradients(setting, [ragged(setting)], setting.context.total_steps)
        signs.append(math.copysign(1.0, found["temperature.raw"].item() * metrics["temperature_gradient"]))
        assert abs(metrics["temperature_gradient"]) > 1e-4
    # The gradient that an optimiser goes against: dL/dT itself, and its opposite.
    assert signs == [1.0, -1.0]
    before = minimised.module.temperature()[1].item()
    up = -math.copysign(1.0, gradients(minimised, [ragged(minimised)], 0)[1]["temperature_gradient"])
    minimised.optimisers.temperature.step()
    # Adam's first step is its rate, here on log T.
    assert minimised.module.temperature()[1].item() == pytest.approx(before * math.exp(up * 0.01), rel=1e-4)


def test_the_teacher_stays_as_it_was(build, ragged):
    setting = build()

    def digest():
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in setting.teacher.model.parameters()))

    batch = ragged(setting)
    before, first = digest().hexdigest(), setting.teacher.states(batch.input_ids)
    for step in range(3):
        gradients(setting, [batch], step)
        for optimiser in setting.optimisers.present():
            optimiser.step()
    assert digest().hexdigest() == before
    assert torch.equal(setting.teacher.states(batch.input_ids), first)
    assert not any(p.requires_grad or p.grad is not None for p in setting.teacher.model.parameters())
    assert not any(module.training for module in setting.teacher.model.modules())


class Parrot(Distillation):
    """Says what the teacher says."""

    def imitate(self, targets: Targets) -> None:
        said_BLE = targets.states_BLE
        assert said_BLE is not None
        self.states = lambda input_ids: said_BLE
        self.head_VC = lambda: targets.teacher.head_VE


class Forgetful(Distillation):
    """Leaves a configured term out of its step."""

    def forward(self, *arguments, **options):
        sums, *temperatures = super().forward(*arguments, **options)
        return {"ce": sums["ce"]}, *temperatures


def under_engine(setting: Setting, module: Distillation) -> StepContext:
    wrapped, _ = setting.engine.setup(module, torch.optim.SGD(module.parameters()))
    return replace(setting.context, module=wrapped)


def test_a_wide_teacher_reaches_the_loss_unnarrowed_by_a_narrow_student(build, ragged):
    setting = build("v10", train__precision="bfloat16")
    batch = ragged(setting)
    module = Parrot(setting.module.student, setting.experiment.distillation)
    targets = setting.context.targets(batch)
    module.imitate(targets)
    weights = setting.context.weights(0)
    sums, *_ = under_engine(setting, module).module(batch.input_ids, batch.mask, targets, 0.0, 2.0, weights)
    # The same float32 products on both sides; had one been rounded to bfloat16, the sum would be about 0.1.
    assert sums["forward_kl"].item() == pytest.approx(0.0, abs=1e-5)


def test_a_configured_loss_that_is_missing_from_the_step_is_an_error(build, ragged):
    setting = build()
    context = under_engine(setting, Forgetful(setting.module.student, setting.experiment.distillation))
    with pytest.raises(KeyError, match="'forward_kl'"):
        accumulate_gradients(context, [ragged(setting)], 0)


def test_a_loss_that_is_not_finite_is_named(build, ragged):
    setting = build()
    with torch.no_grad():
        setting.module.student.model.blocks[0].get_submodule("channel_mix.key").get_parameter("weight")[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"loss term ce is nan: lower train\.lr"):
        accumulate_gradients(setting.context, [ragged(setting)], 0)


def test_a_step_without_a_token_to_predict_is_0_and_moves_nothing(build, ragged):
    setting = build("v10")
    batch = ragged(setting)
    empty = Batch(batch.input_ids, torch.zeros_like(batch.mask))
    found, metrics = gradients(setting, [empty])
    assert metrics["loss_total"] == 0.0 and metrics["valid_tokens"] == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())
