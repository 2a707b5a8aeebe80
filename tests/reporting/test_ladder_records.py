"""Which runs of the ladder count, and what is said of records that are not what they should be."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from asnn_goose.config import load_dump
from asnn_goose.reporting.ablation import write_roadmap
from asnn_goose.reporting.ladder import read_ladder, run_name


def test_the_versions_own_settings_count(record, tmp_path):
    """Of several, those with most seeds, then those nearest to the parent's."""
    record("base", 0, 400.0)
    near = record("child", 0, 200.0, settings={"distillation.losses.ce.weight": 0.5})
    far = record(
        "child", 0, 100.0, settings={"distillation.losses.ce.weight": 0.5, "distillation.losses.forward_kl.weight": 0.5}
    )
    ladder = read_ladder(tmp_path, "cpu", ["base", "child"])
    assert [run.folder for run in ladder.rungs[1].runs] == [near]
    assert [run.folder for run in ladder.others] == [far]
    record(
        "child", 1, 101.0, settings={"distillation.losses.ce.weight": 0.5, "distillation.losses.forward_kl.weight": 0.5}
    )
    assert [run.result.seed for run in read_ladder(tmp_path, "cpu", ["base", "child"]).rungs[1].runs] == [0, 1]


def test_a_run_that_differs_from_the_base_in_more_than_its_version_does_not_count(record, tmp_path):
    """Of the base, the asked settings count, though another has more seeds; overrides that all share are no matter."""
    change, override = {"distillation.losses.ce.weight": 0.5}, {"train.lr": 0.01}
    base, child = record("base", 0, 400.0, hours=1), record("child", 0, 200.0, settings=change, hours=1)
    asked = {folder.parent.name: load_dump((folder / "config.yaml").read_text()) for folder in (base, child)}
    strange = [record("child", seed, 100.0, settings=change | override) for seed in (0, 1)]
    read = partial(read_ladder, tmp_path, "cpu", ["base", "child"], asked)
    assert [run.folder for run in read().runs] == [base, child]
    others = [record("base", seed, 300.0, settings=override) for seed in (0, 1)]
    assert [run.folder for run in read().runs] == [base, child]

    for folder in (base, child):
        shutil.rmtree(folder)
    assert [run.folder for run in read().runs] == [*others, *strange]
    record("base", 0, 400.0, hours=1)
    assert [rung.runs for rung in read().rungs][1] == ()
    why = "from the base's runs in more than its version's change."
    assert f"{run_name_of(strange[0])} and 1 more of the version differ {why}" in read().left_out
    shutil.rmtree(strange[1])
    assert f"{run_name_of(strange[0])} differs {why}" in read().left_out


def test_former_settings_of_runs_that_count_are_told_once(record, tmp_path):
    """The rate is the base's and the child's, so it is told of the base; the weight is the child's own."""
    change, override = {"distillation.losses.ce.weight": 0.5}, {"train.lr": 0.01}
    base, child = record("base", 0, 400.0), record("child", 0, 200.0, settings=change)
    asked = {folder.parent.name: load_dump((folder / "config.yaml").read_text()) for folder in (base, child)}
    read = partial(read_ladder, tmp_path, "cpu", ["base", "child"], asked)
    assert read().left_out == ()
    shutil.rmtree(child)
    child = record("child", 0, 200.0, settings={"distillation.losses.ce.weight": 0.7})
    assert [run.folder for run in read().runs] == [base, child]
    of_child = "The runs of child that count have other settings than it has now: `distillation.losses.ce.weight`."
    assert read().left_out == (of_child,)
    for folder in (base, child):
        shutil.rmtree(folder)
    record("base", 0, 400.0, settings=override)
    record("child", 0, 200.0, settings={"distillation.losses.ce.weight": 0.7} | override)
    of_base = "The runs of base that count have other settings than it has now: `train.lr`."
    assert read().left_out == (of_base, of_child)


