"""What is said of a run's health: made-up courses, one for each alarm and one beside it that must stay silent."""

import pytest
import torch

from asnn_goose.losses import forward_kl
from asnn_goose.reporting import write_report
from asnn_goose.reporting.alarms import find_alarms
from asnn_goose.reporting.health import (
    course_alarms,
    explosion_alarms,
    gradient_alarms,
    logit_error,
    sentences,
    target_alarms,
)

FALLING = [7.0, 6.5, 6.2, 6.0, 5.9, 5.85, 5.8, 5.76, 5.73]


def course(name: str, values, every: int = 10) -> list[dict]:
    return [{"step": every * (i + 1), name: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (FALLING, None),
        (FALLING[::-1], "did not fall: 5.763 nats over the first third of the looks, 6.567 over the last"),
        ([6.0, 7.0, 5.0, 6.5], "did not fall: 6.000"),
        ([7.0, 6.0, 5.0, 5.001, 5.002, 5.001], "is stuck: over the second half of the looks it moved by less"),
        # 5.008 - 5.001 is 1.4e-3 of 5.
        ([7.0, 6.0, 5.0, 5.008, 5.002, 5.001], None),
        # Three looks are no course.
        ([5.0, 6.0, 7.0], None),
    ],
)
def test_a_course_that_does_not_fall_or_sticks(values, word: str | None):
    alarms = course_alarms(course("val_ce", values))
    assert len(alarms) == (word is not None)
    assert word is None or word in alarms[0]


def test_a_look_that_is_not_finite_is_left_out():
    lines = course("val_ce", FALLING)
    lines[4]["val_ce"] = None
    assert course_alarms(lines) == []


@pytest.mark.parametrize(
    ("values", "rings"),
    [
        ([9.0, 3.0, 2.0, 6.1, 2.0], True),
        ([9.0, 3.0, 2.0, 6.0, 2.0], False),
        # 7.0 comes before 2.0: the minimum is a running one.
        ([9.0, 3.0, 7.0, 2.0, 5.0], False),
        # The warm-up ends with step 10, and what it saw is no minimum.
        ([1.0, 5.0, 4.0, 4.0, 4.0], False),
        # A loss of 0 has no multiple.
        ([1.0, 0.0, 1.0, 1.0, 1.0], False),
    ],
)
def test_an_explosion_after_warm_up(make_experiment, values, rings: bool):
    experiment = make_experiment({"train.steps": 50, "train.warmup": 0.2})
    lines = course("loss_ce_raw", values) + course("loss_total", [1.0, 1.0, 9.0, 9.0, 9.0])
    alarms = explosion_alarms(lines, experiment)
    assert len(alarms) == rings
    if rings:
        assert alarms == [
            "loss_ce_raw exploded: 6.100 at step 40, more than 3 times its lowest value until then, 2.000."
        ]


def test_nearly_uniform_targets_ring():
    assert target_alarms(course("target_entropy_share", [0.5, 0.98])) == []
    (alarm,) = target_alarms(course("target_entropy_share", [0.5, 0.985, 0.99]))
    assert "nearly uniform at step 20: their entropy is 98.5 % of the largest possible" in alarm


def test_a_term_without_influence_rings():
    """A weight of 1e-5 where 1e5 was meant; one look above the bound is enough for silence."""
    lines = course("grad_ratio_value_relation", [1e-4, 3e-4, 2e-4]) + course("grad_ratio_hidden", [1e-4, 0.02])
    (alarm,) = gradient_alarms(lines)
    assert alarm.startswith("The loss value_relation has next to no influence") and "at most 0.0003000 times" in alarm


@pytest.mark.parametrize("error", [0.1, 0.5])
def test_logit_error_of_a_gaussian_difference(error: float):
    """At a high temperature it is the spread of s - t, whatever constant is added to either."""
    draw = torch.Generator().manual_seed(0)
    t = torch.randn(4, 20_000, generator=draw, dtype=torch.float64)
    s = t + error * torch.randn(4, 20_000, generator=draw, dtype=torch.float64) + 3.0
    raw = forward_kl(s, t, temperature=100.0).item()
    # 80,000 draws give a spread to 0.25 %, and the next order in 1/T is below 1 %.
    assert logit_error(raw) == pytest.approx(error, rel=0.01)


def test_logit_error_by_hand():
    assert logit_error(26.7) == pytest.approx(7.307530, abs=1e-6)
    assert logit_error(0.0) == logit_error(-1e-9) == 0.0


ALL = {
    "val_ce": ("went from 7.000 nats at step 10 to 5.730 at step 90; its lowest was 5.730", FALLING),
    "val_kl": ("ended at 2.500 nats (T = 1). A rule of thumb", [3.0, 2.5]),
    "loss_forward_kl_raw": ("T² KL of 2.000 stands for a root-mean-square error of 2.000", [3.0, 2.0]),
    "grad_ratio_hidden": ("stood to that of ce as 0.2500 (hidden) to 1", [0.5, 0.25]),
}


@pytest.mark.parametrize("name", ALL)
def test_a_sentence_needs_its_data_and_nothing_else(name: str):
    words, values = ALL[name]
    (sentence,) = sentences(course(name, values))
    assert words in sentence


def test_targets_are_told_together():
    lines = [{"step": 1, "target_entropy": 2.0, "target_top100_mass": 0.75}]
    assert sentences(lines) == [
        "The teacher's targets had an entropy of 2.000 nats at the last temperature, with 75.0 % of their mass on the "
        "100 best tokens."
    ]
    assert sentences([{"step": 1, "target_entropy": 2.0}]) == sentences([]) == []


def test_the_approximation_and_the_rule_of_thumb_are_called_what_they_are():
    text = " ".join(sentences(course("val_kl", [2.0]) + course("loss_forward_kl_raw", [2.0])))
    assert "heuristic" in text and "in the approximation of a high temperature" in text


def test_find_alarms_has_all_of_them(make_result, make_experiment):
    lines = course("val_ce", FALLING[::-1]) + course("target_entropy_share", [0.99])
    lines += course("loss_ce_raw", [2.0, 7.0]) + course("grad_ratio_hidden", [1e-3])
    alarms = find_alarms(make_result(), lines, make_experiment({"distillation.temperature": {"mode": "fixed"}}))
    for words in ("did not fall", "nearly uniform", "exploded", "next to no influence"):
        assert sum(words in alarm for alarm in alarms) == 1, words


def test_a_report_has_the_paragraph(make_run, tmp_path):
    """The last T² KL of the made-up run is 2 (6 + 4/19)."""
    folder = make_run(tmp_path / "runs", {"parent": None})
    (line,) = (
        line
        for line in write_report(folder.path, tmp_path / "reports", tmp_path / "runs").read_text().splitlines()
        if line.startswith("**Training health.**")
    )
    assert "T² KL of 12.42 stands for a root-mean-square error of 4.984" in line
