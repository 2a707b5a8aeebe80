"""A run stopped and taken up again is the run that was never stopped, to the last bit; and what it says meanwhile."""

import io
import json
import logging
import math
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch

from asnn_goose.errors import UserError
from asnn_goose.reporting import read_metrics
from asnn_goose.train import checkpoint
from asnn_goose.train.checkpoint import NAME
from asnn_goose.train.loop import Interrupted, Recorder, evaluate, line, stop_on_interrupt, watch_teacher
from asnn_goose.train.measure import Clock, final_temperature, measure, stopping_notes
from asnn_goose.train.setting import phases, prepare

CLOCKS = {"tokens_per_second"}
"""What metrics say about time."""
RUN_TIMES = {"run_id", "started", "wall_seconds", "seconds_by_phase", "tokens_per_second", "peak_memory_bytes"}


def metrics_of(session) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(session.folder.metrics)]


def results_of(session) -> dict:
    result = measure(session.setting, session.folder, session.progress, session.seen, Clock(), lambda: 0.0)
    return {k: v for k, v in json.loads(result.model_dump_json()).items() if k not in RUN_TIMES}


def same(one, other) -> bool:
    """Equality of nested containers with tensors in them."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(one, other) -> None:
    """Both runs are at the same point, bit for bit."""
    ours, theirs = dict(one.setting.module.named_parameters()), dict(other.setting.module.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    pairs = zip(one.setting.optimisers.present(), other.setting.optimisers.present(), strict=True)
    for ours, theirs in pairs:
        assert same(ours.state_dict(), theirs.state_dict())
    assert one.setting.windows.state_dict() == other.setting.windows.state_dict()
    assert one.setting.context.balancer.state_dict() == other.setting.context.balancer.state_dict()
    assert (one.progress.step, one.progress.tokens) == (other.progress.step, other.progress.tokens)
    assert torch.equal(one.random, other.random)
    assert metrics_of(one) == metrics_of(other)


LEARNED = {
    "train__steps": 6,
    "train__accumulate": 2,
    "distillation__temperature__lambda_start": 0.0,
    "distillation__temperature__init": 3.0,
    "distillation__temperature__lr": 5.0,
    "student__neuron__learn_threshold": "channel",
}


@pytest.mark.parametrize("stop", [3, 4, 6], ids=["between checkpoints", "at a checkpoint", "behind the last step"])
def test_resumed_equals_uninterrupted(start, go_on, tiny_experiment, stop, stopping_at):
    experiment = tiny_experiment(**LEARNED)
    straight = start(experiment).train()
    broken = start(experiment, stopping_at(stop))
    with pytest.raises(Interrupted):
        broken.train()
    assert broken.progress.step == stop
    resumed = go_on(experiment, broken.folder.path)
    assert resumed.progress.step == stop
    resumed.train()
    assert_same(resumed, straight)
    assert straight.setting.module.temperature is not None
    assert abs(straight.setting.module.temperature()[1].item() - 3.0) > 0.01
    assert (resumed.seen is None) == (stop == 6) and straight.seen is not None
    assert results_of(resumed) == results_of(straight)


@pytest.mark.parametrize(
    "changes",
    [
        {"distillation__balance__mode": "gradient_norm", "distillation__balance__every": 2},
        {"distillation__balance__mode": "gradnorm"},
        {"distillation__temperature__scope": "token", "distillation__temperature__lambda_start": 0.0},
        {"distillation__balance__mode": "uncertainty"},
        {"distillation__balance__mode": "pcgrad"},
        {"train__optimiser": "dot", "train__lr": 1e-3},
        {"distillation": "random_sampling", "distillation__temperature__mode": "fixed"},
        {"distillation": "hidden", "distillation__losses__hidden__ramp__start": 0.0},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_what_an_objective_keeps_is_taken_up_again(start, go_on, tiny_experiment, changes, stopping_at):
    """Moving averages, learned weights, momenta, projectors, the temperature's reader, and the draws of a sample."""
    experiment = tiny_experiment(train__steps=6, **changes)
    straight = start(experiment).train()
    broken = start(experiment, stopping_at(3))
    with pytest.raises(Interrupted):
        broken.train()
    assert_same(go_on(experiment, broken.folder.path).train(), straight)


