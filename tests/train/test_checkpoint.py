"""What a checkpoint brings back, and what it refuses. That a resumed run is exact is tested with the loop."""

import random
import re

import numpy as np
import pytest
import torch

from asnn_goose.errors import UserError
from asnn_goose.train import checkpoint
from asnn_goose.train.checkpoint import NAME
from asnn_goose.train.measure import final_temperature


@pytest.fixture
def finished(start, tiny_experiment):
    return start(tiny_experiment()).train()


def save(session, fingerprint: str | None = None):
    setting = session.setting
    return checkpoint.save(
        session.folder.checkpoints,
        setting.module,
        setting.optimisers.present(),
        setting.parts(),
        session.progress,
        fingerprint or setting.fingerprint,
    )


def load(session, fingerprint: str | None = None):
    setting = session.setting
    return checkpoint.load(
        session.folder.checkpoints,
        setting.module,
        setting.optimisers.present(),
        setting.parts(),
        fingerprint or setting.fingerprint,
    )


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def test_random_states_and_counters_come_back(finished):
    finished.progress.train_seconds = 12.5
    seed(5)
    save(finished)
    expected = random.random(), np.random.rand(), torch.rand(3)
    seed(0)
    progress = load(finished)
    assert progress == finished.progress and progress.tokens == 4 * 2 * 16
    found = random.random(), np.random.rand(), torch.rand(3)
    assert found[:2] == expected[:2] and torch.equal(found[2], expected[2])


def test_only_what_trains_is_in_the_file(finished):
    content = torch.load(finished.folder.checkpoints / NAME, weights_only=False)
    trains = {name for name, p in finished.setting.module.named_parameters() if p.requires_grad}
    assert set(content["parameters"]) == trains
    assert "temperature.raw" in trains and not any("embeddings" in name for name in trains)


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_the_last_steps_temperature_comes_back_where_it_is_read_from_the_states(start, go_on, tiny_experiment, scope):
    moving = {"lambda_start": 0.0, "init": 3.0, "lr": 5.0, "scope": scope}
    experiment = tiny_experiment(**{f"distillation__temperature__{key}": value for key, value in moving.items()})
    session = start(experiment).train()
    last = final_temperature(session.setting, session.progress)
    assert abs(last - 3.0) > 1e-3
    again = go_on(experiment, session.folder.path).train()
    assert final_temperature(again.setting, again.progress) == last
    # A file from before it was kept.
    path = session.folder.checkpoints / NAME
    content = torch.load(path, weights_only=False)
    del content["parameters"]["temperature.recent"]
    torch.save(content, path)
    assert go_on(experiment, session.folder.path).train().progress.step == 4


def test_the_file_of_a_frozen_embedding_does_not_hold_the_teachers(start, tiny_experiment):
    frozen, trained = (
        start(tiny_experiment(train__steps=1, train__embeddings=e)).train() for e in ("frozen", "trained")
    )
    sizes = [(session.folder.checkpoints / NAME).stat().st_size for session in (frozen, trained)]
    table = frozen.setting.teacher.vocab_size * frozen.setting.teacher.hidden_size * 4
    # Weights and AdamW's two moments.
    assert sizes[1] - sizes[0] > 2.9 * table


def test_no_checkpoint_is_one_sentence(start, tiny_experiment):
    session = start(tiny_experiment())
    way_out = rf"remove {re.escape(str(session.folder.path))} and start it again without --resume$"
    with pytest.raises(UserError, match=rf"last\.pt does not exist: .*; {way_out}"):
        load(session)


def test_a_checkpoint_of_code_with_other_parameters_is_one_sentence(finished):
    path = finished.folder.checkpoints / NAME
    content = torch.load(path, weights_only=False)
    name = next(iter(content["parameters"]))
    value = content["parameters"].pop(name)
    for renamed in ({}, {"student.renamed": value}):
        torch.save(content | {"parameters": content["parameters"] | renamed}, path)
        with pytest.raises(
            UserError, match=r"parameters have other names \(first: student\..*commit in provenance\.json"
        ):
            load(finished)


@pytest.mark.parametrize("content", [[1], {"fingerprint": "x"}], ids=["a list", "one key"])
def test_a_file_that_is_no_checkpoint_is_one_sentence(finished, content):
    torch.save(content, finished.folder.checkpoints / NAME)
    with pytest.raises(UserError, match=r"last\.pt holds no checkpoint: start .*, in another folder$"):
        load(finished)


@pytest.mark.parametrize("size", [0, 1000, -100])
def test_a_torn_checkpoint_is_one_sentence(finished, size):
    path = finished.folder.checkpoints / NAME
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"last\.pt cannot be read \(\w+\): start the run again") as error:
        load(finished)
    assert "\n" not in str(error.value)


def test_another_fingerprint_is_refused_and_nothing_is_loaded(finished):
    save(finished, "0123abcd" * 8)
    weight = finished.setting.module.student.model.norm.get_parameter("weight")
    with torch.no_grad():
        weight.fill_(7.0)
    with pytest.raises(UserError, match=r"belongs to a run with fingerprint 0123abcd, and this configuration has"):
        load(finished)
    assert bool((weight == 7.0).all())


def test_other_text_is_another_run(start, go_on, tiny_experiment, tiny_text, tmp_path):
    """The folder has the same name, and one word in it has changed."""
    text = tmp_path / "text"
    text.mkdir()
    for path in tiny_text.iterdir():
        (text / path.name).write_bytes(path.read_bytes())
    experiment = tiny_experiment(data__path=text)
    session = start(experiment).train()
    assert go_on(experiment, session.folder.path).progress.step == 4
    (text / "000.txt").write_text((text / "000.txt").read_text() + "One more sentence.\n")
    with pytest.raises(UserError, match="fingerprint"):
        go_on(experiment, session.folder.path)


@pytest.mark.parametrize("room", [0, 5_000, 100_000])
def test_a_full_disk_keeps_the_former_checkpoint(finished, disk_with_room_for, room):
    path = finished.folder.checkpoints / NAME
    before = path.read_bytes()
    assert len(before) > 100_000
    finished.progress.step = 99
    with disk_with_room_for(room), pytest.raises(UserError, match=r"disk is full .*last\.pt.* --resume"):
        save(finished)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    assert load(finished).step == 4
