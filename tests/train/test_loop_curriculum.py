"""A run in stages: what each step and look is told, when a stage ends, and going on at a switch to the last bit."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from asnn_goose.data.loader import TrainingWindows
from asnn_goose.errors import UserError
from asnn_goose.reporting import read_metrics
from asnn_goose.train.loop import Interrupted, Recorder
from asnn_goose.train.measure import stage_notes
from asnn_goose.train.optimisers import clip, set_learning_rates
from asnn_goose.train.plan import learning_rate, schedules
from asnn_goose.train.setting import prepare
from asnn_goose.train.step import accumulate_gradients

C = "distillation__curriculum__"
STAGED = {f"{C}rule": "time", f"{C}rouge_tokens": 4, "train__steps": 8}
"""Four stages of two steps of two windows: the easiest 4, 8, 12 and all 16."""
BY_LOOKS = STAGED | {"train__eval_every": 1, f"{C}rule": "patience", f"{C}patience": 1, f"{C}min_delta": 0.01}


def steps_of(session) -> list[dict]:
    return [line for line in read_metrics(session.folder.metrics) if "lr" in line]


def test_each_step_is_told_its_stage_its_temperature_and_its_weights(start, tiny_experiment):
    session = start(tiny_experiment("v10", **STAGED)).train()
    lines = steps_of(session)
    assert [line["stage"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [line["temperature"] for line in lines] == [1.0, 1.0, 1.33, 1.33, 1.67, 1.67, 2.0, 2.0]
    kd = [0.7, 0.7, 0.8, 0.8, 0.9, 0.9, 1.0, 1.0]
    assert [line["weight_forward_kl"] for line in lines] == kd
    assert [line["weight_ce"] for line in lines] == pytest.approx([1 - w for w in kd], abs=1e-15)
    for line in lines:
        parts = [line[f"weight_{name}"] * line[f"loss_{name}_raw"] for name in ("ce", "forward_kl")]
        # Sums of float32.
        assert line["loss_total"] == pytest.approx(sum(parts), rel=1e-6)


def test_weights_and_temperature_are_those_of_the_loss_itself(start, tiny_experiment):
    """The first stage's step is that of a run without stages that was configured so, on the same windows."""
    staged = prepare(tiny_experiment("v10", **STAGED))
    plain = prepare(
        tiny_experiment(
            "v10", train__steps=8, distillation__temperature__init=1.0,
            distillation__losses__ce__weight=1.0 - 0.7, distillation__losses__forward_kl__weight=0.7,
        )
    )  # fmt: skip
    batches = [next(staged.windows)]
    for setting in (staged, plain):
        accumulate_gradients(setting.context, batches, 0)
    ours, theirs = (
        {n: p.grad for n, p in setting.module.named_parameters() if p.grad is not None} for setting in (staged, plain)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(gradient, theirs[n]) for n, gradient in ours.items())


def test_a_learned_temperature_starts_at_the_first_anchor_and_is_pulled_to_the_present_one(start, tiny_experiment):
    changes = {"distillation__temperature__lambda_max": 0.0, "distillation__temperature__anchor_weight": 3.0}
    session = start(tiny_experiment("v11_2", **(STAGED | changes)))
    before = session.setting.module.temperature()[1].item()
    assert before == pytest.approx(1.0, rel=1e-6)  # a float32 sigmoid of its inverse
    lines = steps_of(session.train())
    anchors = [1.0, 1.0, 1.33, 1.33, 1.67, 1.67, 2.0, 2.0]
    for line, anchor in zip(lines, anchors, strict=True):
        assert line["loss_anchor"] == pytest.approx(3.0 * (line["temperature"] - anchor) ** 2, abs=1e-6)
    assert lines[-1]["temperature"] > before + 0.01


def test_each_stage_reads_its_share_of_the_order_alone(start, tiny_experiment):
    read: dict[int, list[int]] = {}

    class Watching(Recorder):
        def log(self, step, values):
            super().log(step, values)
            read[step] = session.setting.windows.seen()

    session = start(tiny_experiment("v10", **STAGED), Watching)
    order = session.setting.stages.windows.order
    assert len(order) == 16
    session.train()
    for step, size in zip((2, 4, 6, 8), (4, 8, 12, 16), strict=True):
        assert set(read[step]) <= set(order[:size])
    # Two steps of two windows are one epoch of the first stage.
    assert set(read[2]) == set(order[:4]) and set(read[8]) - set(order[:4])


