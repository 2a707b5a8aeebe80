"""What each version does to its parent: scipy's tests and Holm's correction by hand, and what cannot be judged."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel

from asnn_goose.reporting.ablation import write_roadmap
from asnn_goose.reporting.effects import Effect, effects
from asnn_goose.reporting.ladder import read_ladder

CHANGE = {"distillation.losses.ce.weight": 0.5}
"""Settings of a version that changes something."""


def found(root: Path, *versions: str) -> dict[str, Effect]:
    return {effect.rung.version: effect for effect in effects(read_ladder(root, "cpu", versions))}


PERPLEXITIES = {
    "base": [400.0, 380.0, 405.0, 390.0],
    "a": [300.0, 290.0, 302.0, 297.0],
    "b": [395.0, 378.0, 401.0, 386.5],
    "c": [420.0, 370.0, 400.0, 410.0],
}


def test_a_delta_is_scipys_paired_test_and_holm_goes_by_hand(record, tmp_path):
    for version, several in PERPLEXITIES.items():
        for seed, ppl in enumerate(several):
            record(version, seed, ppl, settings={} if version == "base" else CHANGE)
    table = found(tmp_path, *PERPLEXITIES)
    p_values = {}
    for version in ("a", "b", "c"):
        oracle = ttest_rel(np.log(PERPLEXITIES[version]), np.log(PERPLEXITIES["base"]))
        interval, delta = oracle.confidence_interval(0.95), table[version].delta
        assert delta is not None and delta.n == 4 and delta.paired
        pairs = np.divide(PERPLEXITIES[version], PERPLEXITIES["base"])
        assert delta.ratio == pytest.approx(float(np.prod(pairs)) ** (1 / 4), rel=1e-12)
        assert [delta.low, delta.high] == pytest.approx([math.exp(interval.low), math.exp(interval.high)], rel=1e-9)
        assert delta.p_value == pytest.approx(oracle.pvalue, rel=1e-9)
        p_values[version] = float(oracle.pvalue)
    # By size: a, then b, then c.
    assert p_values["a"] < p_values["b"] < 0.05 / 2 < p_values["c"]
    adjusted = {
        "a": 3 * p_values["a"],
        "b": max(3 * p_values["a"], 2 * p_values["b"]),
        "c": max(2 * p_values["b"], p_values["c"]),
    }
    assert {version: table[version].p_holm for version in adjusted} == pytest.approx(adjusted, rel=1e-9)
    assert [table[version].verdict for version in PERPLEXITIES] == ["base", "helps", "helps", "no difference shown"]
    summary = table["a"].summary
    assert summary is not None and summary.n == 4
    assert summary.test_ppl == pytest.approx(float(np.prod(PERPLEXITIES["a"])) ** (1 / 4), rel=1e-12)


def test_what_an_interval_shows_alone_the_correction_takes_back(record, tmp_path):
    """Three equal differences of about p = 0.03: twice or three times that is above 0.05."""
    differences = np.array([-0.02, -0.05, -0.11, -0.04, -0.03])
    p_value = float(ttest_rel(differences, np.zeros(5)).pvalue)
    assert 0.05 / 3 < p_value < 0.05
    for seed, difference in enumerate(differences):
        record("base", seed, 400.0)
        for version in ("a", "b", "c"):
            record(version, seed, 400.0 * math.exp(difference), settings=CHANGE)
    table = found(tmp_path, "base", "a", "b", "c")
    for version in ("a", "b", "c"):
        effect = table[version]
        assert effect.verdict == "no difference shown" and effect.p_holm == pytest.approx(3 * p_value, rel=1e-9)
        assert effect.delta is not None and effect.delta.verdict == "helps"
    write_roadmap(tmp_path, "cpu", ["base", "a", "b", "c"])
    text = (tmp_path / "roadmap.md").read_text()
    assert "Taken alone, the intervals of a, b and c would leave out 1; among 3 comparisons that is not enough." in text


def test_versions_without_a_common_seed_are_compared_by_welch(record, tmp_path):
    mine, theirs = [450.0, 470.0, 440.0], [400.0, 380.0, 405.0, 390.0]
    for seed, ppl in enumerate(theirs):
        record("base", seed, ppl)
    for seed, ppl in enumerate(mine, start=len(theirs)):
        record("child", seed, ppl)
    effect = found(tmp_path, "base", "child")["child"]
    oracle = ttest_ind(np.log(mine), np.log(theirs), equal_var=False)
    interval = oracle.confidence_interval(0.95)
    assert effect.delta is not None and not effect.delta.paired and effect.verdict == "hurts"
    ends = [math.exp(interval.low), math.exp(interval.high)]
    assert [effect.delta.low, effect.delta.high] == pytest.approx(ends, rel=1e-9)
    assert effect.p_holm == pytest.approx(float(np.asarray(oracle)[1]), rel=1e-9)
    write_roadmap(tmp_path, "cpu", ["base", "child"])
    text = (tmp_path / "roadmap.md").read_text()
    assert ", unpaired) |" in text and "Unpaired: fewer than two pairs, or nothing but the seeds is changed;" in text


def test_one_common_seed_does_not_throw_the_others_away(record, tmp_path):
    mine, theirs = [450.0, 470.0, 440.0], [400.0, 380.0, 405.0]
    for seed, ppl in enumerate(theirs):
        record("base", seed, ppl)
    for seed, ppl in enumerate(mine, start=2):
        record("child", seed, ppl, settings=CHANGE)
    effect = found(tmp_path, "base", "child")["child"]
    oracle = ttest_ind(np.log(mine), np.log(theirs), equal_var=False)
    assert effect.delta is not None and (effect.delta.paired, effect.verdict) == (False, "hurts")
    assert effect.delta.p_value == pytest.approx(float(np.asarray(oracle)[1]), rel=1e-9)
    # Two pairs have an interval of their own.
    record("base", 3, 410.0)
    delta = found(tmp_path, "base", "child")["child"].delta
    assert delta is not None and (delta.paired, delta.n) == (True, 2)


def test_a_version_that_changes_nothing_is_no_partner_of_its_parent(record, tmp_path):
    """Seeds 5 and 6 of both are the same computation, of ratio 1 without any spread."""
    perplexities = {0: 400.0, 5: 450.0, 6: 470.0}
    for seed, ppl in perplexities.items():
        record("base", seed, ppl)
    mine = [perplexities[seed] for seed in (5, 6)]
    for seed, ppl in zip((5, 6), mine, strict=True):
        record("aa", seed, ppl)
    delta = found(tmp_path, "base", "aa")["aa"].delta
    oracle = ttest_ind(np.log(mine), np.log([*perplexities.values()]), equal_var=False)
    assert delta is not None and not delta.paired
    assert delta.p_value == pytest.approx(float(np.asarray(oracle)[1]), rel=1e-9)


def test_words_hold_where_a_seed_is_common_and_its_arithmetic_is_not(record, tmp_path):
    """Seed 0 of the child has no partner, so its one run stands against the base's of float32."""
    for seed, precision in ((0, "bfloat16"), (1, "float32"), (2, "float32")):
        record("base", seed, 400.0, results={"precision": precision})
    record("child", 0, 200.0, settings=CHANGE, results={"precision": "float32"})
    effect = found(tmp_path, "base", "child")["child"]
    assert effect.delta is not None and (effect.delta.paired, effect.delta.low) == (False, None)
    write_roadmap(tmp_path, "cpu", ["base", "child"])
    text = (tmp_path / "roadmap.md").read_text()
    assert "none show no difference and 1 rests on one seed." in text
    assert "in common" not in text and "pair of seeds" not in text
    assert "with Welch's interval where both have two seeds or more." in text
    assert "Hollow: no interval over seeds." in text