def test_sample_and_raster_do_not_depend_on_what_was_annealed_in_this_session(start, go_on, tiny_experiment):
    annealing = {"student__annealing__end": 1.0, "student__annealing__mix": 0.0, "student__annealing__steps": 4}
    experiment = tiny_experiment("v10", **annealing, train__steps=2, train__lr=1e-2)
    straight = start(experiment).train()
    expected = results_of(straight)
    with np.load(straight.folder.path / expected["raster"]["file"]) as arrays:
        spikes = arrays["spikes"]
    resumed = go_on(experiment, straight.folder.path).train()
    assert results_of(resumed) == expected
    with np.load(resumed.folder.path / expected["raster"]["file"]) as arrays:
        assert np.array_equal(arrays["spikes"], spikes)


def test_a_killed_run_goes_on_from_its_last_checkpoint(start, go_on, tiny_experiment):
    """Its log is cut to the checkpoint, and the steps behind it are taken again."""

    class Killed(Recorder):
        def log(self, step, values):
            super().log(step, values)
            if step == 5:
                raise RuntimeError("killed")

    experiment = tiny_experiment(**LEARNED)
    straight, broken = start(experiment).train(), start(experiment, Killed)
    with pytest.raises(RuntimeError, match="killed"):
        broken.train()
    resumed = go_on(experiment, broken.folder.path)
    assert resumed.progress.step == 4
    assert_same(resumed.train(), straight)


def test_two_runs_of_one_configuration_are_one(start, tiny_experiment):
    assert_same(start(tiny_experiment()).train(), start(tiny_experiment()).train())


def test_accumulation_changes_the_batch_and_not_the_schedule(start, tiny_experiment):
    one, four = (start(tiny_experiment(train__accumulate=n)).train() for n in (1, 4))

    def schedule(session):
        steps = [line for line in metrics_of(session) if "lr" in line]
        return [(line["step"], line["lr"], line["temperature_lambda"]) for line in steps]

    assert schedule(one) == schedule(four) and len(schedule(one)) == 4
    assert (one.progress.tokens, four.progress.tokens) == (4 * 2 * 16, 4 * 4 * 2 * 16)


def test_metrics_hold_every_component_and_look_where_they_should(start, tiny_experiment):
    session = start(tiny_experiment(train__steps=5, train__log_every=2, train__eval_every=3)).train()
    lines = metrics_of(session)
    assert [line["step"] for line in lines if "lr" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "val_ppl" in line] == [3, 5]
    for entry in lines:
        if "lr" in entry:
            total = sum(entry[f"loss_{name}_weighted"] for name in ("ce", "forward_kl"))
            # float32 sums.
            assert entry["loss_total"] == pytest.approx(total, rel=1e-6)
            assert {"grad_norm", "temperature", "temperature_gradient", "valid_tokens", "tokens"} <= entry.keys()
        else:
            assert entry["val_ppl"] == pytest.approx(math.exp(entry["val_ce"]), rel=1e-12)


def test_validation_does_not_depend_on_the_schedule_nor_move_anything(start, tiny_experiment):
    session = start(tiny_experiment(distillation__temperature__init=3.0)).train()
    setting, split = session.setting, session.setting.text.validation
    states = watch_teacher(setting, split, "validation")
    before = {name: p.detach().clone() for name, p in setting.module.named_parameters()}
    first = evaluate(setting, split, states, "validation")
    with torch.no_grad():
        setting.module.temperature.raw.fill_(-1.0)
    again = evaluate(setting, split, states, "validation")
    assert (first.student_ppl, first.kl_to_teacher) == (again.student_ppl, again.kl_to_teacher)
    assert all(torch.equal(p, before[n]) for n, p in setting.module.named_parameters() if n != "temperature.raw")
    assert setting.module.training


def test_a_student_gone_astray_has_an_infinite_perplexity_and_no_traceback(start, tiny_experiment):
    setting = start(tiny_experiment()).setting
    with torch.no_grad():
        setting.module.student.model.norm.get_parameter("weight").mul_(1e4)
    split = setting.text.validation
    seen = evaluate(setting, split, watch_teacher(setting, split, "validation"), "validation")
    assert seen.student_nll_W.sum() / seen.tokens > 709 and seen.student_ppl == math.inf


