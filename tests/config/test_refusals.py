"""What a run could not do with its settings is said before it begins, in one sentence that names the key."""

import pytest

from asnn_goose.config import load_experiment
from asnn_goose.errors import UserError

LOSSES = "distillation.losses"


def refusal(*flags: str, version: str = "v11_1") -> str:
    with pytest.raises(UserError) as error:
        load_experiment(version, ["--scale=smoke", *flags])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "version"),
    [
        ("train.lr", "v10"),
        ("train.weight_decay", "v10"),
        ("distillation.temperature.lambda_max", "v11_1"),
        ("distillation.losses.forward_kl.weight", "v10"),
        ("student.neuron.threshold", "v10"),
        ("student.neuron.width", "v10"),
    ],
)
@pytest.mark.parametrize("value", ["inf", "1e400"])
def test_no_key_takes_an_infinity(key: str, version: str, value: str):
    sentence = refusal(f"--{key}={value}", version=version)
    assert sentence.startswith(f"{key} = inf (command line): must be a finite number ")


GRADNORM = "--distillation.balance.mode=gradnorm"
RAMP = [f"--{LOSSES}.forward_kl.ramp.{key}={value}" for key, value in {"start": 0.0, "end": 0.9}.items()]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--train.optimiser=dot", "--train.momentum=0.95"],
            "train: momentum 0.95 and momentum_gap 0.075 must leave both momenta of dot",
        ),
        (["--train.optimiser=dot", "--train.momentum=0.01"], "train: momentum 0.01 and momentum_gap 0.075 must"),
        (
            ["--train.optimiser=dot", "--train.neuron_lr_factor=7"],
            "dot has one learning rate, and neuron_lr_factor is 7",
        ),
        ([GRADNORM, f"--{LOSSES}.ce.weight=0"], "value at balance.start, and the weight of ce is 0: drop the loss"),
        ([GRADNORM, *RAMP], "balance.mode gradnorm sets the size of each gradient, so the ramp of forward_kl"),
        (
            ["--distillation=cka", f"--{LOSSES}.cka.parts=2", "--train.batch_size=1", "--data.window=9"],
            "distillation.losses.cka.parts 2 cuts the 7 states of a micro-batch into pieces of 4, the last of which",
        ),
        ([f"--seed={2**64}"], "seed = '18446744073709551616' (command line): must be a whole number at least 0 and"),
        (["--student.neuron.kind=ternary", "--student.neuron.learn_decay=layer"], "student.neuron: decay 1.0 cannot"),
    ],
)
def test_what_cannot_be_together_is_refused(flags: list[str], words: str):
    assert words in refusal(*flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--train.momentum=0.95"],
        [GRADNORM],
        ["--distillation=cka", f"--{LOSSES}.cka.parts=2", "--train.batch_size=1", "--data.window=10"],
        [f"--seed={2**64 - 1}"],
        ["--student.neuron.kind=dense", "--student.neuron.learn_decay=layer"],
    ],
)
def test_what_is_just_possible_is_taken(flags: list[str]):
    load_experiment("v10", ["--scale=smoke", *flags])
