"""The command line: syntax, types, and one sentence for each mistake."""

from pathlib import Path

import pytest

from asnn_goose.config import load_classifier_experiment, load_experiment
from asnn_goose.config.flags import as_arguments, parse_flags, settable
from asnn_goose.config.keys import branches
from asnn_goose.errors import UserError

KINDS = "one of ternary, binary, integer, radix, quantised, dense"


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--seed", "3"], "seed", 3),
        (["--seed=3"], "seed", 3),
        (["--seed", "3", "--seed", "4"], "seed", 4),
        (["--train.lr", "1e-3"], "train.lr", 1e-3),
        (["--train.steps", "null"], "train.steps", None),
        (["--student.neuron.detach_reset", "false"], "student.neuron.detach_reset", False),
        (["--student.neuron.scale", "none"], "student.neuron.scale", "none"),
        (["--train.wandb", "off"], "train.wandb", "off"),
        (["--data.name", "123"], "data.name", "123"),
        (["--data.name=a: b = c"], "data.name", "a: b = c"),
        (["--data.path", "some folder"], "data.path", Path("some folder")),
        (["--distillation.losses.forward_kl.weight", "0.5"], "distillation.losses.forward_kl.weight", 0.5),
    ],
)
def test_values_are_typed_by_the_schema(argv: list[str], key: str, value: object):
    flags = parse_flags(argv)
    assert flags.settings == {key: value}
    assert type(flags.settings[key]) in (type(value), type(Path()))


def test_fixed_flags():
    flags = parse_flags(["--dry-run", "--scale", "cpu", "--student=small", "--run-dir", "a b", "--debug", "--resume"])
    assert (flags.dry_run, flags.debug, flags.help, flags.settings) == (True, True, False, {})
    assert (flags.picks, flags.run_dir, flags.resume) == ({"train": "cpu", "student": "small"}, Path("a b"), "newest")
    assert parse_flags(["--resume", "runs/v10/x", "--dry-run"]).resume == Path("runs/v10/x")
    assert parse_flags(["-h"]).help


