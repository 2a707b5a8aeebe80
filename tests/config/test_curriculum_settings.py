"""A curriculum that cannot work is refused in one sentence that names the key."""

import pytest

from asnn_goose.config import Experiment, fingerprint, load_experiment
from asnn_goose.config.curriculum import CurriculumConfig
from asnn_goose.config.load import RESOLVED
from asnn_goose.errors import UserError
from asnn_goose.schedules import POCL_STAGES
from asnn_goose.train.plan import stages_of

C = "distillation.curriculum"
ON = f"--{C}.rule=time"


def load(*flags: str, version: str = "v10") -> Experiment:
    return load_experiment(version, ["--scale=smoke", *flags]).experiment


def test_the_defaults_are_the_settings_of_the_methods_code():
    config = CurriculumConfig()
    assert stages_of(config) == POCL_STAGES and config.complement
    # Equal shares of the run, since the code gives each stage as many epochs as any other of a subset that grows.
    assert config.boundaries == (0.25, 0.5, 0.75)
    assert load("--distillation=pocl").distillation.curriculum == CurriculumConfig(restart_on_stage=True)


def test_no_version_but_v11_2_has_stages():
    assert load(version="v11_1").distillation.curriculum is None
    assert load(version="v11_2").distillation.curriculum == CurriculumConfig()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([f"--{C}.volumes=[0.5,1]"], "temperatures has 4 entries and volumes 2: give one per stage, or null"),
        ([f"--{C}.w_kd=[0.5]"], "w_kd has 1 entries and volumes 4"),
        ([f"--{C}.boundaries=[0.5]"], "boundaries has 1 entries and volumes 4: give one fewer than stages"),
        ([f"--{C}.volumes=[0.25,0.5,0.75,0.9]"], "must rise from above 0 and end at 1, not 0.25, 0.5, 0.75, 0.9"),
        ([f"--{C}.volumes=[0.5,0.25,0.75,1]"], "volumes must rise from above 0"),
        ([f"--{C}.volumes=[]"], "volumes must rise from above 0 and end at 1, not be empty"),
        ([f"--{C}.boundaries=[0.5,0.25,0.75]"], "boundaries must rise strictly between 0 and 1"),
        ([f"--{C}.boundaries=[0,0.25,0.75]"], "boundaries must rise strictly between 0 and 1"),
        ([f"--{C}.boundaries=[0.1,0.25,1]"], "boundaries must rise strictly between 0 and 1"),
        ([f"--{C}.temperatures=[0,1,1,1]"], "temperatures must be above 0, not 0"),
        ([f"--{C}.w_kd=[0.5,0.5,0.5,1.5]"], "w_kd must be between 0 and 1, or complement false, not 1.5"),
        ([f"--{C}.w_kd=[-0.5,0.5,0.5,1.5]", f"--{C}.complement=false"], "w_kd must be at least 0, not -0.5"),
        ([f"--{C}.rule=patience", f"--{C}.patience=0"], "patience = '0' .* must be a whole number above 0"),
        ([f"--{C}.prompt_share=1"], "prompt_share .* below 1"),
        ([ON, "--distillation.temperature.mode=learned"], "the learned one, and 1 does not lie strictly between"),
        ([ON, "--distillation.temperature.mode=minimised"], "minimised has no stages"),
        ([ON, "--distillation.temperature.ramp.start=1"], "temperature.ramp both say what the temperature goes to"),
        ([ON, "--distillation.temperature.anchor=2"], "temperature.anchor both say what the temperature goes to"),
        ([ON, "--distillation.losses.forward_kl.ramp.start=0"], "the ramp of forward_kl and curriculum.w_kd both set"),
        ([ON, "--distillation.losses.ce.ramp.start=0"], "the ramp of ce and curriculum.w_kd both set"),
        ([ON, "--distillation.losses.reverse_kl.weight=1"], "losses has forward_kl, reverse_kl: set w_kd to null"),
        ([ON, "--distillation.balance.mode=gradient_norm"], "curriculum.w_kd would be undone"),
    ],
)
def test_what_cannot_work_is_one_sentence(flags: list[str], message: str):
    with pytest.raises(UserError, match=message) as error:
        load(*flags)
    assert "\n" not in str(error.value) and "curriculum" in str(error.value)


def test_complement_needs_ce():
    tree = load(ON, "--distillation.losses.hidden.weight=1").model_dump(mode="json")
    del tree["distillation"]["losses"]["ce"]
    with pytest.raises(ValueError, match="add ce, or set complement to false"):
        Experiment.model_validate(tree)
    tree["distillation"]["curriculum"]["complement"] = False
    Experiment.model_validate(tree)


def test_what_a_rule_does_not_read_is_not_checked():
    load(f"--{C}.rule=plateau", f"--{C}.boundaries=[]")
    load(f"--{C}.temperatures=null", f"--{C}.w_kd=null", "--distillation.temperature.ramp.start=1")


def test_how_often_validation_is_looked_at_counts_where_a_rule_watches_it():
    resolved = dict.fromkeys(RESOLVED.values(), "x")
    for rule, counts in {"time": False, "plateau": True, "patience": True}.items():
        one, other = (load(f"--{C}.rule={rule}", f"--train.eval_every={n}") for n in (4, 5))
        assert (fingerprint(one, resolved) != fingerprint(other, resolved)) == counts
