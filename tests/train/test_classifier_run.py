"""A run of a classifier by command: two stages, a record, a report, and the same again after an interruption."""

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from asnn_goose import cli
from asnn_goose.config import load_classifier_experiment
from asnn_goose.reporting.classifier_record import ClassifierResult
from asnn_goose.reporting.classifier_report import write_classifier_report
from asnn_goose.reporting.record_base import read_result
from asnn_goose.reporting.run_folder import RunFolder
from asnn_goose.train import general
from asnn_goose.train.classifier_measure import every_logits, measure_exits
from asnn_goose.train.classifier_setting import prepare_classifier
from tests.conftest import logger_put_back, write_texts
from tests.models.test_encoder import save_bert

TIMES = {"run_id", "started", "wall_seconds", "seconds_by_phase", "notes"}
SECTIONS = ("# v17_two_stage on ", "## Result", "## Training", "## Spikes and energy", "## Texts", "## Provenance")


def _write_task(path: Path, seed: int = 0) -> Path:
    draw = random.Random(seed)
    rows = [
        f"{''.join(draw.choices('abcdefgh ', k=draw.randint(5, 30)))}{'xy'[n % 2]},with {'xy'[n % 2]}"
        for n in range(70)
    ]
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, a task and text without labels, and a cache that the runs of this file share."""
    folder = tmp_path_factory.mktemp("classifiers")
    save_bert(folder / "bert", hidden_dropout_prob=0.0)
    _write_task(folder / "task.csv")
    write_texts(folder / "texts")
    return folder


def _flags(place: Path, **changes: object) -> list[str]:
    base: dict[str, object] = {
        "scale": "smoke",
        "task.source": "files",
        "task.path": place / "task.csv",
        "task.window": 24,
        "teacher.name": place / "bert",
        "teacher.finetune.epochs": 1,
        "student.head_size": 16,
        "general.tokens": 600,
        "general.window": 24,
        "general.batch_size": 4,
        "general.data.source": "files",
        "general.data.path": place / "texts",
        "train.epochs": 0.5,
        "train.general_length": 1,
        "train.eval_every": 2,
        "train.checkpoint_every": 2,
        "train.device": "cpu",
        "train.precision": "float32",
    }
    values = base | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in values.items() if value is not None]


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run an arm to its end; returns the folder of its records beside the report."""
    _point_to(place / "cache", tmp_path, monkeypatch)

    def run(version: str = "v17_two_stage", status: int = 0, **changes: object) -> Path:
        home = tmp_path / "runs" / version
        before = set(home.glob("*"))
        with logger_put_back():
            assert cli.main(version, _flags(place, **changes)) == status
        (folder,) = set(home.glob("*")) - before
        return folder

    return run


