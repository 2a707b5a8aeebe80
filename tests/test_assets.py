"""Assets: wheels of a local index, with pip as it is; the default corpus from the shared cache."""

import csv
import hashlib
import io
import logging
import os
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from asnn_goose.assets import ASSETS, Asset, cache_root, fetch, fetch_asset
from asnn_goose.errors import UserError

FILES = {"tiny_text/data/one.txt": b"first\n" * 1000, "tiny_text/data/deep/two.txt": b"second\n", "tiny_text/c.py": b""}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels as pip's one source, and an empty cache, both with a space in the path."""
    folder = tmp_path / "the index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "the cache"))
    return folder


def _wheel(index: Path) -> Path:
    path = index / "tiny_text-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        archive.writestr("tiny_text-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-text\nVersion: 1.0\n")
        archive.writestr(
            "tiny_text-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_text-1.0.dist-info/RECORD", "")
    return path


def _asset(wheel: Path, *members: str) -> Asset:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Asset("tiny", "corpus", "tiny-text==1.0", digest, 1, members, "CC0-1.0", "a few words")


def test_a_file_is_fetched_once_and_the_wheel_is_not_kept(index, caplog):
    wheel = _wheel(index)
    asset = _asset(wheel, "tiny_text/data/one.txt")
    with caplog.at_level(logging.INFO):
        path = fetch_asset(asset)
    assert path.read_bytes() == FILES["tiny_text/data/one.txt"]
    assert path.is_relative_to(cache_root())
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO] == [
        "fetching tiny: a few words (tiny-text==1.0, 1 MB, licence CC0-1.0)"
    ]
    wheel.unlink()  # from here on there is nothing to fetch from
    assert fetch_asset(asset) == path
    kept = {p.name for p in cache_root().rglob("*") if p.is_file() and not p.name.endswith(".lock")}
    assert kept == {"one.txt", "manifest.json"}


def test_a_folder_and_several_members_keep_their_names(index):
    wheel = _wheel(index)
    folder = fetch_asset(_asset(wheel, "tiny_text/data/"))
    assert folder.name == "data"
    assert (folder / "deep" / "two.txt").read_bytes() == b"second\n"
    both = fetch_asset(replace(_asset(wheel, "tiny_text/data/one.txt", "tiny_text/data/deep/two.txt"), name="both"))
    assert {p.name for p in both.iterdir()} == {"one.txt", "two.txt", "manifest.json"}


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_corrupted_download_names_the_file_and_both_hashes_and_leaves_nothing(index, damage):
    wheel = _wheel(index)
    asset = _asset(wheel, "tiny_text/data/one.txt")
    content = bytearray(wheel.read_bytes())
    content[60] ^= 1
    wheel.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(UserError) as error:
        fetch_asset(asset)
    for part in ("tiny-text==1.0", asset.sha256, found):
        assert part in str(error.value)
    assert [p for p in cache_root().rglob("*") if not p.name.endswith(".lock") and p.is_file()] == []


def test_no_network_and_nothing_cached_is_one_sentence(index, caplog):
    asset = _asset(_wheel(index), "tiny_text/data/one.txt")
    (index / "tiny_text-1.0-py3-none-any.whl").unlink()
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(UserError, match=r"'tiny' is not in the cache .*PIP_INDEX_URL") as error,
    ):
        fetch_asset(asset)
    assert "\n" not in str(error.value)
    assert "ERROR" not in caplog.text  # what pip says is told at debug level


def test_a_file_that_changed_in_the_cache_is_fetched_anew(index, caplog):
    asset = _asset(_wheel(index), "tiny_text/data/one.txt")
    path = fetch_asset(asset)
    path.write_bytes(path.read_bytes().replace(b"first", b"fiRst", 1))
    assert fetch_asset(asset).read_bytes() == FILES["tiny_text/data/one.txt"]
    assert "one.txt in the cache is damaged" in caplog.text


def test_two_at_once_fetch_once(index, caplog):
    asset = _asset(_wheel(index), "tiny_text/data/one.txt")
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch_asset(asset))) for _ in range(2)]
    with caplog.at_level(logging.INFO):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(paths) == 2
    assert caplog.text.count("fetching tiny") == 1


def test_an_unknown_name_gets_the_nearest_spelling():
    with pytest.raises(UserError, match="no asset 'smolm2': did you mean 'smollm2'"):
        fetch("smolm2")


def test_news_has_its_articles():
    with zipfile.ZipFile(fetch("news")) as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("NewsArticles.csv").decode("utf-8"), newline="")))
    assert len(rows) == 3824
    assert "3,824" in ASSETS["news"].what