@pytest.mark.parametrize(
    ("version", "stop"), [("v11_2", 3), ("v11_2", 4), ("v11_2", 5), ("v10", 4)], ids=["before", "at", "after", "plain"]
)
def test_resumed_around_a_switch_equals_uninterrupted(start, go_on, tiny_experiment, version, stop, stopping_at):
    experiment = tiny_experiment(version, **STAGED, **{f"{C}restart_on_stage": version == "v11_2"})
    straight, broken = start(experiment).train(), start(experiment, stopping_at(stop))
    with pytest.raises(Interrupted):
        broken.train()
    assert broken.progress.step == stop
    assert_same(go_on(experiment, broken.folder.path).train(), straight)


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["before", "at", "after"])
def test_resumed_around_a_switch_by_validation_equals_uninterrupted(
    start, go_on, tiny_experiment, course, stop, stopping_at
):
    experiment = tiny_experiment("v10", **BY_LOOKS, **{f"{C}restart_on_stage": True})
    values = (3.0, 2.5, 2.6, 2.4, 2.41, 2.3, 2.2, 2.1)  # switches after the looks 3 and 5
    straight, broken = start(experiment), start(experiment, stopping_at(stop))
    course(*values)
    straight.train()
    assert [line["stage"] for line in steps_of(straight)] == [1, 1, 1, 2, 2, 3, 3, 3]
    course(*values)
    with pytest.raises(Interrupted):
        broken.train()
    course(*values[stop:])
    assert_same(go_on(experiment, broken.folder.path).train(), straight)


def assert_same(one, other) -> None:
    """Both runs are at the same point, bit for bit."""

    def flat(tree):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
        if items is None:
            return tree.tolist() if isinstance(tree, torch.Tensor) else tree
        return {key: flat(value) for key, value in items}

    def state(session):
        setting = session.setting
        return flat(
            {
                "parameters": dict(setting.module.named_parameters()),
                "optimisers": [optimiser.state_dict() for optimiser in setting.optimisers.present()],
                "parts": {name: part.state_dict() for name, part in setting.parts().items()},
                "metrics": [
                    {k: v for k, v in line.items() if k != "tokens_per_second"}
                    for line in read_metrics(session.folder.metrics)
                ],
                "notes": stage_notes(setting, session.progress),
                "seen": setting.windows.seen(),
            }
        )

    assert "stages" in one.setting.parts()
    assert state(one) == state(other)


def test_a_plateau_ends_a_stage(start, tiny_experiment, course):
    changes = {f"{C}rule": "plateau", f"{C}window": 1, f"{C}eps": 0.1, f"{C}patience": 2}
    session = start(tiny_experiment("v10", **(BY_LOOKS | changes)))
    # Gains of 1, 0.05, 0.05: two stalled checks in a row after the fourth look; 0.05, 0.05 after the seventh.
    course(5.0, 4.0, 3.95, 3.9, 8.0, 7.95, 7.9, 7.0)
    assert [line["stage"] for line in steps_of(session.train())] == [1, 1, 1, 1, 2, 2, 2, 3]


def test_a_restart_begins_each_stage_as_a_run_of_its_length(start, tiny_experiment):
    changes = {f"{C}restart_on_stage": True, "train__steps": 16, "train__warmup": 0.5}
    experiment = tiny_experiment("v10", **(STAGED | changes))
    session = start(experiment).train()
    course_of_four = [learning_rate(experiment.train, step, 4) for step in range(4)]
    assert [line["lr"] for line in steps_of(session)] == course_of_four * 4
    states = session.setting.optimisers.student.state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {4}
    going_on = start(tiny_experiment("v10", **(STAGED | {"train__steps": 16}))).train()
    assert {int(s["step"]) for s in going_on.setting.optimisers.student.state_dict()["state"].values()} == {16}


@pytest.mark.parametrize("restart", [True, False])
def test_the_plan_is_what_the_run_then_does(start, tiny_experiment, restart):
    changes = {f"{C}restart_on_stage": restart, f"{C}boundaries": "[0.07,0.3,0.62]", "train__steps": 13}
    experiment = tiny_experiment("v11_2", **(STAGED | changes))
    for line in steps_of(start(experiment).train()):
        planned = schedules(experiment, line["step"] - 1)
        anchor = planned.pop("temperature_anchor")
        assert planned == {name: line[name] for name in planned}
        assert anchor == (1.0, 1.33, 1.67, 2.0)[line["stage"] - 1]


def test_what_waits_for_validation_is_not_planned(tiny_experiment):
    planned = schedules(tiny_experiment("v10", **BY_LOOKS, **{f"{C}restart_on_stage": True}), 3)
    assert planned == {}
    fixed = schedules(tiny_experiment("v10", **BY_LOOKS, **{f"{C}temperatures": "null", f"{C}w_kd": "null"}), 3)
    assert fixed.keys() == {"lr", "weight_ce", "weight_forward_kl", "temperature"}


def test_looks_go_back_to_the_same_easy_and_hard_windows(start, tiny_experiment):
    session = start(tiny_experiment("v10", **STAGED)).train()
    lines = [line for line in read_metrics(session.folder.metrics) if "val_ce" in line]
    assert [line["step"] for line in lines if {"easy_ce", "hard_ce"} <= line.keys()] == [2, 4, 6, 8]
    order, tokens = session.setting.stages.windows.order, session.setting.text.shards["train"].tokens
    student = session.setting.module.student.eval()
    for name, windows in {"easy_ce": order[:8], "hard_ce": order[8:]}.items():
        losses = []
        for window in windows:
            ids = torch.tensor(tokens[16 * window : 16 * window + 16].astype(np.int64))
            with torch.no_grad():
                losses.append(F.cross_entropy(student(ids[None]).logits[0, :-1].double(), ids[1:]).item())
        # float32 logits of another shape of product.
        assert lines[-1][name] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("init", ["embeddings", "regression"])