def test_runs_of_other_scales_tell_parent_and_change_alone(small_ladder, record):
    record("bigger", 0, 300.0, settings={"train.scale": "gpu"})
    table = found(small_ladder, "base", "bigger")
    rung = table["bigger"].rung
    assert (rung.parent, rung.change, rung.runs) == ("base", "What bigger changes.", ())
    assert table["bigger"].verdict == "not run" and table["bigger"].summary is None


def test_a_version_stands_without_its_parents_runs(record, tmp_path):
    record("child", 0, 200.0)
    assert found(tmp_path, "base", "child")["child"].verdict == "parent without runs"


def test_other_test_text_is_not_comparable(record, tmp_path):
    record("base", 0, 400.0)
    record("child", 0, 200.0, results={"evaluation.test_tokens": 1234})
    assert found(tmp_path, "base", "child")["child"].verdict == "not comparable"


def test_a_part_that_one_run_did_not_measure_has_no_mean(record, tmp_path):
    record("base", 0, 400.0)
    record("base", 1, 400.0, results={"spikes": None, "energy": None})
    summary = found(tmp_path, "base")["base"].summary
    assert summary is not None
    assert summary.spike_rate is summary.zero_operands is summary.joules is summary.energy_ratio is None
    assert summary.kl == 2.5


