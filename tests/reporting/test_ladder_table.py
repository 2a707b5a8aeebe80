"""The ladder's table: a small one by hand, its order, its figures, and the same bytes wherever the records lie."""

import json
import shutil

import pytest

from asnn_goose.reporting.ablation import write_roadmap
from asnn_goose.reporting.ladder import read_ladder

TABLE = """\
# The ladder at scale cpu

Of 1 version, controls not counted, compared with the parent that each changes, 1 helps (child), none hurt and none \
show no difference; 1 has no run that counts. \
A verdict needs a p-value below 0.05 after Holm's correction for the one comparison of the table. \
Closest to the teacher is child with a test perplexity of 200.0 (200.0 to 200.0), 5.00 times the teacher's. aa changes \
nothing but the seeds of base: its ratio of 1.050 (unpaired) is what noise alone makes. 5 runs count, with 102,400 \
training tokens and 0.726 hours of computing in all.

The same records to sort, lay over one another and compare: [index.html](index.html).

## What each change does

| version | change | seeds | test perplexity (95 %) | times the teacher | parent | ratio to the parent (95 %) | p, \
corrected | verdict |
| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | --- |
| [aa](aa/README.md) | What aa changes. | 1 | 420.0 (399.0 to 441.0, one seed) | 10.5 | base | 1.050 (unpaired) \
|  | one seed |
| [base](base/README.md) | What base changes. | 2 | 400.0 (400.0 to 400.0) | 10.0 |  |  |  | base |
| [child](child/README.md) | What child changes. | 2 | 200.0 (200.0 to 200.0) | 5.00 | base | \
0.5000 (0.5000 to 0.5000) | 0 | helps |
| gone |  |  |  |  |  |  |  | not run |

Perplexities are geometric means over seeds, with Student's t-interval of their logarithms. A ratio below 1 is better \
than the parent. Its interval is Student's t over the seeds that both were run with, pair by pair, since a seed \
decides the initialisation and the order of the data. Machines multiply matrices in bfloat16 or in float32, and both \
runs of a pair did in the same; a seed that was run in both counts once, by its mean, so that a ratio need not be the \
quotient of two perplexities. Marked "one seed", a perplexity's interval is the run's own, by bootstrap over \
test windows (narrower than over their documents), and says nothing of other seeds. Unpaired: fewer than two pairs, \
or nothing but the seeds is changed; the ratio is that of the means of their runs in one arithmetic, with Welch's \
interval where both have two seeds or more. Of the 2 pairs 2 are of one commit of the code; what changed between two \
commits, rounding above all, is part of the ratio of the others. p is two-sided and corrected by Holm over the whole \
table; the intervals are each for one comparison. The one comparison stands from a mean of so many of its standard \
errors on: 12.7 with 2 pairs; "no difference shown" leaves room for effects of that size. None of the intervals covers \
the choice of the test text.

![deltas](roadmap/deltas.png)

Test perplexity over the parent's, on a log axis, with 95 % intervals before the correction; left of 1 the version is \
better. Hollow: no interval over seeds.

## Likeness, spikes and cost

| version | KL (nats per token) | same first choice | spike rate | spike operands | zero operands | energy, times the \
teacher | tokens/s | wall time of a run |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| aa | 2.500 | 22.1 % | 24.3 % | 96.8 % | 52.7 % | 0.247 | 441 | 8 min 43 s |
| base | 2.500 | 22.1 % | 24.3 % | 96.8 % | 52.7 % | 0.247 | 441 | 8 min 43 s |
| child | 2.500 | 22.1 % | 24.3 % | 96.8 % | 52.7 % | 0.247 | 441 | 8 min 43 s |
| gone |  |  |  |  |  |  |  | not run |

Means over seeds. KL is that of the teacher to the student at temperature 1; spike operands are the share of the mixer \
matrices' products whose operand is a spike, zero operands the share of tokens x channels of these operands that are \
0; energy is that of the arithmetic, estimated, with an addition for each spike and a multiplication for each level of \
a student without spikes. The teacher, smollm2, has a test perplexity of 40.00 at 619 µJ per token.

The teacher's targets and the first stage of a seed are computed once, by its first run. Preparation takes first runs \
0.0 s (median of 3), later ones 0.0 s (of 2). With it and the looks at validation counted in, first runs make 49.8 \
tokens/s, later ones 49.8; runs differ from 49.8 to 49.8 by their machine and by what else ran there, so only the \
preparation tells what sharing is worth.

![validation](roadmap/validation.png)

Validation perplexity on a log axis, geometric means over seeds at the looks that all of them share; right: the second \
half of each training. Blue helps, vermilion hurts, black is the base.

![energy](roadmap/energy.png)

Test perplexity with its 95 % interval against the estimated energy of the student's arithmetic. Filled: the interval \
is over seeds; hollow: one seed, and the interval is the run's own. The teacher, smollm2, has a test perplexity of \
40.00 at 619 µJ per token.
"""


def test_a_small_table_by_hand(small_ladder):
    paths = write_roadmap(small_ladder, "cpu", ["base", "child", "aa", "gone"])
    assert (small_ladder / "roadmap.md").read_text() == TABLE
    names = ("roadmap.md", "roadmap/deltas.png", "roadmap/validation.png", "roadmap/energy.png", "index.html")
    assert paths == [small_ladder / name for name in names]


def test_pairs_of_other_code_are_counted(small_ladder):
    """One run's code differs from its commit, and another's commit is not known."""
    (run,) = small_ladder.glob("child/*-s0-*")
    origin = json.loads((run / "provenance.json").read_text())
    for change, words in (({}, "2 pairs 2 are"), ({"dirty": True}, "2 pairs 1 is"), ({"commit": "1"}, "2 pairs 1 is")):
        (run / "provenance.json").write_text(json.dumps(origin | change))
        write_roadmap(small_ladder, "cpu", ["base", "child"])
        assert f"Of the {words} of one commit of the code" in (small_ladder / "roadmap.md").read_text()


