"""Steps with a gradient per term: what balancing and DOT make of them, beside the terms' gradients taken one by one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from asnn_goose.data.loader import Batch
from asnn_goose.errors import UserError
from asnn_goose.train.monitor import gradient_norms
from asnn_goose.train.optimisers import clip
from asnn_goose.train.setting import Setting
from asnn_goose.train.step import accumulate_gradients
from asnn_goose.train.teacher_targets import Targets

MODES = ("gradient_norm", "gradnorm", "uncertainty", "pcgrad", "project_kd")
WEIGHTS = {"ce": 0.3, "forward_kl": 0.7, "hidden": 0.5}
OBJECTIVE = {"distillation": "hidden", "distillation__targets": "online"} | {
    f"distillation__losses__{name}__weight": weight for name, weight in WEIGHTS.items()
}


@pytest.fixture
def build(moved):
    return lambda **changes: moved("v11_1", **(OBJECTIVE | changes))


def gradients(setting: Setting, batch: Batch, step: int = 2) -> tuple[dict[str, Tensor], dict[str, float]]:
    setting.module.zero_grad(set_to_none=True)
    parts = [Batch(batch.input_ids[rows], batch.mask[rows]) for rows in ([0, 2], [1, 3])]
    metrics = accumulate_gradients(setting.context, parts, step)
    return {name: p.grad.clone() for name, p in setting.module.named_parameters() if p.grad is not None}, metrics


def one_by_one(build, batch: Batch) -> dict[str, dict[str, Tensor]]:
    """Term -> its weighted gradient, from objectives in which all other weights are 0."""
    found = {}
    for name in WEIGHTS:
        silent = [other for other in WEIGHTS if other != name]
        others: dict[str, object] = {f"distillation__losses__{other}__weight": 0.0 for other in silent}
        if name != "forward_kl":
            others["distillation__temperature__mode"] = "fixed"
        found[name], _ = gradients(build(**others), batch)
    return found


def flat(tree: dict[str, Tensor], names) -> Tensor:
    return torch.cat([tree[name].flatten() if name in tree else torch.zeros(1) for name in names]).double()


@pytest.mark.parametrize("mode", MODES)
def test_the_update_is_the_terms_gradients_times_the_logged_factors(build, ragged, mode):
    setting = build(distillation__balance__mode=mode, distillation__balance__start=0.0)
    batch = ragged(setting)
    if mode in ("gradnorm", "uncertainty"):
        # Both learn their weights from step to step: the first one leaves them at their start.
        for step in range(3):
            gradients(setting, batch, step)
    found, metrics = gradients(setting, batch)
    apart = one_by_one(build, batch)
    factors = {name: metrics[f"weight_{name}"] / weight for name, weight in WEIGHTS.items()}
    plain, _ = gradients(build(), batch)
    student = [name for name in plain if name.startswith("student.")]
    for name in student:
        terms = [factors[term] * tree[name] for term, tree in apart.items() if name in tree]
        # float32 sums in another order.
        torch.testing.assert_close(found[name], sum(terms), rtol=2e-4, atol=1e-6)
    weighted = {name: metrics[f"weight_{name}"] * metrics[f"loss_{name}_raw"] for name in WEIGHTS}
    assert {name: metrics[f"loss_{name}_weighted"] for name in WEIGHTS} == pytest.approx(weighted, rel=1e-12)
    assert metrics["loss_total"] == pytest.approx(sum(weighted.values()), rel=1e-12)
    if mode == "uncertainty":
        # exp(-s) / 2, with s three small steps from 0.
        assert factors == pytest.approx(dict.fromkeys(WEIGHTS, 0.5), rel=0.2)


@pytest.mark.parametrize("mode", [*MODES, "dot", "monitor"])
def test_a_gradient_per_term_is_taken_in_mixed_precision_too(build, ragged, mode):
    """Of bfloat16 products, the terms' gradients add up to that of one pass; factors held at 1 where they are free."""
    held = {"distillation__balance__low": 1.0, "distillation__balance__high": 1.0, "distillation__balance__start": 0.0}
    options = {"dot": {"train__optimiser": "dot", "train__lr": 1e-3}, "monitor": {}}
    setting = build(train__precision="bfloat16", **options.get(mode, {"distillation__balance__mode": mode} | held))
    batch = ragged(setting)
    for step in range(3):
        found, _ = gradients(setting, batch, step)
    assert found and all(gradient.dtype == torch.float32 for gradient in found.values())
    if mode == "monitor":
        assert gradient_norms(setting.context, batch, 3)["grad_norm_ce"] > 0.0
    if mode == "gradient_norm":
        plain, _ = gradients(build(train__precision="bfloat16"), batch)
        for name, gradient in plain.items():
            # The sum over terms is taken behind each product instead of in front of it, in steps of 2^-8.
            assert (found[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-6, name


def test_gradnorm_takes_its_start_at_the_asked_share_of_the_run(build, ragged):
    start = {"distillation__balance__mode": "gradnorm", "distillation__balance__start": 0.5}
    setting = build(**start, train__steps=8)
    batch, needed = ragged(setting), []
    for step in range(6):
        needed.append(setting.context.balancer.needs_gradients(step))
        gradients(setting, batch, step)
    # What the step at 4 of 8 lost is the start; its successor is the first to be balanced.
    assert needed == [False] * 5 + [True]


class Contrary:
    """Targets of a teacher that says what the student says, only less of the text's own next token."""

    def __init__(self, setting: Setting):
        self.setting = setting

    def __call__(self, batch: Batch) -> Targets:
        teacher = self.setting.teacher
        with torch.no_grad():
            states_BLE = self.setting.module.states(batch.input_ids)
            head_VE = teacher.head_VE
            states_BLE[:, :-1] -= head_VE[batch.input_ids[:, 1:]] / head_VE.square().sum(-1).mean()
        return Targets(teacher, states_BLE, layers=teacher.states_and_layers(batch.input_ids, (1, 2))[1])


@pytest.mark.parametrize("mode", MODES)
def test_switching_it_on_changes_the_update(build, ragged, mode):
    options = {"distillation__balance__mode": mode, "distillation__balance__start": 0.0}
    fixed = {"distillation__temperature__mode": "fixed", "distillation__losses__hidden__weight": 1e-4}
    updates = []
    for setting in (build(**options, **fixed), build(**fixed)):
        setting.context = replace(setting.context, targets=Contrary(setting))
        batch = ragged(setting)
        # gradnorm records its start on the first step and moves on the second.
        for step in range(3):
            found, _ = gradients(setting, batch, step)
        updates.append(flat(found, [name for name in found if name.startswith("student.")]))
    on, off = updates
    assert (on - off).norm() > 1e-3 * off.norm()


def test_measured_norms_end_in_the_asked_ratio(build, ragged):
    options = {"mode": "gradient_norm", "ratio": 0.5, "low": 1e-6, "high": 1e6}
    setting = build(**{f"distillation__balance__{key}": value for key, value in options.items()})
    batch = ragged(setting)
    _, metrics = gradients(setting, batch, 0)
    apart = one_by_one(build, batch)
    names = [name for name in apart["ce"] if name.startswith("student.")]
    factors = {term: metrics[f"weight_{term}"] / WEIGHTS[term] for term in apart}
    norms = {term: factors[term] * flat(tree, names).norm().item() for term, tree in apart.items()}
    assert norms["forward_kl"] / norms["ce"] == pytest.approx(0.5, rel=1e-3)
    assert norms["hidden"] / norms["ce"] == pytest.approx(0.5, rel=1e-3)


def test_dot_takes_ce_and_the_rest_apart(build, ragged):
    options = {"train__optimiser": "dot", "train__weight_decay": 0.0, "train__clip": 1e9}
    setting = build(**options)
    batch = ragged(setting)
    apart = one_by_one(build, batch)
    before = {name: p.detach().clone() for name, p in setting.module.named_parameters()}
    velocity: dict[str, dict[str, Tensor]] = {}
    found, _ = gradients(setting, batch)
    for name, gradient in found.items():
        if name.startswith("student."):
            torch.testing.assert_close(gradient, apart["ce"][name], rtol=2e-4, atol=1e-6)
    setting.optimisers.student.step()
    for name, parameter in setting.module.named_parameters():
        if name in found and name.startswith("student."):
            kd = apart["forward_kl"][name] + apart["hidden"].get(name, 0.0)
            velocity[name] = {"task": apart["ce"][name], "kd": kd}
            moved = before[name] - setting.experiment.train.lr * (velocity[name]["task"] + kd)
            torch.testing.assert_close(parameter.detach(), moved, rtol=1e-5, atol=1e-7)
    assert len(velocity) > 30


def test_dot_clips_both_gradients_by_one_factor(build, ragged):
    setting = build(train__optimiser="dot", train__clip=1e-3)
    found, _ = gradients(setting, ragged(setting))
    others = [gradient.clone() for gradient in setting.optimisers.handed_over()]
    train, temperature = setting.experiment.train, setting.experiment.distillation.temperature
    norm = clip(setting.module, train, temperature, setting.optimisers.handed_over())
    own = [gradient for name, gradient in found.items() if not name.startswith("temperature.")]
    assert norm == pytest.approx(sum(g.double().square().sum().item() for g in own + others) ** 0.5, rel=1e-5)
    for clipped, gradient in zip(setting.optimisers.handed_over(), others, strict=True):
        torch.testing.assert_close(clipped, gradient * (1e-3 / norm), rtol=1e-4, atol=0.0)


def test_weights_ramp_with_the_optimiser_step(build, ragged):
    """0.1 to 0.7 over the first fifth of 100 steps: 0.22 after 4, 0.4 after 10, 0.55 after 15."""
    name = "distillation__losses__forward_kl"
    setting = build(train__steps=100, **{f"{name}__ramp__start": 0.1, f"{name}__ramp__end": 0.2})
    steps = (0, 4, 5, 10, 15, 20, 60)
    found = [setting.context.weights(step)["forward_kl"] for step in steps]
    assert found == pytest.approx([0.1, 0.22, 0.25, 0.4, 0.55, 0.7, 0.7], abs=1e-12)
    _, metrics = gradients(setting, ragged(setting), step=10)
    assert metrics["weight_forward_kl"] == pytest.approx(0.4)
    assert metrics["loss_forward_kl_weighted"] == pytest.approx(0.4 * metrics["loss_forward_kl_raw"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"train__optimiser": "dot", "distillation__balance__mode": "pcgrad"}, "keeps the terms apart itself"),
        ({"train__devices": 2, "distillation__balance__mode": "pcgrad"}, "set train.devices to 1"),
        (
            {"distillation__balance__mode": "gradient_norm", "distillation__losses__forward_kl__ramp__start": 0.1},
            "so the ramp of forward_kl would be undone",
        ),
        (
            {"distillation__balance__mode": "gradnorm", "distillation__losses__forward_kl__ramp__start": 0.1},
            "so the ramp of forward_kl would be undone",
        ),
        (
            {"distillation__balance__mode": "uncertainty", "distillation__losses__ce__ramp__start": 0.1},
            "so the ramp of ce would be undone",
        ),
        ({"distillation__balance__low": 11}, r"low \(11.0\) must not be above high"),
        ({"distillation": "minilmv2", "distillation__targets": "hidden"}, "set targets to online"),
        ({"distillation": "kd", "distillation__targets": "topk"}, "serve ce and tail_bucket_kl alone, not forward_kl"),
        (
            {
                "distillation": "tail_bucket",
                "distillation__temperature__mode": "fixed",
                "distillation__losses__tail_bucket_kl__k": 15,
            },
            "with a k of 16 or more",
        ),
        ({"distillation": "random_sampling"}, "random_sampling cannot train a temperature"),
    ],
)
def test_what_cannot_be_asked_for(tiny_experiment, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny_experiment("v11_1", **flags)


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_a_temperature_read_from_states_that_are_not_finite_leaves_the_step_out(start, tiny_experiment, scope):
    session = start(tiny_experiment(train__skip_limit=2, distillation__temperature__scope=scope))
    setting = session.setting
    setting.context = replace(setting.context, targets=Spoilt(setting.context.targets, {1}))
    session.train()
    assert session.progress.skipped == 1
    assert all(bool(torch.isfinite(p).all()) for p in setting.module.parameters())


class Spoilt:
    """Targets that are not a number at some calls."""

    def __init__(self, targets, calls):
        self.targets, self.calls, self.count = targets, calls, 0

    def __call__(self, batch):
        targets = self.targets(batch)
        if self.count in self.calls:
            targets.states_BLE = torch.full_like(targets.states_BLE, torch.nan)
        self.count += 1
        return targets


@pytest.mark.parametrize(
    ("limit", "calls", "ends"), [(0, {1}, False), (1, {1}, True), (1, {1, 2}, False), (2, {0, 2}, True)]
)
def test_steps_that_are_not_finite_are_counted_and_left_out(start, tiny_experiment, limit, calls, ends):
    session = start(tiny_experiment(train__skip_limit=limit))
    setting = session.setting
    setting.context = replace(setting.context, targets=Spoilt(setting.context.targets, calls))
    if not ends:
        with pytest.raises(UserError, match="training broke down in step"):
            session.train()
        assert session.progress.skipped == limit + 1
        return
    session.train()
    assert session.progress.skipped == len(calls)
    # AdamW counts the updates it made.
    counts = {int(state["step"]) for state in setting.optimisers.student.state_dict()["state"].values()}
    assert counts == {4 - len(calls)}
    assert all(bool(torch.isfinite(p).all()) for p in setting.module.parameters())


def test_a_loss_that_is_0_where_gradnorm_starts_is_one_sentence(moved, ragged):
    """A teacher that says what the student says."""
    balance = {"distillation__balance__mode": "gradnorm", "distillation__balance__start": 0.0}
    setting = moved("v11_1", distillation="kd", **balance)

    def agreeing(batch: Batch) -> Targets:
        with torch.no_grad():
            return Targets(setting.teacher, setting.module.states(batch.input_ids))

    setting.context = replace(setting.context, targets=agreeing)
    with pytest.raises(UserError, match=r"^distillation\.balance\.start 0\.0: loss term forward_kl is 0\.0 as .*$"):
        gradients(setting, ragged(setting), step=0)
