"""A step with a temperature per window or token, against the sums by hand in float64.

Shapes: B windows, L predicted positions, N counted positions, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from test_step import LEARNED_AT_3, PLAIN, W_KD, gradients, logits_by_hand, part, relative
from torch import Tensor

from asnn_goose.data.loader import Batch
from asnn_goose.schedules import InstanceTemperature, normalised_states
from asnn_goose.train.setting import Setting

SCOPES = ["sequence", "token"]


@pytest.fixture
def build(moved):
    def with_scope(scope: str, **changes) -> Setting:
        scoped = {"distillation__temperature__scope": scope}
        setting = moved("v11_1", **(PLAIN | LEARNED_AT_3 | scoped | changes))
        torch.nn.init.normal_(setting.module.temperature.out.weight, generator=torch.Generator().manual_seed(0))
        return setting

    return with_scope


def temperatures(setting: Setting, batch: Batch) -> Tensor:
    """The plain T of each predicted position [B, L]."""
    assert isinstance(setting.module.temperature, InstanceTemperature)
    with torch.no_grad():
        student = setting.module.states(batch.input_ids)[:, :-1]
        teacher = setting.teacher.states_and_layers(batch.input_ids, ())[0][:, :-1]
    return setting.module.temperature(normalised_states(student, teacher), batch.mask[:, 1:])[1]


def kd_by_hand(setting: Setting, batch: Batch, T_N: Tensor) -> Tensor:
    """Mean over the tokens of T_i^2 KL_i."""
    student_NV, teacher_NV, _ = logits_by_hand(setting, batch)
    T_N1 = T_N.double()[:, None]
    log_p, log_q = F.log_softmax(teacher_NV / T_N1, -1), F.log_softmax(student_NV.detach() / T_N1, -1)
    return (T_N1**2 * (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)).mean()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"train__optimiser": "dot", "train__lr": 1e-3}, {"distillation__balance__mode": "project_kd"}],
    ids=["one gradient", "dot", "project_kd"],
)
def test_values_and_both_gradients_by_hand(build, ragged, scope, changes):
    """In one backward pass, or with the gradient of each term apart."""
    setting = build(scope, **changes)
    batch, step = ragged(setting), setting.context.total_steps
    found, metrics = gradients(setting, [batch], step)
    keep = batch.mask[:, 1:]
    T_N = temperatures(setting, batch)[keep]
    assert T_N.std() > 0.1 and metrics["temperature_lambda"] == 1.0
    kd = kd_by_hand(setting, batch, T_N)
    anchor = 0.1 * ((T_N - 2.0) ** 2).mean()
    parameters = dict(setting.module.temperature.named_parameters())
    # The adversary goes up the distillation term and down the anchor's.
    # project_kd multiplies a term that opposes ce.
    weight = metrics["weight_forward_kl"] if "distillation__balance__mode" in changes else W_KD
    wanted = torch.autograd.grad(-weight * kd + anchor, list(parameters.values()))
    for name, gradient in zip(parameters, wanted, strict=True):
        # A slope in T is a small difference of float32 sums.
        assert relative(found[f"temperature.{name}"], gradient) < 1e-3, name
    assert metrics["loss_forward_kl_raw"] == pytest.approx(kd.item(), rel=1e-5)
    assert metrics["loss_anchor"] == pytest.approx(anchor.item(), rel=1e-5)
    assert metrics["temperature"] == pytest.approx(T_N.mean().item(), rel=1e-6)
    assert metrics["temperature_spread"] == pytest.approx(T_N.std(correction=0).item(), rel=1e-4)
    assert setting.module.temperature.current() == pytest.approx(T_N.mean().item(), rel=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_ragged_micro_batches_give_the_gradient_of_one_batch(build, ragged, scope):
    setting = build(scope)
    batch, step = ragged(setting), setting.context.total_steps
    whole, metrics = gradients(setting, [batch], step)
    split, split_metrics = gradients(setting, [part(batch, 0, 2), part(batch, 1), part(batch, 3)], step)
    for name, gradient in whole.items():
        # float32 sums in another order; the slope in T is a difference of them.
        assert relative(split[name], gradient) < 1e-4, name
    assert split_metrics == pytest.approx(metrics, rel=1e-4)


def test_the_student_does_not_feel_its_temperature_move(build, ragged):
    """lambda scales the temperature's gradient and no other."""
    setting = build("token")
    batch = ragged(setting)
    still, _ = gradients(setting, [batch], 0)
    moving, _ = gradients(setting, [batch], setting.context.total_steps)
    student = [name for name in still if name.startswith("student.")]
    assert student and all(torch.equal(still[name], moving[name]) for name in student)
    assert not torch.equal(still["temperature.out.weight"], moving["temperature.out.weight"])
