import re

import pytest

from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.material import Material
from asnn_goose.reporting.provenance import collect_provenance
from asnn_goose.reporting.summary import opening, results

UNIGRAM = "the unigram (1,205)"
BIGRAM = "the bigram fitted on the same tokens (564.9)"
FULL = "the bigram fitted on all training text (245.2)"


@pytest.fixture
def material(make_experiment, make_result, tmp_path):
    def make(results=None, settings=None, parent=None, twins=None, alarms=()):
        experiment = make_experiment(settings)
        provenance = collect_provenance(experiment, "0123abcd" * 8, argv=[], overrides={})
        run = FinishedRun(tmp_path, make_result(results), experiment)
        return Material(run, provenance, list(alarms), parent, twins or {}, {})

    return make


def paragraph(material):
    return opening(material)[2]


@pytest.mark.parametrize(
    ("ppl", "told"),
    [
        (200.0, ["below", UNIGRAM, BIGRAM, FULL]),
        (421.3, ["below", UNIGRAM, BIGRAM, "but not below", FULL]),
        (564.9, ["below", UNIGRAM, "but not below", BIGRAM, FULL]),
        (5000.0, ["not below", UNIGRAM, BIGRAM, FULL]),
    ],
)
def test_the_baselines_it_beats_are_named(material, ppl, told):
    sentence = paragraph(material({"student.test_ppl": ppl})).split("That is ")[1].split(". ")[0]
    assert re.sub(" and |, ", " ", sentence) == " ".join(told)


def test_the_number_comes_with_its_interval_and_the_teacher(material):
    text = paragraph(material())
    assert text.startswith("**Does the change help?** ")
    assert (
        "After 20,480 training tokens the spiking student (6 RWKV-7 blocks, ternary neurons, 4 micro-steps per token) "
        "has a test perplexity of 421.3 (95 % interval 407.8 to 436.1), 11.9 times the teacher's 35.48." in text
    )


def test_without_an_interval_none_is_claimed(material):
    changes = {"student.test_ppl_low": None, "student.test_ppl_high": None}
    assert "interval" not in paragraph(material(changes))


def test_a_missing_parent_is_said_with_the_command_that_makes_one(material):
    assert "`python experiments/base.py --scale=cpu --seed=0` makes one." in paragraph(material())


def test_a_base_version_says_nothing_of_a_parent(material):
    assert "parent" not in paragraph(material({"parent": None}))


def test_a_parent_is_answered_before_the_number(material, make_experiment, make_result, tmp_path):
    changes = {"version": "base", "run_id": "b", "student.test_ppl": 500.0}
    changes |= {"student.test_ppl_low": 480.0, "student.test_ppl_high": 520.0}
    parent = FinishedRun(tmp_path, make_result(changes), make_experiment({"version": "base"}))
    text = paragraph(material(parent=parent))
    assert text.startswith(
        "**Does the change help?** Better than base: base stands at 500.0 (95 % interval 480.0 to 520.0)"
    )
    table = "\n".join(results(material(parent=parent)))
    assert "| parent base | 500.0 | 480.0 to 520.0 | 11.9 |" in table


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dense", "the dense student (6 RWKV-7 blocks, no spikes)"),
        ("binary", "the spiking student (6 RWKV-7 blocks, binary neurons"),
    ],
)
def test_a_control_is_not_called_spiking(material, kind, words):
    assert words in paragraph(material(settings={"student.neuron.kind": kind}))


def test_alarms_are_counted(material):
    assert "2 alarms below." in paragraph(material(alarms=["a", "b"]))
    assert "1 alarm below." in paragraph(material(alarms=["a"]))
    assert "alarm" not in paragraph(material())


def test_rows_and_columns_without_a_measurement_are_absent(material):
    changes = {"teacher.val_ppl": None, "teacher.bits_per_byte": None, "teacher.parameters": None}
    text = "\n".join(results(material(changes | {"student.trained_parameters": None})))
    assert "| teacher smollm2 | 35.48 |  | 1 |  |  |" in text
    assert "of which trained" not in text and "None" not in text
    assert "| teacher |" not in text
