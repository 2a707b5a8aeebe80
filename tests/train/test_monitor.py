"""What a look measures of training: norms against separate backward passes, and no bit of training moved."""

import copy
import math

import numpy as np
import pytest
import torch

from asnn_goose.errors import UserError
from asnn_goose.reporting import read_metrics
from asnn_goose.train.loop import watch_teacher
from asnn_goose.train.monitor import Monitor, gradient_norms
from asnn_goose.train.step import accumulate_gradients

HIDDEN = {"distillation": "hidden", "distillation__targets": "online"}


def test_norms_are_those_of_separate_backward_passes(moved, ragged):
    """Each term alone in an objective of its own, at its own weight, by ``.backward()``."""
    setting = moved("v10", **HIDDEN)
    batch = ragged(setting)
    found = gradient_norms(setting.context, batch, 0)
    weights = setting.context.weights(0)
    assert set(weights) == {"ce", "forward_kl", "hidden"}
    student = [p for p in setting.module.student.parameters() if p.requires_grad]
    for name, weight in weights.items():
        setting.module.zero_grad(set_to_none=True)
        others = {f"distillation__losses__{other}__weight": 0.0 for other in set(weights) - {name}}
        alone = moved("v10", **HIDDEN, **others)
        alone.module.load_state_dict(setting.module.state_dict())
        accumulate_gradients(alone.context, [batch], 0)
        parts = [p.grad for p in alone.module.student.parameters() if p.grad is not None]
        assert len(parts) == len(student) and weight > 0
        norm = math.sqrt(sum(float(part.double().square().sum()) for part in parts))
        # float32 sums in another order.
        assert found[f"grad_norm_{name}"] == pytest.approx(norm, rel=1e-4)
    assert found["grad_ratio_hidden"] == found["grad_norm_hidden"] / found["grad_norm_ce"]
    assert set(found) == {f"grad_norm_{name}" for name in weights} | {"grad_ratio_forward_kl", "grad_ratio_hidden"}


def test_a_weight_scales_its_norm(moved, ragged):
    """1e-5 instead of 1 is seen, which the loss alone does not show."""
    one, small = (moved("v10", **HIDDEN, distillation__losses__hidden__weight=weight) for weight in (1.0, 1e-5))
    batch = ragged(one)
    ratios = [gradient_norms(setting.context, batch, 0)["grad_ratio_hidden"] for setting in (one, small)]
    assert ratios[1] == pytest.approx(1e-5 * ratios[0], rel=1e-4) and ratios[1] < 0.01


def test_measuring_touches_neither_gradients_nor_random_numbers_nor_the_balance(moved, ragged):
    setting = moved("v10", distillation="random_sampling", distillation__balance__mode="gradnorm")
    batch = next(setting.windows)
    accumulate_gradients(setting.context, [batch], 0)
    gradients = {n: p.grad.clone() for n, p in setting.module.named_parameters() if p.grad is not None}
    balance, state = copy.deepcopy(setting.context.balancer.state_dict()), torch.get_rng_state()
    first = gradient_norms(setting.context, batch, 1)
    assert torch.equal(torch.get_rng_state(), state) and setting.context.balancer.state_dict() == balance
    assert gradient_norms(setting.context, batch, 1) == first
    after = {n: p.grad for n, p in setting.module.named_parameters() if p.grad is not None}
    assert gradients.keys() == after.keys() and all(torch.equal(gradients[n], after[n]) for n in after)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distillation": "random_sampling", "distillation__temperature__mode": "fixed"},
        {"distillation__balance__mode": "gradnorm"},
        {"train__optimiser": "dot", "train__lr": 1e-3},
    ],
    ids=["learned temperature", "drawn tokens", "balance", "two momenta"],
)
def test_a_monitored_run_is_the_same_run(start, tiny_experiment, changes):
    """To the last bit: parameters, random numbers, and every metric that both have."""
    runs = []
    for monitored in (False, True):
        session = start(tiny_experiment(train__monitor_gradients=monitored, **changes)).train()
        lines = [{k: v for k, v in x.items() if k != "tokens_per_second"} for x in read_metrics(session.folder.metrics)]
        runs.append((session.setting, lines, torch.get_rng_state()))
    (plain, plain_lines, plain_state), (watched, lines, state) = runs
    pairs = zip(plain.module.parameters(), watched.module.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs) and torch.equal(plain_state, state)
    assert plain.fingerprint == watched.fingerprint
    added = {"grad_norm_ce"} | {key for line in lines for key in line if key.startswith("grad_norm_")}
    added |= {key for line in lines for key in line if key.startswith("grad_ratio_")}
    assert [{k: v for k, v in line.items() if k not in added} for line in lines] == plain_lines
    looks = [line for line in lines if "val_ce" in line]
    assert len(looks) == 2 and all(line["grad_norm_ce"] > 0 for line in looks)


def test_targets_are_those_of_the_first_validation_batch(start, tiny_experiment):
    """At a fixed T = 3, by float64 softmaxes of the teacher's own logits."""
    session = start(tiny_experiment("v10", distillation__temperature__init=3.0)).train()
    setting, batch = session.setting, session.setting.text.validation.batches[0]
    logits = setting.teacher(batch.input_ids).logits_BLV[:, :-1][batch.mask[:, 1:]].double().numpy() / 3.0
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    looks = [line for line in read_metrics(session.folder.metrics) if "val_ce" in line]
    for line in looks:
        entropy = -(p * np.log(p)).sum(-1).mean()
        # float32 products.
        assert line["target_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert line["target_entropy_share"] == pytest.approx(entropy / math.log(257), rel=1e-5)
        assert line["target_top100_mass"] == pytest.approx(np.sort(p, -1)[:, -100:].sum(-1).mean(), rel=1e-5)


def test_without_a_temperature_there_are_no_targets_to_tell(start, tiny_experiment):
    session = start(tiny_experiment("v10", distillation="random_sampling"))
    setting = session.setting
    monitor = Monitor(setting, watch_teacher(setting, setting.text.validation, "validation"))
    assert monitor.targets is None and monitor.look(0) == {}


def test_a_loss_that_is_not_finite_is_a_number_that_is_not_one(moved, ragged):
    setting = moved("v10", distillation__targets="online")
    with torch.no_grad():
        setting.module.student.model.norm.get_parameter("weight")[0] = math.nan
    assert math.isnan(gradient_norms(setting.context, ragged(setting), 0)["grad_norm_ce"])


def test_several_devices_are_refused(tiny_experiment):
    with pytest.raises(UserError, match=r"train\.monitor_gradients is for one device: set it to false"):
        tiny_experiment(train__devices=2, train__monitor_gradients=True)
