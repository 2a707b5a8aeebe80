"""Means and paired comparisons over seeds: closed forms of Student's t, scipy's own test, laws, what is not pooled."""

import hashlib
import itertools
import math
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from asnn_goose.reporting.comparison import FinishedRun, changed_settings
from asnn_goose.reporting.material import Material
from asnn_goose.reporting.provenance import collect_provenance
from asnn_goose.reporting.seeds import (
    ancestors,
    compare,
    group_of,
    mean_perplexity,
    nearest_group,
    paired,
    seed_groups,
    unpaired,
)
from asnn_goose.reporting.seeds_section import section
from asnn_goose.reporting.statistics import first_to_pass, holm, one_sample, welch
from asnn_goose.reporting.summary import opening

BASE = {"version": "base", "parent": None, "distillation.temperature.mode": "fixed"}
# Quantiles 0.975 of Student's t with a closed form: one degree of freedom is Cauchy; two, x = u sqrt(2 / (1 - u^2)).
T_1 = math.tan(0.475 * math.pi)
T_2 = 0.95 * math.sqrt(2 / (1 - 0.95**2))
# Cross-entropies of 0 to 18 nats; a uniform guess among 49,152 tokens has 10.8.
PERPLEXITIES = st.floats(1.0, 1e8)
TABLES = st.dictionaries(st.integers(0, 9), st.tuples(PERPLEXITIES, PERPLEXITIES), min_size=1, max_size=6)


@pytest.fixture(scope="session")
def make(make_experiment, make_result):
    """Finished run of the version "child", or of another by `settings`, that lies nowhere."""
    result = make_result()

    def run(seed, ppl, settings=None, hours=0, tokens=65_280, precision=None):
        experiment = make_experiment((settings or {}) | {"seed": seed})
        changes = {
            "run_id": f"{experiment.version}-{seed}-{hours}-{precision}",
            "precision": precision,
            "fingerprint": hashlib.sha256(experiment.model_dump_json().encode()).hexdigest(),
            "version": experiment.version,
            "parent": experiment.parent,
            "seed": seed,
            "scale": experiment.train.scale,
            "started": result.started + timedelta(hours=hours),
            "student": result.student.model_copy(update={"test_ppl": float(ppl)}),
            "evaluation": result.evaluation.model_copy(update={"test_tokens": tokens}),
        }
        return FinishedRun(Path("nowhere"), result.model_copy(update=changes), experiment)

    return run


@pytest.fixture(scope="session")
def both(make):
    """Runs of child and base from seed -> (perplexity of child, of base)."""

    def runs(ppls):
        return [make(seed, a) for seed, (a, _) in ppls.items()], [make(seed, b, BASE) for seed, (_, b) in ppls.items()]

    return runs


def test_the_mean_of_two_seeds_by_hand(make):
    """Logs 5 and 7: mean 6, s = sqrt(2), s / sqrt(2) = 1."""
    mean = mean_perplexity([make(0, math.exp(5)), make(1, math.exp(7))])
    assert mean.n == 2
    assert (mean.value, mean.low, mean.high) == pytest.approx([math.exp(6 + side * T_1) for side in (0, -1, 1)])


def test_the_mean_of_three_seeds_by_hand(make):
    """Logs 5, 6, 7: mean 6, s = 1."""
    mean = mean_perplexity([make(seed, math.exp(5 + seed)) for seed in range(3)])
    half = T_2 / math.sqrt(3)
    assert (mean.value, mean.low, mean.high) == pytest.approx([math.exp(6 + side * half) for side in (0, -1, 1)])


def test_one_seed_has_no_interval(make):
    mean = mean_perplexity([make(4, 300.0)])
    assert (mean.n, mean.low, mean.high) == (1, None, None) and mean.value == pytest.approx(300.0)