def _point_to(cache: Path, root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("ASNN_GOOSE_CACHE", str(cache))
    patch.setenv("ASNN_GOOSE_RUNS", str(root / "runs"))
    patch.setenv("ASNN_GOOSE_REPORTS", str(root / "reports"))


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one finished run of the whole recipe."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, logger_put_back():
        _point_to(place / "cache", root, patch)
        assert cli.main("v17_two_stage", _flags(place)) == 0
    (folder,) = (root / "runs" / "v17_two_stage").iterdir()
    return folder


def _result(folder: Path) -> ClassifierResult:
    return read_result(folder / "result.json", ClassifierResult)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_record_counts_what_the_task_holds(finished):
    result = _result(finished)
    assert result.task.labels == ("with x", "with y")
    assert sum(map(sum, result.task.counts.values())) + result.task.copies == 70
    assert sum(result.task.truncated.values()) > 0
    batches = math.ceil(sum(result.task.counts["train"]) / 4)
    assert result.steps == round(0.5 * batches) and result.texts_seen == 4 * result.steps
    test = result.student.test
    right = sum(test.confusion[n][n] for n in range(2))
    assert test.accuracy == pytest.approx(right / sum(result.task.counts["test"]))
    assert result.ratio_to_teacher == pytest.approx(test.accuracy / result.teacher.test.accuracy)
    assert result.spikes is not None and 0 < result.spikes.rate < 1
    assert result.energy is not None and result.energy.student_joules > 0
    assert result.precision == "float32"


def test_the_report_has_its_sections_and_figures(finished):
    (report,) = (finished.parents[2] / "reports" / "v17_two_stage").glob("*/report.md")
    text = report.read_text(encoding="utf-8")
    assert "| matrix products in training | float32 |" in text
    assert [section for section in SECTIONS if section not in text] == []
    for name in ("confusion", "accuracy", "spikes", "raster"):
        assert f"]({name}.png)" in text and (report.parent / f"{name}.png").stat().st_size > 1000
    assert "First stage: the blocks' states were matched" in text
    table = (finished.parents[2] / "reports" / "classification.md").read_text(encoding="utf-8")
    assert "| [v17_two_stage](v17_two_stage/README.md) |" in table and "| base |" in table


def test_reports_are_made_again_from_the_records_alone(finished, tmp_path, monkeypatch, capfd):
    reports = finished.parents[2] / "reports"
    shutil.copytree(reports, tmp_path / "reports", ignore=shutil.ignore_patterns("*.md", "*.png"))
    _point_to(tmp_path / "cache", tmp_path, monkeypatch)
    assert cli.command(["report", "--all"]) == 0
    assert capfd.readouterr().out == "reports written: 1\n"
    made = _files(tmp_path / "reports")
    # There is no ladder of language models.
    assert not (tmp_path / "reports" / "roadmap.md").exists()
    assert {name: made[name] for name in _files(reports)} == _files(reports)
    (tmp_path / "reports" / "classification.md").unlink()
    assert cli.command(["report", f"v17_two_stage/{_result(finished).run_id}"]) == 0
    assert _files(tmp_path / "reports") == made


def test_a_repetition_with_another_outcome_is_listed_beside_the_first(finished, tmp_path):
    for number in range(2):
        folder = shutil.copytree(finished, tmp_path / "runs" / "v17_two_stage" / f"2026-{number}")
        for name in ("result.json", "provenance.json"):
            path = folder / name
            content = json.loads(path.read_text(encoding="utf-8")) | {"run_id": folder.name}
            if name == "result.json":
                content["student"]["test"]["accuracy"] = 0.5 + 0.1 * number
            path.write_text(json.dumps(content), encoding="utf-8")
        write_classifier_report(folder, tmp_path / "reports")
    listed = (tmp_path / "reports" / "v17_two_stage" / "README.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[4] for line in listed.splitlines() if line.startswith("| [2026-")] == ["60.0 %", "50.0 %"]


def test_levels_without_a_membrane_are_multiplied_and_are_not_called_spikes(run):
    joules = {}
    for kind in ("dense", "quantised"):
        neuron = {"student.neuron.kind": kind, "student.neuron.steps": 40, "student.hidden_neuron.kind": kind}
        folder = run("v17_ce_only", **neuron)
        (report,) = (folder.parents[2] / "reports" / "v17_ce_only").glob(f"{folder.name}/report.md")
        assert f"training texts the {kind} student, " in report.read_text(encoding="utf-8")
        energy = _result(folder).energy
        assert energy is not None
        joules[kind] = energy.student_joules
    # One product each and a few for the scales; an addition for each of up to 40 levels would be several times that.
    assert 0.5 < joules["quantised"] / joules["dense"] < 1.5


def test_the_student_is_an_ordinary_classifier_with_its_labels(finished):
    says = pipeline("text-classification", str(finished / "student"))("abcabcx")
    assert says[0]["label"] in ("with x", "with y") and 0.5 <= says[0]["score"] <= 1


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_equals_uninterrupted(run, finished, stop, stopping_at, monkeypatch, place):
    with monkeypatch.context() as patch:
        patch.setattr("asnn_goose.train.classifier_session.Recorder", stopping_at(stop))
        folder = run(status=cli.INTERRUPTED)
    assert not (folder / "result.json").exists()
    last = folder / "checkpoints" / "last.pt"
    state = torch.load(last, weights_only=False)
    state["progress"]["wall_seconds"] += 1000
    torch.save(state, last)
    with RunFolder.open(folder).claimed():
        assert cli.main("v17_two_stage", ["--scale=smoke", "--resume", str(folder)]) == 2
    assert cli.main("v17_two_stage", ["--scale=smoke", "--resume", str(folder)]) == 0
    ours, theirs = _weights(folder), _weights(finished)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert _result(folder).model_dump(exclude=TIMES) == _result(finished).model_dump(exclude=TIMES)
    # The time of all sessions.
    assert _result(folder).seconds_by_phase["training"] > 1000 and _result(folder).wall_seconds > 1000
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()]


def test_the_first_stage_is_computed_once_for_all_tasks_arms_and_seeds(run, finished, place, tmp_path, monkeypatch):
    trained = []
    once = general._train
    monkeypatch.setattr(general, "_train", lambda *parts: trained.append(parts) or once(*parts))
    other = _write_task(tmp_path / "other.csv", seed=1)
    stage = _result(finished).notes
    assert _result(run(seed=1)).notes == stage
    assert _result(run(task__path=other)).notes == stage
    assert _result(run("v17_no_features")).notes == stage
    assert trained == []
    assert _result(run(general__lr=2e-3)).notes != stage
    (half,) = _result(run(train__general_length=0.5)).notes
    tokens = re.search(r"on (\d+) tokens", half)
    assert tokens is not None and 300 <= int(tokens[1]) < 300 + 24
    assert len(trained) == 2


@pytest.mark.parametrize("changes", [{"labels": 5}, {"exits": [1]}])
def test_the_first_stage_starts_the_same_whatever_is_classified(place, tmp_path, monkeypatch, changes):
    """Its key has neither the task nor the exits, so what they draw must not move the projectors' start."""
    _point_to(tmp_path / "cache", tmp_path, monkeypatch)
    starts = []

    class Stop(Exception):
        pass

    def started(module, *_):
        starts.append({name: tensor.clone() for name, tensor in general._body(module).items()})
        raise Stop

    monkeypatch.setattr(general, "_train", started)
    for number, change in enumerate([{}, changes]):
        task = tmp_path / f"{number}.csv"
        rows = [f"t{n},c{n % change.get('labels', 2)}" for n in range(80)]
        task.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
        flags = _flags(place, task__path=task, student__exits=change.get("exits"))
        experiment = load_classifier_experiment("v17_two_stage", flags).experiment
        with pytest.raises(Stop):
            prepare_classifier(experiment)
    one, other = starts
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_each_arm_runs(run):
    left_out = {key: None for key in _general_keys()}
    for version in ("v17_no_stage1", "v17_ce_only"):
        result = _result(run(version, **left_out))
        assert result.notes == () and result.parent == "v17_two_stage"
    dense = _result(run("v17_dense_twin"))
    assert dense.spikes is None and dense.raster is None
    patient = _result(run("v17_patient"))
    assert patient.steps == round(3 * 0.5 * math.ceil(sum(patient.task.counts["train"]) / 4))


def test_an_arm_with_exits_says_what_they_give_and_what_differs_from_its_parent(run, finished, tmp_path):
    shutil.copytree(finished.parents[2] / "reports", tmp_path / "reports")
    folder = run("v17_exits", student__exits="[1]")
    exits = _result(folder).exits
    assert [each.confidence for each in exits] == sorted(each.confidence for each in exits)
    depths = [each.mean_depth for each in exits]
    assert depths == sorted(depths) and depths[0] >= 1 and depths[-1] <= 2
    text = (tmp_path / "reports" / "v17_exits" / folder.name / "report.md").read_text(encoding="utf-8")
    assert f"is 0.5 to 0.99 sure, {depths[0]:.2f} to {depths[-1]:.2f} blocks read it in the mean" in text
    table = text.partition("| setting | v17_two_stage | v17_exits |\n")[2].splitlines()[1:]
    assert table[: table.index("")] == ["| `student.exits` | `[]` | `[1]` |"]
    assert "| `student.exits` | `[1]` |" in text.partition("Overrides on the command line")[2]


def test_exits_are_measured_as_the_student_leaves(place, tmp_path, monkeypatch):
    """One pass through all blocks for all confidences, against :meth:`early_exit` once for each."""
    _point_to(place / "cache", tmp_path, monkeypatch)
    setting = prepare_classifier(
        load_classifier_experiment("v17_exits", _flags(place, student__exits="[1]")).experiment
    )
    student, texts = setting.module.student.eval(), setting.texts["test"]
    with torch.no_grad():
        for weight in student.classifiers.parameters():
            weight.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
    depths = set()
    for found in measure_exits(every_logits(setting), texts.labels_N, list(student.places)):
        batch = texts.batch(list(range(len(texts.ids))))
        left = student.early_exit(batch.input_ids, batch.mask, found.confidence)
        assert found.mean_depth == left.mean_depth
        assert found.accuracy == (left.logits_BV.argmax(-1) == batch.labels).double().mean().item()
        depths.add(found.mean_depth)
    assert len(depths) > 2


def _general_keys() -> list[str]:
    return [f"general.{key}" for key in ("tokens", "window", "batch_size", "data.source", "data.path")]


def test_a_student_with_a_tokenizer_of_its_own_learns_from_classes_alone(run, finished, tmp_path):
    words = Tokenizer(WordLevel({"[UNK]": 0, "[EOS]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    other = tmp_path / "other"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[EOS]").save_pretrained(other)
    apart = {"losses.features": 0.0, "losses.embeddings": 0.0, "student.init": "none", "student.tokenizer": other}
    left_out = {key: None for key in _general_keys()}
    folder = run("v17_no_stage1", **left_out, **apart)
    ours, theirs = _result(folder).energy, _result(finished).energy
    assert ours is not None and theirs is not None
    # Words instead of bytes, on the same test texts.
    assert ours.tokens < theirs.tokens / 2
    says = pipeline("text-classification", str(folder / "student"))
    assert len(AutoTokenizer.from_pretrained(folder / "student")) == 2
    assert [each["label"] in ("with x", "with y") for each in says(["a b c", "a"], batch_size=2)] == [True, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"losses.ce": 0.0, "losses.kl": 0.0}, "nothing teaches the classes"),
        ({"student.tokenizer": "x"}, "compares token by token"),
        ({"student.width": 64}, "losses.embeddings compares tables of one width"),
        ({"student.exits": "[2]"}, "student.exits must rise within 1 to 1"),
        ({"student.head_size": 12}, "student.head_size 12 does not divide the width 32"),
        ({"student.neuron.sparsity": 0.5}, "student.neuron.sparsity 0.5 is set from the text of a language model"),
        ({"general.window": 128}, "general.window is 128"),
        ({"train.lr": 1e9, "train.warmup": 0.0}, "lower train.lr 1000000000.0"),
        ({"general.lr": 1e12, "general.warmup": 0.0}, "lower general.lr 1000000000000.0"),
    ],
)
def test_a_mistake_is_one_sentence(place, tmp_path, monkeypatch, capfd, changes, words):
    _point_to(place / "cache", tmp_path, monkeypatch)
    assert cli.main("v17_two_stage", _flags(place, **changes)) == 2
    last = capfd.readouterr().err.rstrip().split("\n")[-1]
    assert last.startswith("error: ") and words in last


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([f"t{n},x" for n in range(60)], "all have the label 'x'"),
        ([f"t{n},{'xy'[n % 2]}" for n in range(30)] + [" ,x"], "line 32 has no text in field 'text'"),
        ([f"t{n},{n % 2 + 0.5}" for n in range(30)], "0.5"),
    ],
)
def test_a_task_that_cannot_be_learnt_is_one_sentence(place, tmp_path, monkeypatch, capfd, rows, words):
    (tmp_path / "task.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    _point_to(place / "cache", tmp_path, monkeypatch)
    assert cli.main("v17_two_stage", _flags(place, task__path=tmp_path / "task.csv")) == 2
    last = capfd.readouterr().err.rstrip().split("\n")[-1]
    assert last.startswith("error: ") and words in last
    assert not (tmp_path / "runs").exists()
