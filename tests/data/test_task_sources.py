"""Labelled records: what is read from where, and what is refused in one sentence."""

import csv
import json
import math
from pathlib import Path

import datasets
import datasets.config
import pytest

from asnn_goose.config.task import TaskConfig
from asnn_goose.data.task_sources import Record, label_name, read_source
from asnn_goose.errors import UserError

TWO = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]


def _files(path: Path, **keys) -> TaskConfig:
    return TaskConfig(source="files", path=path, **keys)


def _jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


# Labels


@pytest.mark.parametrize(("value", "name"), [("ship", "ship"), (" ship ", "ship"), (3, "3"), (-1, "-1"), ("7", "7")])
def test_text_and_whole_numbers_are_labels(value, name):
    assert label_name(value, "x") == name


@pytest.mark.parametrize("value", ["v1.5", "3 stars", "1.5.2", "e", "-", "nan"])
def test_text_that_only_begins_like_a_number_is_a_label(value):
    assert label_name(value, "x") == value


@pytest.mark.parametrize("value", [0.5, 1.0, True, None, "", "  ", "0.5", "-1.", ".5", "1e-3", "2.5E+07", ["a"]])
def test_anything_else_is_refused(value):
    with pytest.raises(UserError, match=r"a\.csv, line 3 has the label .*: labels are text or whole numbers"):
        label_name(value, "a.csv, line 3")


# Files


def test_one_file_is_training_text_in_its_order(tmp_path):
    records = [{"body": " One, two ", "kind": "a", "film": 3}, {"body": "x\ny", "kind": 5, "film": None, "more": 1}]
    records.append({"body": "z", "kind": "a", "film": math.nan})
    path = _jsonl(tmp_path / "notes.jsonl", records)
    source = read_source(_files(path, text_field="body", label_field="kind", group_field="film"))
    assert source.name == "notes" and source.labels is None
    expected = [Record(" One, two ", "a", "3"), Record("x\ny", "5", None), Record("z", "a", None)]
    assert source.splits == {"train": expected}


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_tables_are_read_as_they_are_quoted(tmp_path, ending, separator):
    path = tmp_path / f"table.{ending}"
    header = separator.join(("label", "text"))
    path.write_bytes(
        f'\ufeff{header}\r\na{separator}"say ""hi"", {separator}\r\nthere"\r\n\r\n2{separator}naïve\r\n'.encode()
    )
    records = read_source(_files(path)).splits["train"]
    assert records == [Record(f'say "hi", {separator}\r\nthere', "a", None), Record("naïve", "2", None)]