def test_controls_come_first_and_the_others_as_given(small_ladder, record):
    record("ce_only", 0, 500.0)
    versions = ("gone", "child", "base", "ce_only", "aa")
    assert [rung.version for rung in read_ladder(small_ladder, "cpu", versions).rungs] == [
        "ce_only",
        "aa",
        "gone",
        "child",
        "base",
    ]
    write_roadmap(small_ladder, "cpu", versions)
    rows = [
        line.split(" | ")[0] for line in (small_ladder / "roadmap.md").read_text().splitlines() if line.startswith("| ")
    ]
    assert rows[2:4] == ["| [ce_only](ce_only/README.md)", "| [aa](aa/README.md)"]


def test_a_ladder_without_runs_is_a_table_of_what_is_missing(tmp_path):
    assert [path.name for path in write_roadmap(tmp_path, "cpu", ["base", "aa"])] == ["roadmap.md", "index.html"]
    text = (tmp_path / "roadmap.md").read_text()
    assert text.splitlines()[2] == (
        "No version can be compared with its parent yet. 0 runs count, with 0 training tokens and 0 hours of computing "
        "in all."
    )
    assert "| aa | not run |\n| base | not run |" in text


def test_a_figure_of_an_earlier_table_goes(small_ladder):
    versions = ["base", "child", "aa", "gone"]
    write_roadmap(small_ladder, "cpu", versions)
    for path in small_ladder.glob("*/*/metrics.jsonl"):
        path.unlink()
    paths = write_roadmap(small_ladder, "cpu", versions)
    assert small_ladder / "roadmap" / "validation.png" not in paths
    assert sorted(path.name for path in (small_ladder / "roadmap").iterdir()) == ["deltas.png", "energy.png"]
    assert "validation.png" not in (small_ladder / "roadmap.md").read_text()


def test_the_same_records_give_the_same_bytes_wherever_they_lie(small_ladder, record, tmp_path_factory):
    """Two sentences of what is left out name paths or runs."""
    record("orphan", 0, 300.0, parent="nobody")
    (record("spoilt", 0, 300.0) / "result.json").write_text("{")
    versions = ["base", "child", "aa", "gone", "spoilt", "orphan"]
    elsewhere = shutil.copytree(small_ladder, tmp_path_factory.mktemp("elsewhere") / "other" / "reports")
    lines = (write_roadmap(small_ladder, "cpu", versions)[0]).read_text().splitlines()
    assert sum(line.startswith("- ") for line in lines) == 2
    first = [path.read_bytes() for path in write_roadmap(small_ladder, "cpu", versions)]
    assert [path.read_bytes() for path in write_roadmap(small_ladder, "cpu", versions)] == first
    assert [path.read_bytes() for path in write_roadmap(elsewhere, "cpu", versions)] == first


def test_the_mean_curve_is_geometric_over_the_looks_in_common(record, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "asnn_goose.reporting.ablation.plot_validation", lambda versions, path: seen.extend(versions) or path
    )
    for seed, looks in enumerate(({0: 100.0, 5: 40.0, 10: 20.0}, {0: 400.0, 10: 45.0})):
        folder = record("base", seed, 400.0)
        lines = [json.dumps({"step": step, "val_ppl": value}) for step, value in looks.items()]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_roadmap(tmp_path, "cpu", ["base"])
    ((curve, verdict),) = seen
    assert (curve.label, verdict) == ("base", "base") and curve.tokens.tolist() == [0, 10240]
    assert curve.values == pytest.approx([200.0, 30.0])


def test_the_mean_curve_is_over_seeds_also_where_one_was_run_twice(record, tmp_path, monkeypatch):
    """Seed 0 is sqrt(100 x 400) = 200 and seed 1 is 50: their mean is 100, and that of three runs 126."""
    seen = []
    monkeypatch.setattr(
        "asnn_goose.reporting.ablation.plot_validation", lambda versions, path: seen.extend(versions) or path
    )
    for seed, precision, value in ((0, "bfloat16", 100.0), (0, "float32", 400.0), (1, "float32", 50.0)):
        folder = record("base", seed, 400.0, results={"precision": precision})
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 10, "val_ppl": value}) + "\n")
    write_roadmap(tmp_path, "cpu", ["base"])
    assert seen[0][0].values == pytest.approx([100.0])


def test_the_first_run_of_a_seed_pays_for_what_is_shared(record, tmp_path):
    took = {"seconds_by_phase": {"preparation": 101.0, "training": 411.0, "evaluation": 1000.0}}
    record("base", 0, 400.0, results=took, hours=1)
    write_roadmap(tmp_path, "cpu", ["base"])
    assert "later ones" not in (tmp_path / "roadmap.md").read_text()
    # A run of earlier days, which does not say what took how long.
    record("base", 0, 400.0, results={"seconds_by_phase": {}}, hours=0)
    for hours, seed in ((2, 0), (3, 0), (2, 1)):
        record(f"child_{hours}_{seed}", seed, 400.0, hours=hours)
    write_roadmap(tmp_path, "cpu", ["base", "child_2_0", "child_3_0", "child_2_1"])
    # 20,480 tokens over 512 s and 411 s are 40 and 49.83 a second; the median of the two first ones is 44.91.
    text = (tmp_path / "roadmap.md").read_text()
    assert "first runs 50.5 s (median of 2), later ones 0.0 s (of 2)." in text
    assert "first runs make 44.9 tokens/s, later ones 49.8; runs differ from 40.0 to 49.8 by" in text