def test_a_paired_comparison_of_two_seeds_by_hand(both):
    """d = -0.3 and -0.1: mean -0.2, standard error 0.1, t = -2, p = 1 - 2 atan(2) / pi."""
    delta = paired(*both({0: (100.0, 100 * math.exp(0.3)), 3: (700.0, 700 * math.exp(0.1))}))
    assert delta is not None and delta.n == 2
    expected = [math.exp(-0.2), math.exp(-0.2 - 0.1 * T_1), math.exp(-0.2 + 0.1 * T_1), 1 - 2 * math.atan(2) / math.pi]
    assert (delta.ratio, delta.low, delta.high, delta.p_value) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spread", "step", "judged"),
    [
        (0.01, -0.05, "helps"),
        (0.01, 0.05, "hurts"),
        (0.1, -0.05, "no difference shown"),
        (0.1, 0.05, "no difference shown"),
    ],
)
def test_the_verdict_is_that_of_the_interval(both, spread, step, judged):
    """d = step - spread, step, step + spread: 1 is left out where |step| > spread T_2 / sqrt(3)."""
    assert (abs(step) > spread * T_2 / math.sqrt(3)) == (judged in ("helps", "hurts"))
    delta = paired(*both({seed: (300 * math.exp(step + (seed - 1) * spread), 300.0) for seed in range(3)}))
    assert delta is not None and delta.verdict == judged


@given(TABLES)
def test_paired_agrees_with_scipy(both, ppls):
    mine, theirs = (np.log(column) for column in zip(*ppls.values(), strict=True))
    delta = paired(*both(ppls))
    assert delta is not None and delta.n == len(ppls)
    # 1e-9 relative: logs up to 18 lose some 1e-15 in their differences, which the t of two seeds multiplies by 12.7.
    assert delta.ratio == pytest.approx(math.exp((mine - theirs).mean()), rel=1e-9)
    spread = (mine - theirs).std()
    if len(ppls) > 1 and spread > 1e-6:  # below it the spread of d is its rounding, and t has no digits
        test = ttest_rel(mine, theirs)
        low, high = test.confidence_interval(0.95)
        assert (delta.low, delta.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-6)
        assert delta.p_value == pytest.approx(test.pvalue, rel=1e-6, abs=1e-12)
        assert (delta.verdict != "no difference shown") == (test.pvalue < 0.05)


