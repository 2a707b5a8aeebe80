"""What a temperature for each window or token cannot be combined with, and its bounds, told in one sentence."""

import pytest

from asnn_goose.config import load_experiment
from asnn_goose.config.distillation import TEMPERATURES_KEPT
from asnn_goose.errors import UserError
from asnn_goose.kernels.linear_divergence import tail

T = "--distillation.temperature"
TOPK = ["--distillation=tail_bucket", "--distillation.targets=topk", f"{T}.init=2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([f"{T}.scope=token"], "scope token is of a learned temperature: set mode to learned, or scope to global"),
        ([f"{T}.scope=sequence", f"{T}.mode=minimised"], "scope sequence is of a learned temperature"),
        (
            [f"{T}.mode=minimised", f"{T}.ramp.start=1.5"],
            "mode minimised has no ramp: set ramp to null, or mode to fixed or learned",
        ),
        (
            [f"{T}.mode=learned", f"{T}.ramp.start=1.5", f"{T}.anchor=2"],
            "the anchor follows a ramp of a learned temperature: leave out anchor, or ramp",
        ),
        ([*TOPK, f"{T}.mode=learned", f"{T}.scope=token"], "scope token reads the teacher's states"),
        (
            [*TOPK[:2], f"{T}.init=6"],
            r"targets topk serve temperatures from 1 to 5, and temperature or .* go to 6: move",
        ),
        ([*TOPK[:2], f"{T}.init=0.5"], "can go to 0.5: move these, or set targets to hidden"),
        ([*TOPK, f"{T}.ramp.start=7"], "can go to 7"),
        ([*TOPK, f"{T}.mode=learned", f"{T}.high=9"], "can go to 9"),
        ([f"{T}.mode=learned", f"{T}.high=inf"], r"high = inf .*: must be a finite number above 0"),
        ([f"{T}.mode=learned", f"{T}.scope=word"], "scope .* must be one of global, sequence, token"),
    ],
)
def test_what_cannot_work_is_one_sentence(flags: list[str], message: str):
    with pytest.raises(UserError, match=message) as error:
        load_experiment("v10", ["--scale=smoke", *flags])
    assert "\n" not in str(error.value)


def test_a_store_keeps_the_tail_at_the_temperatures_that_are_allowed():
    assert (tail.LOWEST, tail.HIGHEST) == TEMPERATURES_KEPT
    for flags in ([f"{T}.init=1"], [f"{T}.init=5"], [f"{T}.mode=learned"]):
        load_experiment("v10", ["--scale=smoke", *TOPK, *flags])
    # Without a store any temperature will do.
    load_experiment("v10", ["--scale=smoke", f"{T}.init=9"])


def test_stages_may_anchor_a_temperature_per_token():
    experiment = load_experiment("v11_2", ["--scale=smoke", f"{T}.scope=token"]).experiment
    assert experiment.distillation.temperature.scope == "token"
