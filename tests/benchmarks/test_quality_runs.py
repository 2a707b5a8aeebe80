"""Which runs a bar is judged on, each rule beside records on both of its sides."""

import math
from typing import Any

import pytest
from scipy import stats

from asnn_goose.config import dump, load_experiment
from asnn_goose.errors import UserError
from benchmarks import quality_runs as rules

DENSE = ("--student.neuron.kind=dense", "--student.hidden_neuron.kind=dense")
QUANTISED = ("--student.neuron.kind=quantised", "--student.hidden_neuron.kind=quantised")


def steps(T: int) -> tuple[str, str]:
    return f"--student.neuron.steps={T}", f"--student.hidden_neuron.steps={T}"


def names(pairing: rules.Pairing) -> list[list[tuple[str, int]]]:
    return [[(run.result.version, run.result.seed) for run in side] for side in pairing]


def test_the_budgets_are_whole_steps_and_hold_the_scale_s_own():
    assert [tokens // 512 * 512 for tokens in (154_000, 154_000 + 512)] == list(rules.TOKENS_154K)
    assert load_experiment("v10", ["--scale=cpu"]).experiment.train.tokens <= rules.TOKENS_CPU


@pytest.mark.parametrize("flag", ["--data.window=64", "--teacher.name=other", "--train.test_tokens=16384"])
def test_other_text_is_not_compared(record, flag):
    assert rules.on_reference_text(record()) and not rules.on_reference_text(record("v10", flag))


@pytest.mark.parametrize(
    ("flags", "spikes"),
    [((), True), (DENSE, False), (QUANTISED, False), (DENSE[:1], False), (DENSE[1:], False)],
)
def test_a_twin_is_no_spiking_student(record, flags, spikes):
    assert record("v10", *flags).spikes == spikes


@pytest.mark.parametrize(
    ("scale", "tokens", "long", "cpu"),
    [
        ("ladder", 153_600, True, False),
        ("cpu", 154_112, True, False),
        ("gpu", 153_600, False, False),
        ("cpu", 153_088, False, False),
        ("cpu", 98_304, False, True),
        ("cpu", 38_400, False, True),
        ("ladder", 98_304, False, False),
    ],
)
def test_budgets_of_tokens(record, scale, tokens, long, cpu):
    run = record(scale=scale, tokens=tokens)
    assert (rules.after_154_thousand_tokens(run), rules.at_the_cpu_scale(run)) == (long, cpu)
    assert rules.at_the_gpu_scale(run) == (scale == "gpu")


@pytest.mark.parametrize(("wall", "hour"), [(2_400.0, False), (2_400.1, True), (3_700.0, True), (3_700.1, False)])
def test_an_hour_is_one_of_wall_time(record, wall, hour):
    assert rules.in_an_hour(record(wall=wall)) == hour


def test_the_best_group_is_the_lowest_mean_over_seeds_and_not_the_lowest_run(record):
    steady = [record("steady", "--train.lr=2e-4", seed=seed, ppl=ppl) for seed, ppl in enumerate((280.0, 290.0))]
    lucky = [record("lucky", "--train.lr=3e-4", seed=seed, ppl=ppl) for seed, ppl in enumerate((260.0, 330.0))]
    assert rules.best([*lucky, *steady]) == tuple(steady)
    # sqrt(280 * 290) / 30, and scipy's interval of the logarithms.
    value, low, high, _ = rules.times_the_teacher(tuple(steady))
    logs = [math.log(280.0 / 30.0), math.log(290.0 / 30.0)]
    interval = stats.t.interval(0.95, 1, loc=sum(logs) / 2, scale=stats.sem(logs))
    assert [value, low, high] == pytest.approx([math.sqrt(280.0 * 290.0) / 30.0, *map(math.exp, interval)])
    assert rules.best([]) is None


def test_a_group_that_took_too_long_counts_only_where_all_did(record):
    slow, quick = record("slow", ppl=200.0, wall=800.0), record("quick", ppl=250.0, wall=600.0)
    assert rules.best([slow, quick], 720.0) == (quick,)
    assert rules.best([slow], 720.0) == (slow,)
    # One late seed makes the whole setting late: its quick seeds alone would be a choice among results.
    late = record("quick", ppl=250.0, wall=721.0, seed=1)
    assert rules.best([slow, quick, late], 720.0) == (slow,)


def test_twins_have_the_seeds_the_tokens_and_the_student_in_common(record):
    spiking = [record(seed=seed) for seed in (0, 1, 2)]
    twins = [record("dense_twin", *DENSE, seed=seed, zero=None) for seed in (1, 2, 3)]
    others = [
        record("dense_twin", *DENSE, "--train.lr=1e-4", seed=0, zero=None),
        record("dense_twin", *DENSE, "--student.layers=5", seed=0, zero=None),
        record("dense_twin", *DENSE, tokens=98_304, seed=0, zero=None),
        record("dense_twin", *DENSE, scale="cpu", seed=0, zero=None),
    ]
    found = rules.against_twin(spiking, [*others, *twins])
    assert found is not None
    assert names(found) == [[("v10", 1), ("v10", 2)], [("dense_twin", 1), ("dense_twin", 2)]]
    assert rules.against_twin(spiking[:1], others) is None


def test_more_micro_steps_than_four_are_no_match_for_a_twin(record):
    twin = [record("dense_twin", *DENSE, zero=None)]
    for flags, found in ((steps(4), True), (steps(5), False), (steps(5)[1:], False), (steps(1), True)):
        assert (rules.against_twin([record("v10", *flags)], twin) is not None) == found


def test_of_several_twins_the_one_with_more_seeds_and_then_more_tokens_counts(record):
    runs = [record(seed=0), record(seed=1), record(seed=0, tokens=98_304)]
    twins = [record("dense_twin", *DENSE, seed=run.result.seed, tokens=run.result.tokens_seen) for run in runs]
    found = rules.against_twin(runs, twins)
    assert found is not None and [run.result.tokens_seen for run in found.runs] == [65_536, 65_536]
    found = rules.against_twin([runs[0], runs[2]], twins)
    assert found is not None and [run.result.tokens_seen for run in found.runs] == [98_304]


def test_a_ratio_is_taken_seed_by_seed(record):
    pairing = rules.Pairing(
        tuple(record(seed=seed, ppl=ppl) for seed, ppl in enumerate((110.0, 230.0))),
        tuple(record(seed=seed, ppl=ppl) for seed, ppl in enumerate((100.0, 200.0))),
    )
    logs = [math.log(1.10), math.log(1.15)]
    value, low, _, p_value = rules.perplexity_ratio(pairing)
    assert value == pytest.approx(math.sqrt(1.10 * 1.15))
    test: Any = stats.ttest_1samp(logs, 0.0)
    assert low is not None and math.log(low) == pytest.approx(test.confidence_interval().low)
    assert p_value == pytest.approx(test.pvalue)


CONVERTED, EMBEDDINGS = "--student.init=layers", "--student.init=embeddings"


def test_conversion_meets_a_start_with_the_embeddings_alone_at_equal_wall_time(record):
    converted = [record("c", CONVERTED, seed=seed, ppl=160.0, wall=1000.0, tokens=32_768) for seed in (0, 1)]
    starts = [
        record("long", EMBEDDINGS, ppl=300.0, wall=1101.0),
        record("regression", "--student.init=regression", ppl=250.0, wall=1000.0),
        record("dense", EMBEDDINGS, *DENSE, ppl=200.0, wall=1000.0),
        record("seed", EMBEDDINGS, "--train.lr=1e-4", ppl=290.0, wall=1000.0, seed=5),
    ]
    assert rules.conversion([*converted, *starts]) is None
    near = [record("near", EMBEDDINGS, seed=0, ppl=320.0, wall=1099.0)]
    found = rules.conversion([*converted, *starts, *near])
    assert found is not None and names(found) == [[("c", 0)], [("near", 0)]]
    # The random start is given its best too.
    better = record("better", EMBEDDINGS, "--train.lr=3e-4", ppl=310.0, wall=910.0)
    found = rules.conversion([*converted, *near, better])
    assert found is not None and names(found)[1] == [("better", 0)]
    more = [record("more", EMBEDDINGS, "--train.lr=2e-4", seed=seed, ppl=400.0, wall=1000.0) for seed in (0, 1)]
    found = rules.conversion([*converted, *near, better, *more])
    assert found is not None and names(found) == [[("c", 0), ("c", 1)], [("more", 0), ("more", 1)]]


def test_equal_wall_time_is_within_a_tenth_whoever_is_longer(record):
    for wall, equal in ((910.0, True), (1099.0, True), (909.0, False), (1101.0, False)):
        assert rules.equal_wall(record(wall=1000.0), record(wall=wall)) == equal


def test_zero_shares_are_of_tokens_and_of_micro_steps(record):
    group = (record(seed=0, zero=0.6, rate=0.2), record(seed=1, zero=0.7, rate=0.1))
    assert rules.zero_shares(group) == pytest.approx((0.65, 0.85))
    # Seed 1 in both arithmetics is one seed, of the mean 0.8.
    twice = (*group, record("v10", "--train.precision=bfloat16", seed=1, zero=0.9, rate=0.1))
    assert rules.zero_shares(twice) == pytest.approx((0.7, 0.85))
    with pytest.raises(ValueError, match="v10 has runs without spikes"):
        rules.zero_shares((record(zero=None),))


def test_the_versions_of_a_sweep_come_in_their_order_and_from_one_setting(record):
    runs = [record("v10_steps_3", *steps(3)), record(), record("v10_steps_1", *steps(1))]
    strangers = [
        record("v10", "--student.layers=5", seed=1),
        record("v10_steps_2", *steps(2), "--train.lr=1e-4"),
        record("v10_t1", *steps(3)),
        record("v10", *DENSE),
    ]
    row = rules.sweep([*strangers, *runs], rules.STEP_VERSIONS)
    assert [group[0].result.version for group in row] == ["v10_steps_1", "v10_steps_3", "v10"]
    assert all(group[0] in runs for group in row)
    assert rules.sweep([], rules.STEP_VERSIONS) == []


def test_committed_runs_are_read_from_two_files_each(record, tmp_path):
    run = record()
    folder = tmp_path / "v10" / "x"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(run.result.model_dump_json())
    (tmp_path / "v10" / "README.md").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml does not exist"):
        rules.committed(tmp_path)
    (folder / "config.yaml").write_text(dump(run.experiment))
    (found,) = rules.committed(tmp_path)
    assert (found.folder, found.result, found.experiment) == (folder, run.result, run.experiment)
