"""Weights & Biases: really there when offline, and never in the way."""

import logging
import os
import sys
import time

import pytest

from asnn_goose.train.tracking import Tracker


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_offline_writes_a_folder_below_the_run_and_nothing_on_the_terminal(tmp_path, caplog, capfd):
    tracker = Tracker("auto", tmp_path, "v11_1", "20261122", {"train": {"lr": 0.1}})
    tracker.log(1, {"loss_total": 3.0})
    tracker.log(1, {"val_ppl": 9.0})
    tracker.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    words = {b"asnn-goose", b"v11_1-20261122", b"loss_total", b"val_ppl"}
    deadline = time.monotonic() + 300.0  # its service writes the last of it after finish has returned
    while missing := {word for word in words if word not in record.read_bytes()}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.05)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_off_writes_nothing_and_does_not_even_import(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Tracker("off", tmp_path, "v11_1", "1", {})
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("offline", tmp_path, "v11_1", "1", {})
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": 1.0})
        tracker.finish()
    (record,) = caplog.records
    assert "the run goes on with its own files" in record.getMessage()


def test_a_run_goes_on_where_it_cannot_write(tmp_path, caplog):
    """A file stands where its folder should be; W&B may find a place of its own or give up, and raises nothing here."""
    place = tmp_path / "run"
    place.write_text("")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("offline", place, "v11_1", "1", {})
        tracker.log(1, {"loss": 1.0})
        tracker.finish()
    assert len(caplog.records) <= 1 and place.read_text() == ""