def test_a_step_that_is_not_finite_ends_in_a_sentence_and_spoils_nothing(start, tiny_experiment):
    session = start(tiny_experiment(train__steps=20, train__lr=1e20, train__clip=1e20))
    with pytest.raises(UserError, match=r"training broke down in step \d+: .* lower train\.lr") as error:
        session.train()
    assert "\n" not in str(error.value)
    assert all(bool(torch.isfinite(p).all()) for p in session.setting.module.parameters())


STOPPING = {"train__steps": 9, "train__eval_every": 1, "train__stopping__patience": 3, "train__stopping__grace": 0.0}
SERIES = (3.0, 2.5, 2.4, 2.41, 2.405, 2.399, 2.42, 2.43, 2.44)


@pytest.mark.parametrize(("min_delta", "ends", "best"), [(0.01, 6, 3), (0.0, 9, 6)])
def test_early_stopping_ends_the_run_and_puts_the_best_back(start, tiny_experiment, course, min_delta, ends, best):
    experiment = tiny_experiment(**STOPPING, train__stopping__min_delta=min_delta)
    weights = {}

    class Watching(Recorder):
        def log(self, step, values):
            super().log(step, values)
            if step == 4:
                # From an older one, a run that is resumed elsewhere might not come by these best weights again.
                last = torch.load(session.folder.checkpoints / NAME, weights_only=False)
                assert last["progress"]["step"] == 3
            weights[step] = {n: p.detach().clone() for n, p in session.setting.module.named_parameters()}

    session = start(experiment, Watching)
    course(*SERIES)
    session.train()
    assert (session.progress.step, session.setting.stopper.best_step) == (ends, best)
    assert session.progress.stopped and session.seen is None
    margin = " by more than 0.01" if min_delta else ""
    (note,) = stopping_notes(session.setting, session.progress)
    assert note.endswith(f"is that of step {best}, the last to lower validation cross-entropy{margin}.")
    assert all(torch.equal(p, weights[best][n]) for n, p in session.setting.module.named_parameters())
    assert not all(torch.equal(p, weights[ends][n]) for n, p in session.setting.module.named_parameters())


def test_ctrl_c_while_an_early_stop_is_saved_is_heard(start, tiny_experiment, course, monkeypatch):
    session = start(tiny_experiment(**STOPPING, train__stopping__min_delta=0.01))
    course(*SERIES)
    save = checkpoint.save

    def interrupted(*arguments) -> None:
        save(*arguments)
        if session.progress.stopped:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(Interrupted):
        session.train()
    assert session.progress.stopped


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_that_is_no_number_ends_a_run_that_goes_by_it(start, tiny_experiment, course, value):
    session = start(tiny_experiment(**STOPPING))
    course(3.0, value)
    sentence = rf"^the validation cross-entropy after step 2 is {value}, so the run has diverged: lower train\.lr .*$"
    with pytest.raises(UserError, match=sentence):
        session.train()


def test_a_scheduled_temperature_ends_where_the_last_step_had_it(start, tiny_experiment, course):
    """T goes from 1 to 4 in 9 steps, the last of which would have 1 + 3 * 8 / 9; the run stops after 6."""
    ramp = {f"distillation__temperature__ramp__{key}": value for key, value in {"start": 1.0, "end": 1.0}.items()}
    fixed = {"distillation__temperature__mode": "fixed", "distillation__temperature__init": 4.0}
    session = start(tiny_experiment(**STOPPING, **ramp, **fixed, train__stopping__min_delta=0.01))
    course(*SERIES)
    session.train()
    logged = [line["temperature"] for line in read_metrics(session.folder.metrics) if "temperature" in line]
    assert final_temperature(session.setting, session.progress) == logged[-1] == pytest.approx(1.0 + 3.0 * 5 / 9)


def test_nothing_counts_within_the_grace_period(start, tiny_experiment, course):
    session = start(tiny_experiment(**(STOPPING | {"train__stopping__grace": 0.9})))
    course(*SERIES)
    session.train()
    assert session.progress.step == 9 and not session.progress.stopped