def test_the_baselines_see_what_the_student_saw(start, tiny_experiment, init):
    experiment = tiny_experiment("v10", **STAGED, student__init=init, student__fit_tokens=64)
    session = start(experiment)
    setting, shard = session.setting, session.setting.text.shards["train"]
    read: list[int] = []
    for step in range(8):
        setting.stages.advance(step)
        read += next(setting.windows).windows.tolist()
    # 64 tokens are the four windows that a run without stages reads first.
    fitted = TrainingWindows(shard, 16, 4, 0).upcoming(4) if init == "regression" else []
    expected = list(dict.fromkeys(fitted + read))
    tokens, starts = setting.seen_tokens(8 * 2 * 16)
    assert tokens.reshape(-1, 16).tolist() == [shard.tokens[16 * w : 16 * w + 16].tolist() for w in expected]
    assert starts.tolist() == [16 * i for i in range(len(expected))]
    assert len(read) > len(set(read))


def test_the_result_tells_each_stage_in_a_sentence(start, tiny_experiment, course):
    session = start(tiny_experiment("v10", **STAGED))
    course(5.0, 4.5, 4.25, 4.125)
    session.train()
    notes = stage_notes(session.setting, session.progress)
    assert notes[0] == (
        "Stage 1 of 4, steps 1 to 2: the 4 easiest of 16 windows, T 1, distillation weight 0.7; validation "
        "cross-entropy 5.0000 nats per token at its last look."
    )
    assert notes[3].startswith("Stage 4 of 4, steps 7 to 8: all 16 windows, T 2, distillation weight 1; ")
    assert "4.1250" in notes[3] and len(notes) == 4


def test_a_stage_that_never_began_is_told(start, tiny_experiment, course):
    session = start(tiny_experiment("v11_2", **BY_LOOKS))
    course(5.0, 4.0, 3.0, 3.0, 2.0, 1.0, 0.5, 0.6)
    session.train()
    notes = stage_notes(session.setting, session.progress)
    assert [note.split(":")[0] for note in notes] == [
        "Stage 1 of 4, steps 1 to 4",
        "Stage 2 of 4, steps 5 to 8",
        "Never begun",
    ]
    assert notes[-1] == "Never begun: stage 3, 4 of 4." and "T anchored at 1.33" in notes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{C}rule": "patience", f"{C}patience": 4, "train__eval_every": 2}, "would never leave its first stage"),
        ({f"{C}rule": "patience", f"{C}patience": 2, "train__eval_every": 2}, "after step 14 at the earliest"),
        ({"train__steps": 1, f"{C}volumes": "[0.5,0.6,0.7,1]"}, "after step 1 at the earliest, and the run has 1"),
        (
            {"train__eval_every": 1, "train__stopping__patience": 2, "train__stopping__grace": 0.0},
            "early stopping can end the run after step 3, and the curriculum's last stage begins only at step 6",
        ),
    ],
)
def test_a_last_stage_out_of_reach_is_told_before_training(tiny_experiment, caplog, changes, message):
    with caplog.at_level(logging.WARNING, "asnn_goose"):
        prepare(tiny_experiment("v10", **(STAGED | changes)))
    (told,) = (record.getMessage() for record in caplog.records)
    assert message in told


def test_stages_within_reach_are_not_warned_of(tiny_experiment, caplog):
    with caplog.at_level(logging.WARNING, "asnn_goose"):
        prepare(tiny_experiment("v10", **STAGED))
        prepare(tiny_experiment("v10", **BY_LOOKS))
    assert not caplog.records


def test_too_few_windows_for_a_stage_are_one_sentence(tiny_experiment):
    with pytest.raises(UserError, match=r"distillation\.curriculum: the first stage holds 0\.25 of 2 examples"):
        prepare(tiny_experiment("v10", **(STAGED | {"train__steps": 1})))


def test_without_a_curriculum_nothing_is_different(start, tiny_experiment):
    """Four steps written out with the windows of the seed and the plan of the configuration."""
    experiment = tiny_experiment()
    session, by_hand = start(experiment).train(), prepare(experiment)
    assert isinstance(session.setting.windows, TrainingWindows) and session.setting.parts().keys() == {
        "windows", "balancer",
    }  # fmt: skip
    lines = read_metrics(session.folder.metrics)
    assert not {"stage", "easy_ce", "hard_ce"} & {key for line in lines for key in line}
    windows = TrainingWindows(by_hand.text.shards["train"], 16, 2, 0)
    for step in range(4):
        set_learning_rates(by_hand.optimisers.student, experiment.train, step, 4)
        accumulate_gradients(by_hand.context, [next(windows)], step)
        clip(by_hand.module, experiment.train, experiment.distillation.temperature)
        for optimiser in by_hand.optimisers.present():
            optimiser.step()
            optimiser.zero_grad()
    ours = dict(session.setting.module.named_parameters())
    assert all(torch.equal(p, ours[n]) for n, p in by_hand.module.named_parameters())