def test_an_empty_cell_is_no_group(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,film\none,a,\ntwo,b, \nthree,a,None\nfour,b,0\n")
    records = read_source(_files(path, group_field="film")).splits["train"]
    assert [record.group for record in records] == [None, None, "None", "0"]


def test_half_a_surrogate_pair_in_a_group_is_one_sentence(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", [{"text": "one", "label": "a", "film": "\ud83d"}])
    with pytest.raises(UserError, match=r"line 1 has half a surrogate pair in field 'film': mend or drop the record"):
        read_source(_files(path, group_field="film"))


def test_a_text_longer_than_the_csv_modules_limit_is_read(tmp_path):
    path, limit = tmp_path / "a.csv", csv.field_size_limit()
    path.write_text("text,label\n" + "x" * (limit + 1) + ",a\n")
    assert read_source(_files(path)).splits["train"] == [Record("x" * (limit + 1), "a", None)]
    assert csv.field_size_limit() == limit


def test_a_folder_has_its_splits(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\none,a\n")
    _jsonl(tmp_path / "test.jsonl", [{"text": "two", "label": "b"}])
    (tmp_path / "readme.md").write_text("not read")
    (tmp_path / "other.csv").write_text("not read either")
    splits = read_source(_files(tmp_path)).splits
    assert splits == {"train": [Record("one", "a", None)], "test": [Record("two", "b", None)]}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "text,label\n,a\n", r"a\.csv, line 2 has no text in field 'text'"),
        ("a.csv", "text,label\none,a\n \t,b\n", r"a\.csv, line 3 has no text in field 'text': give it a text, drop"),
        ("a.csv", "txt,label\none,a\n", r"line 2 has no field 'text': set task\.text_field to 'txt'"),
        ("a.csv", "text,kind\none,a\n", r"line 2 has no field 'label': set task\.label_field to 'text' or 'kind'"),
        ("a.csv", "text,label\none,0.5\n", r"line 2 has the label '0\.5': labels are text or whole numbers"),
        ("a.csv", "text,label\none,\n", r"line 2 has the label ''"),
        ("a.csv", "text,label\none, two,a\n", r"line 2 has not as many fields as the header"),
        ("a.csv", "text,label\none\n", r"line 2 has not as many fields as the header"),
        ("a.tsv", 'label\ttext\na\t"oops\nb\ttwo\nb\tthree\n', r"cannot be read after line 1 \(unexpected end.*close"),
        ("a.jsonl", '{"text": "one", "label": 1.0}', r"line 1 has the label 1\.0"),
        ("a.jsonl", '{"text": "one", "label": true}', r"line 1 has the label True"),
        ("a.jsonl", '\n{"text": null, "label": "a"}', r"line 2 has no text in field 'text'"),
        ("a.jsonl", "{}", r"line 1 has no fields at all: give records with a field 'text'"),
        ("a.jsonl", '{"text": 3, "label": "a"}', r"line 1 has a int in field 'text'"),
        ("a.jsonl", r'{"text": "\ud83d hi", "label": "a"}', r"line 1 has half a surrogate pair in field 'text'"),
        ("a.jsonl", r'{"text": "hi", "label": "\ude00"}', r"line 1 has half a surrogate pair in field 'label'"),
        ("a.jsonl", '{"text": ', r"line 1 is not JSON"),
        ("a.jsonl", "[1]", r"line 1 is no JSON object"),
        ("a.parquet", "x", r"a\.parquet' is of another kind than \.csv, \.tsv, \.jsonl"),
        (None, None, r"no-such-file' does not exist: give a \.csv"),
    ],
)  # fmt: skip
def test_bad_files_are_one_sentence(tmp_path, name, content, sentence):
    path = tmp_path / (name or "no-such-file")
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence) as error:
        read_source(_files(path))
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_are_one_sentence(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\ncaf\xe9,a\n")
    with pytest.raises(UserError, match=r"a\.csv is not UTF-8 \(byte 0xe9 at position 14\): save it as UTF-8"):
        read_source(_files(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [((), "holds 0 files of the train split"), (("train.csv", "train.tsv"), "holds 2 files of the train split")],
)
def test_a_folder_without_one_train_file_is_refused(tmp_path, names, sentence):
    for name in names:
        (tmp_path / name).write_text("text,label\none,a\n")
    with pytest.raises(UserError, match=sentence):
        read_source(_files(tmp_path))


# Hub


@pytest.fixture
def hub_set(tmp_path, monkeypatch):
    """Name of a data set on the disk, as the hub's library reads it, with named classes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(**splits: list[int]) -> str:
        features = datasets.Features(
            sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["negative", "positive "])
        )
        (tmp_path / "set").mkdir()
        for name, labels in splits.items():
            columns = {"sentence": [f"{name} {i}" for i in range(len(labels))], "label": labels}
            datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "set" / f"{name}.parquet")
        return str(tmp_path / "set")

    return make


def _hub(name: str) -> TaskConfig:
    return TaskConfig(source="hub", name=name, text_field="sentence")


def test_a_data_set_whose_test_labels_are_kept_back_is_tested_on_validation(hub_set):
    source = read_source(_hub(hub_set(train=[0, 1, 1], validation=[1, 0], test=[-1, -1])))
    assert source.labels == ("negative", "positive")
    assert [record.label for record in source.splits["train"]] == ["negative", "positive", "positive"]
    assert source.splits["test"] == [Record("validation 0", "positive", None), Record("validation 1", "negative", None)]
    assert set(source.splits) == {"train", "test"}


def test_a_data_set_with_labelled_tests_keeps_its_splits(hub_set):
    source = read_source(_hub(hub_set(train=[0, 1], validation=[1], test=[0, 0, 1])))
    assert {name: len(records) for name, records in source.splits.items()} == {"train": 2, "validation": 1, "test": 3}


def test_lists_as_labels_in_a_data_set_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        columns = {"sentence": ["one", "two"], "label": [[0], [0, 1]]}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "set" / f"{name}.parquet")
    with pytest.raises(UserError, match=r"record 1 has the label \[0\]: labels are text or whole numbers"):
        read_source(_hub(str(tmp_path / "set")))


def test_a_missing_label_in_a_data_set_is_one_sentence(hub_set):
    name = hub_set(train=[0, 1, -1], test=[0])
    with pytest.raises(UserError, match=r"train split, record 3 has the label -1, which is none of negative, positive"):
        read_source(_hub(name))
    with pytest.raises(UserError, match=r"has no field 'kind': set task\.label_field to 'sentence' or 'label'"):
        read_source(TaskConfig(source="hub", name=name, text_field="sentence", label_field="kind"))


def test_no_way_to_the_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing' is neither in the hub's cache nor reachable") as error:
        read_source(TaskConfig(source="hub", name="nobody/nothing"))
    assert "\n" not in str(error.value)


# Assets


@pytest.mark.parametrize(
    ("name", "hint"), [("reuters-r8", "did you mean 'reuters_r8'"), ("news", "choose one of reuters_r8, reviews")]
)
def test_an_asset_that_is_no_task_is_refused(name, hint):
    with pytest.raises(UserError, match=f"task.name '{name}' is no task that comes in a wheel: {hint}"):
        read_source(TaskConfig(name=name))
