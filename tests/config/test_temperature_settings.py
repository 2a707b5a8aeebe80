"""What a temperature for each window or token cannot be combined with, and its bounds, told in one sentence."""

import pytest

from asnn_goose.config import load_experiment
from asnn_goose.errors import UserError

T = "--distillation.temperature"
TOPK = ["--distillation=tail_bucket", "--distillation.targets=topk", f"{T}.init=2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([f"{T}.scope=token"], "scope token is of a learned temperature: set mode to learned, or scope to global"),
        ([f"{T}.scope=sequence", f"{T}.mode=minimised"], "scope sequence is of a learned temperature"),
        ([*TOPK, f"{T}.mode=learned", f"{T}.scope=token"], "scope token reads the teacher's states"),
        ([f"{T}.mode=learned", f"{T}.high=inf"], r"high = inf .*: must be a finite number above 0"),
        ([f"{T}.mode=learned", f"{T}.scope=word"], "scope .* must be one of global, sequence, token"),
    ],
)
def test_what_cannot_work_is_one_sentence(flags: list[str], message: str):
    with pytest.raises(UserError, match=message) as error:
        load_experiment("v10", ["--scale=smoke", *flags])
    assert "\n" not in str(error.value)


def test_stages_may_anchor_a_temperature_per_token():
    experiment = load_experiment("v11_2", ["--scale=smoke", f"{T}.scope=token"]).experiment
    assert experiment.distillation.temperature.scope == "token"
