"""Corpora: what is read from where, what is refused, and that a document's split is its own."""

import hashlib
import json
from pathlib import Path

import datasets.config
import pyarrow
import pytest
from datasets.exceptions import DatasetGenerationError
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from asnn_goose.config.schema import DataConfig
from asnn_goose.data.corpora import Corpus, Document, load_corpus, split_documents, split_of
from asnn_goose.errors import UserError


def _files(path: Path, **keys) -> DataConfig:
    return DataConfig(source="files", path=path, **keys)


def _texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents]


def _of(*texts: str) -> Corpus:
    documents = tuple(Document(hashlib.sha256(text.encode()).hexdigest()[:16], text) for text in texts)
    return Corpus("tests", "key", "none", documents)


# Files


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_bytes("\ufeffnaïve tea\r\n".encode())
    records = [{"text": "one"}, {"text": ""}, {"text": None}, {"text": "two\u2028lines", "more": 1}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["three", None, "four"]}), tmp_path / "c.PARQUET")
    (tmp_path / "d.md").write_text("not read")
    corpus = load_corpus(_files(tmp_path))
    assert _texts(corpus) == ["one", "two\u2028lines", "naïve tea\r\n", "three", "four"]
    assert [document.id for document in corpus.documents] == [
        hashlib.sha256(text.encode()).hexdigest()[:16] for text in _texts(corpus)
    ]
    assert _texts(load_corpus(_files(tmp_path / "b" / "notes.txt"))) == ["naïve tea\r\n"]


def test_a_corpus_of_files_is_called_after_its_folder(tmp_path, monkeypatch):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "letters")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_corpus(_files(Path("."))).name == load_corpus(_files(Path("~/letters"))).name == "letters"


def test_key_follows_the_content_and_not_the_files(tmp_path):
    for name, texts in {"x": ["p", "q"], "y": ["q", "p"], "z": ["p", "q", "r"]}.items():
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_text(text)
    key = {name: load_corpus(_files(tmp_path / name)).key for name in "xyz"}
    assert key["x"] == key["y"] != key["z"]


def test_near_duplicates_are_dropped_at_the_configured_overlap(tmp_path):
    one, other = " ".join(map(str, range(16))), " ".join(map(str, range(4, 20)))  # overlap 8 / 16
    (tmp_path / "1.txt").write_text(one)
    (tmp_path / "2.txt").write_text(other)
    assert _texts(load_corpus(_files(tmp_path, near_duplicate=0.5))) == [one]
    assert _texts(load_corpus(_files(tmp_path, near_duplicate=0.6))) == [one, other]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (None, None, r"no-such-folder' does not exist: give a folder"),
        ("a.csv", b"text\n", r"holds no \.txt, \.jsonl, \.parquet file"),
        ("a.txt", b" \n\t", r"holds no text"),
        ("a.txt", b"caf\xe9 ole", r"a\.txt is not UTF-8 \(byte 0xe9 at position 3\): save it as UTF-8"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "y"}',
            r"a\.jsonl, line 2 has no field 'text': set data\.text_field to 'txt'",
        ),
        ("a.jsonl", b'{"text": 3}', r"line 1 has a int in field 'text'"),
        ("a.jsonl", b'\n{"text": ', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", b"[1]", r"line 1 is no JSON object"),
        (
            "a.jsonl",
            rb'{"text": "\ud83d\ude00"}' + b"\n" + rb'{"text": "\ud83d hi"}',
            r"a\.jsonl, line 2 has half a surrogate pair in field 'text': mend or drop the record",
        ),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a parquet file"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, name, content, sentence):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        load_corpus(_files(tmp_path if name else tmp_path / "no-such-folder"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["footer", "page", "text"])
def test_a_damaged_parquet_file_is_one_sentence(tmp_path, place):
    path = tmp_path / "a.parquet"
    texts = ["naïve tea"] * 50
    if place == "text":
        parquet.write_table(pyarrow.table({"text": texts}), path, compression="none", use_dictionary=False)
        content = path.read_bytes().replace("ï".encode(), b"\xff\xff")
    else:
        parquet.write_table(pyarrow.table({"text": texts}), path)
        content = bytearray(path.read_bytes())
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # before its length and "PAR1"
        start, end = (footer, len(content) - 8) if place == "footer" else (4, 60)
        content[start:end] = b"\xff" * (end - start)
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"a\.parquet is not a parquet file that can be read \(.*mend or remove it"
    ) as e:
        load_corpus(_files(tmp_path))
    assert "\n" not in str(e.value)