def test_levels_without_spikes_are_multiplied_and_no_spikes(record, tmp_path):
    """A quantised twin's count of 40 is one number, not 40 additions; a spike rate it has none."""
    kinds = {"student.neuron.kind": "quantised", "student.hidden_neuron.kind": "quantised"}
    record("base", 0, 400.0)
    record("twin", 0, 400.0, settings=kinds)
    table = found(tmp_path, "base", "twin")
    spiking, twin = table["base"].summary, table["twin"].summary
    assert spiking is not None and twin is not None
    assert (spiking.joules, twin.joules) == (1.53e-4, 1.61e-4)
    assert (spiking.energy_ratio, twin.energy_ratio) == pytest.approx((1.53 / 6.19, 1.61 / 6.19))
    assert spiking.spike_rate is not None and spiking.spike_operands is not None
    assert twin.spike_rate is twin.spike_operands is None and twin.zero_operands == spiking.zero_operands


def test_a_run_without_a_partner_in_its_arithmetic_is_no_pair(record, tmp_path):
    """Seed 1 of the child is float32 and its base's bfloat16; a machine's rounding must not pass for the change."""
    for seed, (mine, theirs) in enumerate([("bfloat16", "bfloat16"), ("float32", "bfloat16")]):
        record("base", seed, 400.0, results={"precision": theirs})
        record("child", seed, 200.0 * (1 + seed), settings=CHANGE, results={"precision": mine})
    effect = found(tmp_path, "base", "child")["child"]
    assert effect.summary is not None and effect.delta is not None
    assert (effect.summary.n, effect.delta.n, effect.verdict) == (2, 1, "one seed")
    assert effect.delta.ratio == pytest.approx(0.5)
    write_roadmap(tmp_path, "cpu", ["base", "child"])
    assert "| 0.5000 (1 pair) |" in (tmp_path / "roadmap.md").read_text()


def test_a_seed_that_was_run_in_both_arithmetics_has_the_interval_of_neither(record, tmp_path):
    for precision, ppl in (("bfloat16", 400.0), ("float32", 500.0)):
        record("base", 0, ppl, results={"precision": precision})
    summary = found(tmp_path, "base")["base"].summary
    assert summary is not None and (summary.n, summary.low, summary.high) == (1, None, None)
    assert summary.test_ppl == pytest.approx(math.sqrt(400.0 * 500.0))
    write_roadmap(tmp_path, "cpu", ["base"])
    assert "| 447.2 (one seed) |" in (tmp_path / "roadmap.md").read_text()


def test_no_arithmetic_in_common_is_not_comparable(record, tmp_path):
    record("base", 0, 400.0, results={"precision": "bfloat16"})
    record("child", 0, 200.0, results={"precision": "float32"})
    assert found(tmp_path, "base", "child")["child"].verdict == "not comparable"
    write_roadmap(tmp_path, "cpu", ["base", "child"])
    assert "Not comparable: only runs on other test text or in another" in (tmp_path / "roadmap.md").read_text()
