"""The section beside a table written by hand from the made-up record, and its sentence at the edge of chance."""

import pytest

from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.information_section import carried
from asnn_goose.reporting.material import Material
from asnn_goose.reporting.provenance import collect_provenance


@pytest.fixture
def lines(make_result, make_experiment, tmp_path):
    def made(changes=None) -> list[str]:
        experiment = make_experiment()
        run = FinishedRun(tmp_path, make_result(changes), experiment)
        return carried(Material(run, collect_provenance(experiment, "0" * 64, argv=[], overrides={}), [], None, {}, {}))

    return made


def test_each_population_stands_with_its_bars_and_its_controls(lines):
    told = lines({"spikes.per_layer.2.dead_fraction": 0.0613, "information.sites.1.cka.shuffled": -0.0004})
    assert told[0] == "## What the spikes carry"
    assert told[2].startswith(
        "| spikes in front of | dead (< 5.0 %) | saturated (< 10.0 %) | firing rate (0.05 to 0.6) | "
    )
    assert told[4:6] == [
        "| receptance, layer 1 | 1.3 % | 0.4 % | 0.120 | 15 | 0.300 (0.000) | 30.0 % (15.3 %) | 0.310 (-0.011) | "
        "0.030 (0.011) |",
        "| receptance, layer 2 | **6.1 %** | 0.4 % | 0.140 | 30 | 0.400 (0.000) | 35.0 % (15.3 %) | 0.210 (-0.011) | "
        "0.060 (0.011) |",
    ]
    assert "Of all 4 populations 3 have few enough dead channels, 4 few enough saturated ones, and 4 a rate" in told[-1]
    assert "on 4,079 test tokens of 17 windows, the last 1,019 held out" in told[-1]
    # 65.49 % of the held-out tokens have one of the classes; the mean of 0.0108 and 0.0216 bits.
    assert "256 commonest first choices, which 65.5 %" in told[-1] and "about 0.016, and" in told[-1]


def test_the_sentence_takes_each_probe_where_it_is_best(lines):
    (sentence,) = (line for line in lines() if line.startswith("**Reading.**"))
    assert "finds 35.0 % of the teacher's first choices on held-out tokens (layer 2; 16.0 % by always" in sentence
    assert "explains 31.0 % of the variance of its states (layer 1; -1.1 % with other tokens' states)" in sentence
    assert sentence.endswith("the spikes tell of the teacher's next token.")


# The accuracy is over 0.6549 * 1019 = 667 tokens, of which 1 / sqrt(667) = 0.0387.
@pytest.mark.parametrize(("accuracy", "control", "told"), [
    (0.1988, 0.1534, False), (0.1990, 0.1534, True), (0.28, 0.2490, False), (0.16, 0.02, False),
])  # fmt: skip
def test_chance_is_the_commonest_choice_or_the_control_and_its_error(lines, accuracy, control, told):
    best = {"information.sites.0.top1_accuracy": {"value": 0.1, "shuffled": 0.1}}
    best["information.sites.1.top1_accuracy"] = {"value": accuracy, "shuffled": control}
    (sentence,) = (line for line in lines(best) if line.startswith("**Reading.**"))
    assert sentence.endswith(f"the spikes tell {'of' if told else 'no more than chance of'} the teacher's next token.")


@pytest.mark.parametrize("absent", ["information", "spikes"])
def test_without_probes_or_spikes_there_is_no_section(lines, absent):
    assert lines({absent: None}) == []