def test_a_parquet_file_without_the_field_names_what_it_has(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no field 'text': set data\.text_field to 'body'"):
        load_corpus(_files(tmp_path))
    assert _texts(load_corpus(_files(tmp_path, text_field="body"))) == ["x"]


# Hub


def test_a_data_set_gives_its_train_split(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        (tmp_path / "set" / f"{split}.jsonl").write_text(json.dumps({"body": split}))
    corpus = load_corpus(DataConfig(source="hub", name=str(tmp_path / "set"), text_field="body"))
    assert _texts(corpus) == ["train"]
    with pytest.raises(UserError, match=r"no field 'text': set data\.text_field to 'body'"):
        load_corpus(DataConfig(source="hub", name=str(tmp_path / "set")))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("Config name is missing.\nPick one"), r"must say which configuration: write nobody/set:NAME"),
        (ValueError("There are multiple 'set' configurations in the cache: a, b"), r"must say which configuration"),
        (
            ValueError("Couldn't find cache for nobody/set for config 'a'"),
            "is neither in the hub's cache nor reachable",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported"),
            r"cannot be read \(Dataset scripts .*use data\.source",
        ),
        (DatasetGenerationError("unlike\ncolumns"), r"cannot be read \(unlike columns\)"),
    ],
)
def test_what_the_hubs_library_refuses_is_one_sentence(monkeypatch, error: Exception, sentence: str):
    def refuse(*_):
        raise error

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=f"'nobody/set' {sentence}") as said:
        load_corpus(DataConfig(source="hub", name="nobody/set"))
    assert "\n" not in str(said.value)


def test_no_way_to_the_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing' is neither in the hub's cache nor reachable") as error:
        load_corpus(DataConfig(source="hub", name="nobody/nothing"))
    assert "\n" not in str(error.value)


# Assets


def test_news_is_read_without_its_copies():
    corpus = load_corpus(DataConfig(name="news"))
    # 3,824 articles, 36 without text; the rest counted once with every pair of shingle sets.
    assert len(corpus.documents) == 3775
    assert corpus.licence.startswith("CC0")
    splits = split_documents(corpus, 0.05, 0.05)
    ids = {name: {document.id for document in documents} for name, documents in splits.items()}
    assert ids["train"].isdisjoint(ids["test"] | ids["validation"])
    assert ids["validation"].isdisjoint(ids["test"])
    assert sum(map(len, ids.values())) == len(corpus.documents)


@pytest.mark.parametrize(("name", "hint"), [("newz", "did you mean 'news'"), ("smollm2", "choose one of grimm, news")])
def test_an_asset_that_is_no_corpus_is_refused(name, hint):
    with pytest.raises(UserError, match=f"data.name '{name}' is no corpus.*{hint}"):
        load_corpus(DataConfig(name=name))


# Splits

_fraction = st.floats(0.01, 0.49)
_some_texts = st.sets(st.text(min_size=1), min_size=1, max_size=30).map(sorted)


@given(_some_texts, _some_texts, _fraction, _fraction)
def test_a_split_never_depends_on_other_documents(texts, others, validation, test):
    def split_by_text(corpus: Corpus) -> dict[str, str]:
        # Two documents that fill each split for certain, so that none is empty.
        ends = tuple(
            Document(f"{int(place * 2**64):016x}", f"at {place}") for place in (0, test + validation / 2, 0.99)
        )
        full = Corpus(corpus.name, corpus.key, corpus.licence, corpus.documents + ends)
        splits = split_documents(full, validation, test)
        return {document.text: name for name, documents in splits.items() for document in documents}

    alone, together = split_by_text(_of(*texts)), split_by_text(_of(*others, *texts))
    assert all(together[text] == alone[text] for text in texts)


def test_split_follows_the_number_that_the_hash_spells():
    quarter = 2**62
    assert split_of(f"{quarter - 2**20:016x}", 0.25, 0.25) == "test"
    assert split_of(f"{quarter:016x}", 0.25, 0.25) == "validation"
    assert split_of(f"{2 * quarter:016x}", 0.25, 0.25) == "train"
    assert split_of("f" * 16, 0.49, 0.49) == "train"


def test_splits_have_their_share_and_the_order_of_the_ids():
    splits = split_documents(_of(*map(str, range(20_000))), 0.1, 0.05)
    # Four standard deviations of a binomial count: 4 sqrt(n p (1 - p)) is 170 and 123.
    assert abs(len(splits["validation"]) - 2000) < 170
    assert abs(len(splits["test"]) - 1000) < 123
    for documents in splits.values():
        assert [document.id for document in documents] == sorted(document.id for document in documents)


@pytest.mark.parametrize("place, missing", [(0.9, "validation"), (0.02, "train")])
def test_an_empty_split_says_what_to_change(place, missing):
    corpus = Corpus("few", "key", "none", (Document(f"{int(place * 2**64):016x}", "x"), Document("0" * 16, "y")))
    with pytest.raises(UserError, match=f"the {missing} split of corpus 'few' \\(2 documents\\) is empty: .*give more"):
        split_documents(corpus, 0.05, 0.05)