@pytest.mark.parametrize(
    ("argv", "start", "end"),
    [
        ("--student.neurn.kind dense", "student.neurn.kind = 'dense' (command line): no such key; student has layers,",
         "did you mean student.neuron.kind?"),
        ("--student.neuron.kind dens", f"student.neuron.kind = 'dens' (command line): must be {KINDS};",
         "did you mean dense?"),
        ("--train.learning_rate 1", "train.learning_rate = '1' (command line): no such key; train has tokens,", ""),
        ("--lr 1", "lr = '1' (command line): no such key; command line has seed,", "did you mean train.lr?"),
        ("--distillation.forward_kl.weight 1", "distillation.forward_kl.weight = '1'",
         "did you mean distillation.losses.forward_kl.weight?"),
        ("--distillation.losses.alpha.weight 1", "distillation.losses.alpha.weight = '1'", ""),
        ("--alpha 0.5", "alpha = '0.5' (command line): no such key;", ""),
        ("--dryrun", "dryrun (command line): no such key;", "did you mean dry-run?"),
        ("--distillation.losses 1",
         "distillation.losses = '1' (command line): no such key; distillation.losses has ce, forward_kl,", ""),
        ("--version v3", "version = 'v3' (command line): no such key;", ""),
        ("--train.lr -1e-3", "train.lr = '-1e-3' (command line): must be a number above 0", ""),
        ("--train.lr 1e-3x", "train.lr = '1e-3x' (command line): must be a number above 0", ""),
        ("--train.steps 2.5", "train.steps = '2.5' (command line): must be a whole number above 0 or null", ""),
        ("--train.beta1 1", "train.beta1 = '1' (command line): must be a number at least 0 and below 1", ""),
        ("--student.neuron.detach_reset maybe", "student.neuron.detach_reset = 'maybe' (command line): must be true or",
         "false"),
        ("--seed", "--seed (command line): needs a value", ""),
        ("--seed --dry-run", "--seed (command line): needs a value", ""),
        ("--scale", "--scale (command line): needs a value", ""),
        ("--run-dir", "--run-dir (command line): needs a value", ""),
        ("--dry-run=yes", "--dry-run = 'yes' (command line): takes no value", ""),
        ("--train cpu", "--train (command line): the train group is picked with --scale", ""),
        ("--train.scale cpu", "--train.scale (command line): the train group is picked with --scale", ""),
        ("smoke", "'smoke' (command line): stray word", ""),
        ("-seed 3", "'-seed' (command line): stray word", ""),
        ("--", "'--' (command line): stray word", ""),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_sentence(argv: str, start: str, end: str):
    with pytest.raises(UserError) as raised:
        parse_flags(argv.split())
    sentence = str(raised.value)
    assert sentence.startswith(start)
    assert sentence.endswith(end)
    assert len(sentence.splitlines()) == 1


def test_a_long_or_ragged_value_still_makes_one_short_line():
    with pytest.raises(UserError) as raised:
        parse_flags(["--train.lr", "x\n" * 1000])
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 150


def test_overrides_turn_back_into_arguments():
    overrides = {
        "seed": 3,
        "train.lr": 1e-05,
        "train.steps": None,
        "student.neuron.detach_reset": True,
        "data.name": "a b",
    }
    arguments = as_arguments(overrides)
    assert arguments[0] == "--seed=3"
    assert parse_flags(arguments).settings == overrides


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--student.transfer.lr=1e-3"], "student.transfer"),
        (["--train.stopping.patience=3"], "train.stopping"),
        (["--distillation.curriculum.rule=time"], "distillation.curriculum"),
        (["--student.annealing.mix=0.5"], "student.annealing"),
        (["--distillation.temperature.ramp.start=3"], "distillation.temperature.ramp"),
        (["--distillation.losses.reverse_kl.weight=1"], "distillation.losses.reverse_kl"),
    ],
)
def test_a_branch_is_taken_away_by_null_and_given_again_behind_it(flags: list[str], key: str):
    def branch(invocation) -> object:
        found = invocation.experiment
        for name in key.split("."):
            found = getattr(found, name)
        return found

    flags = ["--scale=smoke", *flags]
    given, taken = (load_experiment("v10", [*flags, *more]) for more in ([], [f"--{key}=null"]))
    assert branch(given) is not None and branch(taken) is None
    assert taken.overrides[key] is None and not any(name.startswith(f"{key}.") for name in taken.overrides)
    again = load_experiment("v10", ["--scale=smoke", *as_arguments(taken.overrides)])
    assert again.experiment == taken.experiment
    anew = load_experiment("v10", ["--scale=smoke", f"--{key}=null", *flags[1:]])
    assert branch(anew) is not None


def test_the_first_stage_of_a_classifier_is_taken_away_by_null():
    flags = ["--scale=smoke", "--general=null"]
    assert load_classifier_experiment("v17_two_stage", flags).experiment.general is None


def test_a_branch_that_must_be_there_takes_no_null():
    for name, start in (("student.neuron", "student.neuron = 'null' (command line): no such key"), ("data", "no data")):
        with pytest.raises(UserError) as raised:
            load_experiment("v10", ["--scale=smoke", f"--{name}=null"])
        assert str(raised.value).startswith(start)


def test_help_lists_every_key_with_its_doc_and_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as leaving:
        load_experiment("v10", ["--help", "--scale", "smoke", "--seed", "41"])
    assert leaving.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for path, key in settable().items():
        assert f"--{path} " in printed
        assert f"{key.doc} ({key.allowed})" in printed
    for branch in branches():
        assert f"--{branch} null " in printed
    for flag in ("--scale", "--seed", "--dry-run", "--resume", "--run-dir", "--debug", "--help", "--student NAME"):
        assert f"{flag} " in printed
    assert "--seed 41 " in printed
    assert "--train.tokens 4096 " in printed
