import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from asnn_goose.errors import UserError
from asnn_goose.reporting.record import load_result
from asnn_goose.reporting.record_base import Record, refuse_non_finite

# The names that other programs read, as the design lists them.
NAMES = [
    *("version", "parent", "seed", "fingerprint", "scale", "tokens_seen", "wall_seconds", "tokens_per_second"),
    *("peak_memory_bytes", "teacher.name", "teacher.test_ppl", "student.test_ppl", "student.val_ppl"),
    *("student.bits_per_byte", "student.parameters", "ratio_to_teacher", "kl_to_teacher", "top1_agreement"),
    *("knowledge_retention", "baselines.unigram_ppl", "baselines.bigram_ppl", "baselines.bigram_full_ppl"),
    *("spikes.rate", "spikes.zero_fraction", "spikes.operand_fraction", "spikes.dead_fraction"),
    *("spikes.saturated_fraction", "spikes.per_layer", "energy.student_joules_per_token"),
    *("energy.teacher_joules_per_token", "energy.by_kind"),
]


def models() -> list[type[BaseModel]]:
    found, new = [], [Record]
    while new:
        found += new
        new = [child for model in new for child in model.__subclasses__()]
    return found[1:]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_the_file_exactly(make_result, value):
    result = make_result({"kl_to_teacher": value, "spikes.per_layer.3.rate": value})
    assert type(result).model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize("name", NAMES)
def test_promised_names_are_in_the_json(make_result, name):
    tree = json.loads(make_result().model_dump_json())
    for part in name.split("."):
        tree = tree[part]


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_leaf_is_documented(model):
    undocumented = [
        name
        for name, field in model.model_fields.items()
        if field.description is None and not any(other.__name__ in str(field.annotation) for other in models())
    ]
    assert undocumented == []


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("student.test_ppl", float("inf"), "student.test_ppl is inf"),
        ("spikes.per_layer.2.rate", float("nan"), "spikes.per_layer.2.rate is nan"),
        ("energy.by_kind.head.joules_per_token", float("-inf"), "energy.by_kind.head.joules_per_token is -inf"),
    ],
)
def test_a_non_finite_number_is_refused_by_name(make_result, key, value, shown):
    with pytest.raises(UserError, match=shown.replace(".", r"\.")):
        refuse_non_finite(make_result({key: value}), "a-run")


def test_an_older_record_without_the_finer_counts_of_energy_loads(make_result, tmp_path):
    tree = json.loads(make_result().model_dump_json())
    multiplied, dram = "student_counts_multiplied_joules_per_token", "dram_picojoules_per_byte"
    for field in ("teacher_by_kind", "by_precision", multiplied, dram):
        del tree["energy"][field]
    for kind in tree["energy"]["by_kind"].values():
        for field in ("additions", "multiplications", "bytes_per_token"):
            kind.pop(field)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(tree))
    energy = load_result(path).energy
    assert energy is not None and energy.student_joules_per_token == make_result().energy.student_joules_per_token
    assert energy.by_precision == energy.teacher_by_kind == {} and energy.by_kind["head"].additions is None


def test_an_older_record_without_probes_loads(make_result, tmp_path):
    tree = json.loads(make_result().model_dump_json())
    assert tree.pop("information")["sites"][1]["states_r2"]["shuffled"] == -0.0113
    path = tmp_path / "result.json"
    path.write_text(json.dumps(tree))
    assert load_result(path) == make_result({"information": None})


def test_finite_numbers_pass(make_result):
    refuse_non_finite(make_result(), "a-run")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda tree: tree.pop("scale"), "scale: Field required"),
        (lambda tree: tree["student"].update(perplexity=3), "student.perplexity: Extra inputs"),
        (lambda tree: tree["student"].update(test_ppl="low"), "student.test_ppl"),
        (lambda tree: tree["student"].update(test_ppl=0), "student.test_ppl: Input should be greater than 0"),
        (lambda tree: tree["teacher"].update(test_ppl=-1), "teacher.test_ppl: Input should be greater than 0"),
        (lambda tree: tree["baselines"].update(bigram_ppl=0), "baselines.bigram_ppl: Input should be greater than 0"),
        (lambda tree: tree.update(ratio_to_teacher=0), "ratio_to_teacher: Input should be greater than 0"),
        (lambda tree: tree.update(steps=0), "steps: Input should be greater than 0"),
    ],
)
def test_load_names_file_and_field(make_result, tmp_path, damage, told):
    tree = json.loads(make_result().model_dump_json())
    damage(tree)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=told) as caught:
        load_result(path)
    assert str(path) in str(caught.value)


def test_load_of_a_missing_file_says_how_to_go_on(tmp_path):
    with pytest.raises(UserError, match="--resume"):
        load_result(tmp_path / "result.json")


def test_load_of_half_a_file_is_one_sentence(make_result, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(make_result().model_dump_json()[:200])
    with pytest.raises(UserError, match="is not the result of a run"):
        load_result(path)
