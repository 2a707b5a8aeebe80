"""Steps that learn from the store beside steps with the teacher at hand."""

import copy

import pytest

from asnn_goose.models import Teacher
from asnn_goose.train.setting import Setting, prepare
from asnn_goose.train.step import accumulate_gradients


def first_steps(setting: Setting, count: int = 3) -> list[dict[str, float]]:
    windows = copy.deepcopy(setting.windows)
    return [accumulate_gradients(setting.context, [next(windows), next(windows)], step) for step in range(count)]


def silence(setting: Setting) -> Setting:
    """Let no pass of the teacher succeed from now on."""

    def forbidden(*_, **__):
        raise AssertionError("the teacher ran")

    # The head is checked with a pass when it is first asked for.
    assert setting.teacher.head_VE is not None
    setting.teacher.model.forward = setting.teacher._stack.forward = forbidden
    return setting


@pytest.mark.parametrize("file", ["kd", "hidden", "fdd"])
def test_a_store_of_states_gives_the_steps_of_a_teacher_at_hand(moved, file):
    changes = {"distillation": file, "train__accumulate": 2, "student__init": "embeddings"}
    if file == "fdd":
        changes |= {f"distillation__losses__{name}__layers": 2 for name in ("fdd_trajectory", "fdd_derivative")}
    online, stored = (moved("v11_1", **changes, distillation__targets=targets) for targets in ("online", "hidden"))
    expected = first_steps(online)
    for ours, theirs in zip(first_steps(silence(stored)), expected, strict=True):
        losses = [key for key in theirs if key.startswith("loss_")]
        # The states were rounded to bfloat16, 8 bits.
        assert [ours[key] for key in losses] == pytest.approx([theirs[key] for key in losses], rel=2e-2)


def test_a_store_of_the_best_tokens_gives_the_loss_with_a_tail(moved):
    bucket = {"distillation": "tail_bucket", "distillation__losses__tail_bucket_kl__k": 16, "train__accumulate": 2}
    temperature = {"distillation__temperature__init": 2.0, "student__init": "embeddings"}
    online, stored = (
        moved("v11_1", **bucket, **temperature, distillation__targets=targets) for targets in ("online", "topk")
    )
    expected = first_steps(online)
    for ours, theirs in zip(first_steps(silence(stored)), expected, strict=True):
        assert ours["loss_tail_bucket_kl_raw"] == pytest.approx(theirs["loss_tail_bucket_kl_raw"], abs=1e-3)
        assert ours["loss_ce_raw"] == pytest.approx(theirs["loss_ce_raw"], rel=1e-5)
        # The adversary's slope, from the stored tail's own dependence on T.
        assert ours["temperature_gradient"] == pytest.approx(theirs["temperature_gradient"], abs=5e-3)


def test_versions_of_one_seed_share_what_was_captured(tiny_experiment, monkeypatch, tmp_path):
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "own cache"))
    runs = []

    def counted(method):
        def states(self, input_ids, *rest):
            runs.append(len(input_ids))
            return method(self, input_ids, *rest)

        return states

    monkeypatch.setattr(Teacher, "states_and_layers", counted(Teacher.states_and_layers))
    first = prepare(tiny_experiment("v11_1"))
    captured = sum(runs)
    assert captured == first.context.total_steps * 2
    prepare(tiny_experiment("v10"))
    prepare(tiny_experiment("v10", train__steps=2))
    assert sum(runs) == captured
    prepare(tiny_experiment("v10", seed=1))
    assert captured < sum(runs) <= 2 * captured


def test_the_start_is_fitted_on_the_stored_states(tiny_experiment):
    online, stored = (
        prepare(tiny_experiment(distillation__targets=targets, student__init="regression"))
        for targets in ("online", "hidden")
    )
    ours, theirs = (setting.module.student.get_parameter("model.widen.weight") for setting in (stored, online))
    # Ridge regression on states of 8 bits.
    assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_what_stands_in_no_store_is_told(moved, ragged, monkeypatch, tmp_path):
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "own cache"))
    setting = moved("v10")
    with pytest.raises(LookupError, match="stored targets are of training windows"):
        accumulate_gradients(setting.context, [ragged(setting)], 0)
    *_, batch = (next(setting.windows) for _ in range(setting.context.total_steps + 1))
    with pytest.raises(LookupError, match="capture it before it is read"):
        accumulate_gradients(setting.context, [batch], 0)