@given(st.lists(PERPLEXITIES, min_size=2, max_size=6))
def test_the_mean_agrees_with_scipy(make, ppls):
    mean = mean_perplexity([make(seed, ppl) for seed, ppl in enumerate(ppls)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's on equal values
        low, high = ttest_1samp(np.log(ppls), 0.0).confidence_interval(0.95)
    if np.std(np.log(ppls)) > 1e-6:
        assert (mean.low, mean.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-6)
    assert mean.value == pytest.approx(math.exp(np.log(ppls).mean()), rel=1e-9)


@given(TABLES)
def test_swapping_the_versions_inverts_the_ratio(both, ppls):
    mine, theirs = both(ppls)
    one, other = paired(mine, theirs), paired(theirs, mine)
    assert one is not None and other is not None
    assert one.ratio * other.ratio == pytest.approx(1.0)
    assert one.p_value == other.p_value
    if one.low is not None and one.high is not None and other.high is not None and other.low is not None:
        assert (one.low * other.high, one.high * other.low) == pytest.approx((1.0, 1.0))
    opposite = {"helps": "hurts", "hurts": "helps"}
    assert other.verdict == opposite.get(one.verdict, one.verdict)


@given(TABLES, st.randoms(use_true_random=False))
def test_order_and_unpaired_seeds_do_not_matter(make, both, ppls, random):
    mine, theirs = both(ppls)
    expected = paired(mine, theirs)
    mine, theirs = [*mine, make(20, 1e6)], [*theirs, make(21, 2.0, BASE)]
    random.shuffle(mine)
    random.shuffle(theirs)
    assert paired(mine, theirs) == expected


@pytest.mark.parametrize(("factor", "p_value", "judged"), [(1.0, 1.0, "no difference shown"), (0.5, 0.0, "helps")])
def test_equal_differences_have_an_interval_without_width(both, factor, p_value, judged):
    """d = log 1 or log 1/2 at both seeds, exact since equal perplexities have equal logs."""
    delta = paired(*both({0: (factor * 256.0, 256.0), 1: (factor * 256.0, 256.0)}))
    assert delta is not None
    assert (delta.low, delta.high, delta.p_value, delta.verdict) == (delta.ratio, delta.ratio, p_value, judged)


def test_one_common_seed_has_a_ratio_alone(make):
    delta = paired([make(0, 90.0), make(1, 80.0)], [make(1, 100.0, BASE), make(2, 70.0, BASE)])
    assert delta is not None
    assert (delta.n, delta.low, delta.high, delta.p_value) == (1, None, None, None)
    assert delta.ratio == pytest.approx(0.8) and delta.verdict == "one pair only"


def test_no_common_seed_is_no_comparison(make):
    assert paired([make(0, 90.0)], [make(1, 100.0, BASE)]) is None
    assert paired([make(0, 90.0)], []) is None


def test_a_pair_is_of_one_arithmetic(make):
    """A base that float32 makes 1.1 times worse by itself must not make its child hurt."""
    base = [make(0, 100.0, BASE, precision="bfloat16"), make(1, 110.0, BASE, precision="float32")]
    mixed = [make(0, 110.0, precision="float32"), make(1, 100.0, precision="bfloat16")]
    assert paired(mixed, base) is None
    matched = paired([*mixed, make(0, 50.0, precision="bfloat16")], base)
    assert matched is not None and matched.n == 1 and matched.ratio == pytest.approx(0.5)


def test_a_seed_in_both_arithmetics_counts_once(make):
    """d_0 = (log 1/2 + log 1/8) / 2 = log 1/4 and d_1 = log 1/4: n = 2, ratio 1/4, no spread."""
    child = [
        make(0, 50.0, precision="bfloat16"),
        make(0, 16.0, precision="float32"),
        make(1, 25.0, precision="float32"),
    ]
    base = [
        make(0, 100.0, BASE, precision="bfloat16"),
        make(0, 128.0, BASE, precision="float32"),
        make(1, 100.0, BASE, precision="float32"),
    ]
    delta, mean = paired(child, base), mean_perplexity(child)
    assert delta is not None and delta.n == mean.n == 2
    assert (delta.ratio, delta.low, delta.high) == pytest.approx((0.25, 0.25, 0.25))
    assert mean.value == pytest.approx(math.exp((math.log(50 * 16) / 2 + math.log(25)) / 2))


def test_means_without_a_common_seed_are_of_one_arithmetic(make):
    base = [make(0, 100.0, BASE, precision="bfloat16"), make(1, 900.0, BASE, precision="float32")]
    delta = unpaired([make(5, 120.0, precision="bfloat16")], base)
    assert delta is not None and delta.ratio == pytest.approx(1.2)
    assert unpaired([make(5, 120.0)], base) is None


def test_means_do_not_mix_arithmetics_in_unlike_shares(make):
    """Where float32 is 1.1 times bfloat16 and nothing else differs, the ratio is 1, and its interval that of Welch."""
    base = [make(s, 100.0 + s, BASE, precision="bfloat16") for s in range(3)]
    base += [make(s, 110.0 + s, BASE, precision="float32") for s in (1, 2)]
    again = [make(5, 101.0, precision="bfloat16"), *(make(s, 105.5 + s, precision="float32") for s in (6, 7))]
    delta = unpaired(again, base)
    mine, theirs = np.log([111.5, 112.5]), np.log([111.0, 112.0])
    assert delta is not None and delta.n == 2 and not delta.paired
    assert delta.ratio == pytest.approx(math.exp(mine.mean() - theirs.mean()))
    test: Any = ttest_ind(mine, theirs, equal_var=False)
    assert delta.p_value == pytest.approx(test.pvalue)


def test_an_arithmetic_that_was_asked_for_is_the_one_that_the_machine_took(make):
    """auto that came to float32 is float32: the newer of the two counts, and they differ in nothing."""
    taken, asked = make(0, 90.0, precision="float32"), make(0, 91.0, {"train.precision": "float32"}, hours=1)
    assert seed_groups([taken, asked]) == [(asked,)]
    assert changed_settings(taken, asked) == {}
    other = make(1, 90.0, precision="bfloat16")
    assert changed_settings(taken, other) == {"train.precision": ("float32", "bfloat16")}
    assert len(seed_groups([taken, other])) == 1


@pytest.mark.parametrize(("settings", "tokens"), [({"data.window": 128}, 65_280), ({}, 32_640)])
def test_pairs_evaluated_on_other_text_are_left_out(make, settings, tokens):
    others = [make(seed, 100.0, BASE | settings, tokens=tokens) for seed in (0, 1)]
    assert paired([make(0, 90.0), make(1, 91.0)], others) is None


def test_two_seeds_far_apart_have_an_interval_all_the_same(both):
    """d = -150 and 150: half the interval is 150 T_1 = 1,906, which exp cannot hold."""
    delta = paired(*both({0: (1.0, math.exp(150)), 1: (math.exp(150), 1.0)}))
    assert delta is not None and (delta.low, delta.high) == (0.0, math.inf)
    assert delta.verdict == "no difference shown"


@pytest.mark.parametrize(
    "settings",
    [{"train.lr": 0.1}, {"student.neuron.kind": "dense"}, {"train.tokens": 2048}, {"train.scale": "gpu"}],
)
def test_a_run_with_an_override_is_not_pooled(make, settings):
    plain = [make(0, 90.0), make(1, 91.0)]
    other = make(2, 10.0, settings, hours=5)
    groups = seed_groups([*plain, other])
    assert sorted(groups, key=len) == [(other,), tuple(plain)]
    with pytest.raises(ValueError, match="2 settings or scales"):
        mean_perplexity([*plain, other])
    with pytest.raises(ValueError, match="split them by seed_groups"):
        paired([*plain, other], plain)


def test_settings_that_change_no_number_are_pooled(make):
    runs = [make(0, 90.0), make(1, 91.0, {"train.log_every": 3, "question": "Another?"})]
    assert seed_groups(runs) == [tuple(runs)]


def test_runs_on_other_test_text_are_not_averaged(make):
    assert len(seed_groups([make(0, 90.0), make(1, 91.0, tokens=100)])) == 2


def test_the_newest_run_of_a_seed_counts(make):
    old, new, other = make(0, 90.0, hours=1), make(0, 95.0, hours=3), make(1, 91.0, hours=2)
    assert seed_groups([old, new, other]) == seed_groups([other, new, old]) == [(new, other)]


def test_groups_come_by_scale_then_age(make):
    """What a version is now stands before what it was, however often that was run."""
    gpu = make(0, 1.0, {"train.scale": "gpu"}, hours=9)
    older, newer = make(0, 1.0, {"train.lr": 0.1}, hours=1), make(0, 1.0, {"train.lr": 0.2}, hours=2)
    plain = make(0, 1.0), make(1, 1.0)
    assert seed_groups([gpu, older, newer, *plain]) == [(newer,), (older,), plain, (gpu,)]


def test_scales_are_not_paired(make):
    with pytest.raises(ValueError, match="one scale, not cpu and gpu"):
        paired([make(0, 90.0)], [make(0, 100.0, BASE | {"train.scale": "gpu"})])


def test_no_runs_have_no_mean():
    with pytest.raises(ValueError, match="at least one run"):
        mean_perplexity([])


def test_the_nearest_group_has_the_fewest_other_settings(make):
    group = (make(0, 1.0, {"train.lr": 0.1}), make(1, 1.0, {"train.lr": 0.1}))
    plain, same = (make(0, 1.0, BASE), make(1, 1.0, BASE)), (make(0, 1.0, BASE | {"train.lr": 0.1}),)
    gpu = (make(0, 1.0, BASE | {"train.lr": 0.1, "train.scale": "gpu"}),)
    assert nearest_group(group, [gpu, plain, same]) == same
    assert nearest_group(group, [gpu, plain]) == plain
    assert nearest_group(group, [gpu]) is None


def test_equally_near_groups_are_told_apart_by_common_seeds(make):
    group = (make(0, 1.0), make(1, 1.0))
    one, two = (make(0, 1.0, {"train.lr": 0.1}),), (make(0, 1.0, {"train.lr": 0.2}), make(1, 1.0, {"train.lr": 0.2}))
    assert nearest_group(group, [one, two]) == nearest_group(group, [two, one]) == two


def test_a_run_finds_its_own_group(make):
    plain, dense = [make(0, 1.0), make(1, 1.0)], make(0, 2.0, {"student.neuron.kind": "dense"})
    assert group_of(plain[1], [*plain, dense]) == tuple(plain)
    assert group_of(dense, plain) == (dense,)


def test_every_ancestor_is_compared_with_its_own_twin(make):
    dense = {"student.neuron.kind": "dense"}
    lineage = {
        "base": [make(0, 200.0, BASE), make(0, 50.0, BASE | dense)],
        "root": [make(5, 1.0, BASE | {"version": "root"})],
    }
    [against] = compare((make(0, 25.0, dense),), lineage)
    assert (against.version, against.differing) == ("base", ("distillation.temperature.mode",))
    assert against.delta.ratio == pytest.approx(0.5)


def test_ancestors_are_followed_through_the_runs(make_run, tmp_path):
    for version, parent in (("child", "middle"), ("middle", "base"), ("base", None), ("aside", "base")):
        make_run(tmp_path / "runs", {"version": version, "parent": parent})
    found = ancestors("middle", tmp_path / "runs", tmp_path / "reports")
    assert [(name, [run.result.version for run in runs]) for name, runs in found.items()] == [
        ("middle", ["middle"]), ("base", ["base"]),
    ]  # fmt: skip
    assert ancestors(None, tmp_path / "runs", tmp_path / "reports") == {}
    assert ancestors("unknown", tmp_path / "runs", tmp_path / "reports") == {}


def test_ancestors_end_at_a_circle(make_run, tmp_path):
    make_run(tmp_path, {"version": "a", "parent": "b"})
    make_run(tmp_path, {"version": "b", "parent": "a"})
    assert list(ancestors("b", tmp_path, tmp_path)) == ["b", "a"]


def test_the_section_tells_settings_apart_and_names_what_differs(make):
    runs = [make(0, 90.0, hours=1), make(1, 95.0, hours=1), make(0, 80.0, {"train.lr": 0.1})]
    losses = {"version": "root", "parent": None, "distillation.losses": {"ce": {"weight": 0.3}, "tcs": {"weight": 0.7}}}
    lineage = {"base": [make(0, 100.0, BASE)], "root": [make(0, 45.0, losses), make(1, 47.5, losses)]}
    lines = section(runs, lineage)
    plain = "| cpu |  |"
    means = [line for line in lines if "65,280" in line]
    assert [line.split(" | ")[1:4] for line in means] == [
        ["", "65,280", "2"], ["`train.lr: 0.1`", "65,280", "1"],
    ]  # fmt: skip
    assert f"{plain} base | 1 | 0.9000 |  | one pair only | `distillation.temperature.mode` |" in lines
    assert f"{plain} root | 2 | 2.000 | 2.000 to 2.000 | hurts | `distillation.losses.*` |" in lines
    assert "Settings are told where they differ" in lines[-1]
    assert "spread that initialisation and data order make" in lines[-1]
    assert "below 1 this version is better" in lines[-1]


def test_a_fingerprint_with_two_results_is_told(make):
    once, again = make(0, 90.0), make(0, 91.0, hours=1)
    (text,) = [line for line in section([once, again, make(1, 95.0)], {}) if line.startswith("Perplexities")]
    assert "Seed 0 was run 2 times with fingerprint" in text and "came to 90.00 and 91.00, since neither" in text
    assert "was run" not in section([once, make(0, 90.0, hours=1)], {})[-1]


def test_many_settings_go_by_branch_unless_two_groups_then_read_the_same(make):
    neuron = {"steps": 2, "threshold": 3.0, "decay": 0.5, "width": 2.0}
    many = {"data.window": 32} | {f"student.neuron.{key}": value for key, value in neuron.items()}
    runs = [make(0, 90.0, hours=1), make(1, 95.0, hours=1), make(0, 80.0, many)]
    assert "| cpu | `data.window`, `student.neuron.*` |" in "\n".join(section(runs, {}))
    runs.append(make(0, 70.0, many | {"student.neuron.threshold": 4.0}))
    lines = "\n".join(section(runs, {}))
    assert "`student.neuron.threshold: 3.0`" in lines and "`student.neuron.threshold: 4.0`" in lines
    assert "neuron.*" not in lines


def test_a_single_run_claims_no_interval(make):
    lines = section([make(0, 90.0)], {})
    assert "| cpu | 65,280 | 1 | 90.00 |" in lines
    assert "nterval" not in "\n".join(lines) and "ratio" not in "\n".join(lines)


@pytest.fixture
def told(make_experiment, tmp_path):
    """What the head of a report says over seeds, from a group and the ancestors' runs."""

    def text(group, lineage, overrides=None):
        provenance = collect_provenance(make_experiment(), "0123abcd" * 8, argv=[], overrides=overrides or {})
        paragraph = opening(Material(group[0], provenance, [], None, {}, {}, over_seeds=compare(group, lineage)))[2]
        return paragraph.partition("**Does the change help?** ")[2].partition("After ")[0]

    return text


COVERED = (
    "Intervals over seeds cover initialisation and data order, not the choice of test text, and each is of one "
    "comparison: the ladder's table corrects for their number. "
)


def test_a_report_says_nothing_over_one_pair(make, told):
    assert told((make(0, 80.0), make(1, 81.0)), {"base": [make(0, 100.0, BASE)]}) == ""


def test_a_report_tells_of_parent_and_root_alone(make, told):
    group = (make(0, 80.0), make(1, 90.0))
    lineage = {
        name: [make(0, 1.6 * 80.0, BASE | {"version": name}), make(1, 1.6 * 90.0, BASE | {"version": name})]
        for name in ("parent", "middle", "root")
    }
    sentence = "Over 2 paired seeds the perplexity is 0.6250 times that of {} (95 % interval 0.6250 to 0.6250): "
    sentence += "child helps. "
    assert told(group, lineage) == sentence.format("parent") + sentence.format("root") + COVERED
    assert told(group, {"parent": lineage["parent"]}) == sentence.format("parent") + COVERED


@pytest.mark.parametrize(
    ("overrides", "ending"),
    [
        ({"train.lr": 0.1}, "no difference shown, with `train.lr` of the command line different too. "),
        ({"train": "cpu"}, "no difference shown, with `train.lr` of the command line different too. "),
        ({"train.clip": 2.0}, "no difference shown. "),
    ],
)
def test_a_report_tells_what_the_command_line_mixes_in(make, told, overrides, ending):
    group = (make(0, 80.0, {"train.lr": 0.1}), make(1, 90.0, {"train.lr": 0.1}))
    text = told(group, {"base": [make(0, 90.0, BASE), make(1, 80.0, BASE)]}, overrides)
    assert text.endswith(ending + COVERED)


def closed_testing(p_values):
    """Holm's values from their origin: the largest Bonferroni p among all intersections that contain a hypothesis."""
    every = range(len(p_values))
    subsets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(every, size)]
    bonferroni = {s: min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets}
    return [max(p for s, p in bonferroni.items() if i in s) for i in every]


def test_holm_by_hand():
    """4 x 0.005; 3 x 0.01; 2 x 0.03; 1 x 0.04 is below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.3]) == [0.3] and holm([0.6, 0.7]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.02, 1.0]), min_size=1, max_size=7))
def test_holm_is_the_closed_test(p_values):
    adjusted = holm(p_values)
    assert adjusted == closed_testing(p_values)
    assert all(raw <= new <= 1 for raw, new in zip(p_values, adjusted, strict=True))
    smallest = min(p_values)
    assert adjusted[p_values.index(smallest)] == min(1.0, len(p_values) * smallest)
    in_order = [new for _, new in sorted(zip(p_values, adjusted, strict=True))]
    assert in_order == sorted(in_order)


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_holm_refuses_what_is_no_probability(bad):
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        holm([0.1, bad])


@pytest.mark.parametrize("comparisons", [1, 21])
def test_the_first_of_many_passes_at_the_quantile_of_t(comparisons):
    """Of 1 degree of freedom it is Cauchy's, tan(pi (1/2 - q)), of 2 it is (1 - 2 q) / sqrt(2 q (1 - q))."""
    q = 0.05 / (2 * comparisons)
    assert first_to_pass(0.05, comparisons, 2) == pytest.approx(math.tan(math.pi * (0.5 - q)))
    assert first_to_pass(0.05, comparisons, 3) == pytest.approx((1 - 2 * q) / math.sqrt(2 * q * (1 - q)))


def test_welch_is_scipys():
    generator = np.random.default_rng(0)
    mine, theirs = generator.normal(4.0, 0.3, 5), generator.normal(3.8, 0.1, 3)
    found, wanted = welch(mine, theirs), ttest_ind(mine, theirs, equal_var=False)
    p_value, interval = wanted[1], wanted.confidence_interval(0.95)
    assert found == pytest.approx((math.exp(mine.mean() - theirs.mean()), *np.exp(interval), p_value), rel=1e-9)
    assert welch(mine[:1], theirs)[1:] == (None, None, None)
    assert one_sample(mine[:1])[1:] == (None, None, None)
