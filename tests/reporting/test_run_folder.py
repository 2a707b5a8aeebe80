import json

import numpy as np
import pytest

from asnn_goose.config.load import load_dump
from asnn_goose.errors import UserError
from asnn_goose.reporting import RunFolder, collect_provenance, load_result, read_metrics
from asnn_goose.reporting.run_folder import replacing, write_text


@pytest.fixture
def folder(make_experiment, tmp_path):
    return create(make_experiment(), tmp_path / "runs")


def create(experiment, root, path=None):
    from asnn_goose.config.load import dump

    provenance = collect_provenance(experiment, "0123abcd" * 8, argv=["x.py"], overrides={})
    return RunFolder.create(root, experiment, dump(experiment), provenance, path)


def test_a_new_folder_holds_configuration_and_provenance(folder, make_experiment, tmp_path):
    assert folder.path == tmp_path / "runs" / "child" / folder.run_id
    assert load_dump(folder.config.read_text()) == make_experiment()
    assert json.loads((folder.path / "provenance.json").read_text())["argv"] == ["x.py"]
    assert folder.checkpoints.is_dir()
    assert RunFolder.open(folder.path).provenance == folder.provenance


def test_two_runs_of_one_second_get_two_folders(make_experiment, tmp_path):
    experiment = make_experiment()
    provenance = collect_provenance(experiment, "0123abcd" * 8, argv=[], overrides={})
    first, second = (RunFolder.create(tmp_path, experiment, "", provenance) for _ in range(2))
    assert second.path == first.path.with_name(f"{first.run_id}-2")
    assert RunFolder.open(second.path).run_id == second.path.name


def test_run_dir_may_exist_but_must_not_hold_a_run(make_experiment, tmp_path):
    (tmp_path / "mine").mkdir()
    assert create(make_experiment(), tmp_path, tmp_path / "mine").path == tmp_path / "mine"
    with pytest.raises(UserError, match="--resume"):
        create(make_experiment(), tmp_path, tmp_path / "mine")


def test_opening_something_else_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no run \(provenance\.json is missing\): name a run's folder"):
        RunFolder.open(tmp_path)
    (tmp_path / "provenance.json").mkdir()
    with pytest.raises(UserError, match=r"provenance\.json cannot be read \(Is a directory\): mend or remove it"):
        RunFolder.open(tmp_path)


def test_unwritable_place(make_experiment, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--run-dir"):
        create(make_experiment(), tmp_path / "file")


def test_replacing_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "result.json"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path, disk_with_room_for):
    path = tmp_path / "result.json"
    write_text(path, "old")
    with disk_with_room_for(100), pytest.raises(UserError, match="disk is full"):
        write_text(path, "new" * 1000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_loses_no_line_and_leaves_no_half_one(folder, disk_with_room_for):
    folder.log(1, loss_total=5.0)
    room = folder.metrics.stat().st_size + 10
    with disk_with_room_for(room), pytest.raises(UserError, match=r"disk is full .* --resume"):
        folder.log(2, loss_total=4.0)
    folder.log(3, loss_total=3.0)
    assert [line["step"] for line in read_metrics(folder.metrics)] == [1, 3]


def test_resume_equals_a_run_that_was_never_interrupted(make_experiment, tmp_path):
    def train(folder, steps):
        for step in steps:
            folder.log(step, loss_total=1 / step, grad_norm=float("nan") if step == 2 else 1.0)

    straight = create(make_experiment(), tmp_path / "a")
    train(straight, range(1, 9))
    broken = create(make_experiment(), tmp_path / "b")
    train(broken, range(1, 7))
    with broken.metrics.open("a") as file:
        file.write('{"step": 7, "loss_to')
    again = RunFolder.open(broken.path)
    again.resume(4)
    train(again, range(5, 9))
    assert again.metrics.read_bytes() == straight.metrics.read_bytes()
    assert [session.step for session in RunFolder.open(broken.path).provenance.resumed] == [4]


def test_what_a_process_killed_while_it_wrote_has_left_is_removed(folder):
    for part in (folder.path / ".metrics.jsonl.7.tmp", folder.checkpoints / ".last.pt.7.tmp"):
        part.write_text("half")
    with folder.claimed():
        assert not [*folder.path.rglob("*.tmp")]


def test_resume_before_the_first_line(folder):
    folder.resume(0)
    assert read_metrics(folder.metrics) == []


def test_result_round_trip(folder, make_result):
    result = make_result()
    assert load_result(folder.write_result(result)) == result


def test_a_non_finite_result_leaves_the_old_one(folder, make_result):
    folder.write_result(make_result())
    with pytest.raises(UserError, match=r"kl_to_teacher is nan"):
        folder.write_result(make_result({"kl_to_teacher": float("nan")}))
    assert load_result(folder.result) == make_result()


def test_raster_round_trip(folder):
    spikes = np.array([[1, 0], [-1, 1], [0, 0], [1, -1]])
    raster = folder.write_raster(3, "key", ["é", " $"], spikes)
    with np.load(folder.path / raster.file) as arrays:
        assert arrays["tokens"].tolist() == ["é", " $"]
        assert arrays["spikes"].dtype == np.int8 and (arrays["spikes"] == spikes).all()
    assert (raster.layer, raster.site) == (3, "key")