def test_a_resumed_run_stops_where_the_straight_one_does(start, go_on, tiny_experiment, course, stopping_at):
    experiment = tiny_experiment(**STOPPING, train__stopping__min_delta=0.01)
    straight = start(experiment)
    course(*SERIES)
    straight.train()
    broken = start(experiment, stopping_at(4))
    left = course(*SERIES)
    with pytest.raises(Interrupted):
        broken.train()
    resumed = go_on(experiment, broken.folder.path)
    assert next(left) == SERIES[4]
    course(*SERIES[4:])
    resumed.train()
    assert_same(resumed, straight)
    assert resumed.setting.stopper.state_dict() == straight.setting.stopper.state_dict()
    # A run that has stopped stays stopped.
    again = go_on(experiment, resumed.folder.path)
    assert again.train().progress.step == straight.progress.step == 6


def test_a_stop_before_a_phase_begins_is_told(tiny_experiment, caplog):
    ramp = {"distillation__losses__forward_kl__ramp__start": 0.0, "distillation__losses__forward_kl__ramp__end": 0.9}
    changes = {"train__steps": 100, "train__eval_every": 5}
    changes |= {"train__stopping__patience": 2, "train__stopping__grace": 0.2}
    with caplog.at_level(logging.WARNING, "asnn_goose"):
        prepare(tiny_experiment(**changes, **ramp))
    (told,) = (record.getMessage() for record in caplog.records)
    assert told == (
        "early stopping can end the run after step 30, and the weight of forward_kl is its own only at step 90: raise "
        "train.stopping.grace"
    )


def test_all_that_begins_or_ends_within_a_run_is_a_phase(tiny_experiment):
    temperature = {f"distillation__temperature__ramp__{key}": value for key, value in (("start", 1.5), ("end", 0.6))}
    experiment = tiny_experiment(train__warmup=0.1, student__annealing__end=0.7, **temperature)
    assert phases(experiment) == {
        "the learning rate's warm-up ends": 0.1,
        "the temperature's adversary begins": 0.2,
        "the temperature's ramp ends": 0.6,
        "the neurons' annealing ends": 0.7,
    }


# What is said


def test_at_most_one_line_per_interval_and_nothing_printed(start, tiny_experiment, caplog, capfd):
    session = start(tiny_experiment(train__steps=10, train__log_every=5, train__eval_every=2))
    with caplog.at_level(logging.INFO, "asnn_goose"):
        session.train()
    lines = [record.getMessage() for record in caplog.records if record.name == "asnn_goose.train.loop"]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["5/10", "10/10"]
    assert set(lines) - set(steps) <= {"computing the teacher's states on validation text (once)"}
    for word in ("loss ", "ce ", "forward_kl ", "tok/s ", "val_ppl ", "ETA "):
        assert all(word in line for line in steps), word
    printed = capfd.readouterr()
    # Not on a terminal, so there is no bar either.
    assert printed.out == printed.err == ""


def test_a_log_line_shows_the_numbers():
    metrics = {"loss_total": 3.25, "loss_ce_raw": 5.0, "loss_ce_weighted": 1.5, "loss_forward_kl_raw": 2.5, "lr": 1.0}
    text = line(7, 40, metrics, {"val_ppl": "512.3", "tok/s": "411"}, 3725.0)
    assert text == "step 7/40  loss 3.25  ce 5  forward_kl 2.5  val_ppl 512.3  tok/s 411  ETA 1:02:05"


def test_the_second_interrupt_ends_at_once_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as asked:
        assert asked == [False]
        signal.raise_signal(signal.SIGINT)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


class _Interrupting(io.RawIOBase):
    """A terminal at which Ctrl-C is pressed while the first bytes are on their way to it."""

    def __init__(self):
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        first, self.written = not self.written, self.written + bytes(data)
        if first:
            signal.raise_signal(signal.SIGINT)
        return len(data)


def test_an_interrupt_in_the_midst_of_a_log_line_is_told_after_it():
    terminal, logger = _Interrupting(), logging.getLogger("asnn_goose")
    logger.addHandler(logging.StreamHandler(io.TextIOWrapper(io.BufferedWriter(terminal), encoding="utf-8")))
    logger.setLevel(logging.INFO)
    with stop_on_interrupt() as asked:
        logger.info("step 5/60")
    assert asked == [True]
    assert terminal.written == b"step 5/60\nstopping after this step; Ctrl-C again stops at once\n"


def test_an_interrupt_leaves_a_checkpoint(start, tiny_experiment, stopping_at):
    session = start(tiny_experiment(train__checkpoint_every=1000), stopping_at(1))
    with pytest.raises(Interrupted):
        session.train()
    assert (session.folder.checkpoints / NAME).is_file()