def test_a_record_of_another_parent_is_left_out_and_the_version_stays(record, tmp_path):
    base, child = record("base", 0, 400.0), record("child", 0, 200.0)
    asked = {folder.parent.name: load_dump((folder / "config.yaml").read_text()) for folder in (base, child)}
    # Newer than the others, and with base under child a circle.
    strange = record("base", 1, 300.0, settings={"parent": "child"}, hours=5)
    ladder = read_ladder(tmp_path, "cpu", ["base", "child"], asked)
    assert [run.folder for run in ladder.runs] == [base, child]
    assert [rung.parent for rung in ladder.rungs] == [None, "base"]
    assert ladder.left_out == (
        f"{run_name_of(strange)} calls child its parent, and its version's is None: repeat the run.",
    )


def test_a_curve_runs_over_training_tokens(small_ladder):
    ladder = read_ladder(small_ladder, "cpu", ["base"])
    curve = ladder.curve(ladder.runs[0], "val_ppl")
    assert curve is not None and curve.label == run_name(ladder.runs[0])
    # Looks at steps 0, 6, 12 and 18 of 20, each of 1,024 tokens.
    assert curve.tokens.tolist() == [0, 6144, 12288, 18432]
    assert curve.values == pytest.approx(np.exp([10, 6 + 4 / 7, 6 + 4 / 13, 6 + 4 / 19]))
    assert ladder.curve(ladder.runs[0], "never_measured") is None


def run_name_of(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def left_out(root: Path) -> list[str]:
    """Sentences of the table's last section."""
    text = (root / "roadmap.md").read_text()
    return [line.removeprefix("- ") for line in text.partition("## Left out\n\n")[2].splitlines()]


def torn(record, root):
    path = record("spoilt", 0, 300.0) / "result.json"
    path.write_text(path.read_text()[:100])
    return f"spoilt/{path.parent.name}/result.json is not the result of a run: "


def unfinished(record, root):
    path = record("spoilt", 0, 300.0) / "result.json"
    path.unlink()
    return f"spoilt/{path.parent.name}/result.json does not exist: the run did not finish; continue it with --resume."


def without_settings(record, root):
    path = record("spoilt", 0, 300.0) / "config.yaml"
    path.unlink()
    return f"spoilt/{path.parent.name}/config.yaml does not exist: put it back, or name the folder of a run."


def not_text(record, root):
    path = record("spoilt", 0, 300.0) / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    return f"spoilt/{path.parent.name}/config.yaml is damaged ("


def no_date(record, root):
    path = record("spoilt", 0, 300.0) / "config.yaml"
    path.write_text(path.read_text() + "x: 2020-13-45\n")
    return f"spoilt/{path.parent.name}/config.yaml: not valid YAML: month must be in 1..12"


def a_folder_in_its_place(record, root):
    path = record("spoilt", 0, 300.0) / "result.json"
    path.unlink()
    path.mkdir()
    return f"spoilt/{path.parent.name}/result.json cannot be read (Is a directory): mend or remove it."


def of_two_runs(record, root):
    path = record("spoilt", 0, 300.0) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 7}))
    return f"spoilt/{path.parent.name}: seed is 0 in config.yaml and 7 in result.json: repeat the run."


def misnamed(record, root):
    folder = record("other", 0, 300.0)
    (root / "spoilt").mkdir()
    shutil.move(folder, root / "spoilt")
    return f"spoilt/{folder.name} calls itself a run of other, not of spoilt: put it where it belongs."


def circular(record, root):
    record("spoilt", 0, 300.0, parent="partner")
    record("partner", 0, 300.0, parent="spoilt")
    return "spoilt: its parents close a circle, spoilt -> partner -> spoilt; mend `parent` in a config.yaml."


def its_own_parent(record, root):
    record("spoilt", 0, 300.0, parent="spoilt")
    return "spoilt: its parents close a circle, spoilt -> spoilt; mend `parent` in a config.yaml."


