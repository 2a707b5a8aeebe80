"""The cache: atomic writes, locks, and noticing what changed on the disk."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from asnn_goose.cache import ALWAYS_HASHED_BYTES, cache_root, is_whole, locked, remembered_sha256, replacing, seal
from asnn_goose.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "a cache"))


def test_root_follows_the_environment_and_falls_back_to_the_home_folder(monkeypatch, tmp_path):
    assert cache_root() == tmp_path / "a cache"
    monkeypatch.delenv("ASNN_GOOSE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "asnn_goose"


def test_a_replaced_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    with replacing(path) as part:
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["file"]


def test_a_replaced_folder_drops_the_old_one_and_what_a_killed_process_left(tmp_path):
    folder = tmp_path / "folder"
    for stale in (folder / "old", tmp_path / ".folder.part" / "killed"):
        stale.parent.mkdir()
        stale.touch()
    with replacing(folder) as part:
        part.mkdir()
        (part / "new").touch()
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_sentence_and_the_old_file_stays():
    path = cache_root() / "file"
    with replacing(path) as part:
        part.write_text("old")
    with (
        pytest.raises(UserError, match=r"disk is full while writing .*file.*ASNN_GOOSE_CACHE"),
        replacing(path) as part,
    ):
        part.write_text("new")
        with open("/dev/full", "w") as full:
            full.write("x")
    assert path.read_text() == "old"
    assert os.listdir(cache_root()) == ["file"]


def test_a_cache_that_cannot_be_a_folder_is_one_sentence():
    cache_root().write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*ASNN_GOOSE_CACHE"), locked(cache_root() / "x"):
        pass


def test_a_cache_below_what_takes_no_folders_is_one_sentence_and_a_lost_file_is_none(tmp_path):
    told = pytest.raises(UserError, match=r"^cannot write /proc/nope/.*: choose a folder you may write to$")
    with told, locked(Path("/proc/nope/cache/x")):
        pass
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x"):
        (tmp_path / "lost").read_bytes()


def test_a_lock_admits_one_at_a_time(tmp_path):
    inside, most, guard = 0, 0, threading.Lock()

    def work():
        nonlocal inside, most
        with locked(tmp_path / "thing"):
            with guard:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.02)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


@pytest.mark.parametrize("size", [10, ALWAYS_HASHED_BYTES + 1])
def test_digest_is_sha256_and_follows_a_change_of_content(tmp_path, size):
    path = tmp_path / "file"
    for byte in (b"a", b"b"):
        path.write_bytes(byte * size)
        for _ in range(2):
            assert remembered_sha256(path) == hashlib.sha256(byte * size).hexdigest()


def test_digest_of_a_large_file_is_remembered_in_the_cache_alone(tmp_path):
    path = tmp_path / "user" / "file"
    path.parent.mkdir()
    path.write_bytes(bytes(ALWAYS_HASHED_BYTES + 1))
    first = remembered_sha256(path)
    status = path.stat()
    with open(path, "r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert remembered_sha256(path) == first  # not read again: neither size nor modification time moved
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert remembered_sha256(path) != first
    assert os.listdir(path.parent) == ["file"]


def _sealed(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "b").write_text("bb")
    (folder / "a").write_text("a")
    seal(folder, wheel="x==1")
    return folder


def test_a_sealed_folder_is_whole(tmp_path):
    assert is_whole(_sealed(tmp_path / "f"))
    assert not is_whole(tmp_path / "absent")


def test_a_folder_sealed_with_other_facts_is_not_what_is_asked_for(tmp_path, caplog):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("a")
    seal(folder, wheel="tiny==1.0")
    assert is_whole(folder, wheel="tiny==1.0") and is_whole(folder)
    with caplog.at_level("INFO"):
        assert not is_whole(folder, wheel="tiny==1.1")
    assert "comes from another source" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
def test_damage_is_noticed(tmp_path, damage):
    folder = _sealed(tmp_path / "f")
    victim = folder / "inner" / "b"
    if damage == "flip":
        victim.write_text("bc")
    elif damage == "truncate":
        victim.write_text("b")
    elif damage == "remove":
        victim.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").unlink()
    assert not is_whole(folder)