def unknown_parent(record, root):
    record("spoilt", 0, 300.0, parent="nobody")
    return "spoilt: its parent nobody is not among the versions of this table; name it as well."


def contradicting(record, root):
    names = [
        run_name_of(record("spoilt", 0, ppl, results={"fingerprint": "fedcba98" * 8}, hours=hours))
        for ppl, hours in ((300.0, 50), (301.0, 51))
    ]
    return (
        f"{' and '.join(names)} have one fingerprint, fedcba98, and different results, so the code changed in between "
        "or a run does not repeat: none of them is used."
    )


SPOILT = (
    torn, unfinished, without_settings, not_text, no_date, a_folder_in_its_place, of_two_runs, misnamed, circular,
    its_own_parent, unknown_parent, contradicting,
)  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_used_is_named_and_the_rest_stands(small_ladder, record, spoil):
    versions = ["base", "child", "aa", "gone", "spoilt", "partner"]
    write_roadmap(small_ladder, "cpu", versions)
    rows = {line for line in (small_ladder / "roadmap.md").read_text().splitlines() if line.startswith("| [")}
    assert len(rows) == 3
    sentence = spoil(record, small_ladder)
    write_roadmap(small_ladder, "cpu", versions)
    sentences = left_out(small_ladder)
    assert any(each.startswith(sentence) for each in sentences)
    assert len(sentences) == (2 if spoil is circular else 1)
    text = (small_ladder / "roadmap.md").read_text()
    assert rows <= set(text.splitlines())
    assert sentence.partition("`")[0].replace("->", "-&gt;") in (small_ladder / "index.html").read_text()
    assert str(small_ladder) not in text and "[spoilt]" not in text


def test_a_record_without_its_provenance_counts(small_ladder):
    """Of which code it is, is not known then."""
    next((small_ladder / "child").glob("*/provenance.json")).unlink()
    write_roadmap(small_ladder, "cpu", ["base", "child", "aa"])
    assert "Of the 2 pairs 1 is of one commit of the code" in (small_ladder / "roadmap.md").read_text()


def test_equal_results_of_one_fingerprint_are_no_contradiction(small_ladder, record):
    same = {"fingerprint": "fedcba98" * 8}
    older, newer = (record("spoilt", 0, 300.0, results=same, hours=hours) for hours in (50, 51))
    write_roadmap(small_ladder, "cpu", ["base", "spoilt"])
    repeats = f"{run_name_of(older)} repeats seed 0, of which the newer {run_name_of(newer)} counts."
    assert left_out(small_ladder) == [repeats]


def test_runs_that_do_not_count_say_why(small_ladder, record):
    override = record("child", 2, 100.0, settings={"train.tokens": 4096, "distillation.losses.ce.weight": 0.5})
    shorter = record(
        "child", 3, 100.0, settings={"distillation.losses.ce.weight": 0.5}, results={"evaluation.test_tokens": 1234}
    )
    write_roadmap(small_ladder, "cpu", ["base", "child"])
    assert sorted(left_out(small_ladder)) == [
        f"{run_name_of(override)} has other settings than the version's runs that count: `train.tokens`.",
        f"{run_name_of(shorter)} was evaluated on another number of tokens than the version's runs that count.",
    ]


def test_a_damaged_curve_is_named_and_its_run_counts(small_ladder):
    write_roadmap(small_ladder, "cpu", ["base", "child", "aa", "gone"])
    whole = (small_ladder / "roadmap.md").read_text()
    (path,) = (small_ladder / "aa").glob("*/metrics.jsonl")
    path.write_text("no json\n" + path.read_text())
    write_roadmap(small_ladder, "cpu", ["base", "child", "aa", "gone"])
    (sentence,) = left_out(small_ladder)
    place = f"aa/{path.parent.name}"
    assert sentence.startswith(f"The curve of {place}: {place}/metrics.jsonl, line 1 is not a metrics record")
    assert (small_ladder / "roadmap.md").read_text().startswith(whole.rstrip("\n"))
