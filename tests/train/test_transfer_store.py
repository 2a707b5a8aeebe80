"""The store of first stages: computed once, made anew when damaged, apart for whatever another start depends on."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asnn_goose.config.schema import StudentConfig, TrainConfig
from asnn_goose.models import GooseForCausalLM, build_student
from asnn_goose.train.engine import Engine
from asnn_goose.train.setting import prepare
from asnn_goose.train.transfer import Errors, transfer_mixers
from asnn_goose.train.transfer_store import Transferred, transferred

LAYERS = (1, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "a cache"))
    return tmp_path / "a cache"


def _engine(precision: str = "float32") -> Engine:
    return Engine(TrainConfig.model_validate({"scale": "smoke", "tokens": 1, "device": "cpu", "precision": precision}))


def _windows(seed: int = 0, *shape: int) -> Tensor:
    return torch.randint(257, shape or (6, 16), generator=torch.Generator().manual_seed(seed))


def _settings(**keys) -> StudentConfig:
    base = {"layers": 2, "head_size": 8, "init": "layers", "transfer": {"tokens": 96}}
    return StudentConfig.model_validate(base | keys)


@dataclass
class Stage:
    """Takes new students of one teacher through the stage; ``passes`` counts the batches that were computed."""

    make_teacher: Callable
    passes: list[int] = field(default_factory=list)

    def start(self, settings: StudentConfig, seed: int = 0) -> GooseForCausalLM:
        torch.manual_seed(seed)
        return build_student(settings, self.make_teacher(), _windows(), layers=LAYERS)

    def watch(self, batches: Iterable[Tensor]) -> Iterable[Tensor]:
        for ids_BL in batches:
            self.passes.append(len(ids_BL))
            yield ids_BL

    def __call__(
        self, windows_NL: Tensor | None = None, seed: int = 0, layers=LAYERS, fingerprint="fingerprint",
        precision: str = "float32", dtype=torch.float32, **keys,
    ) -> tuple[dict[str, Tensor], Transferred]:  # fmt: skip
        """(the student's weights, the record)."""
        teacher, settings = self.make_teacher(), _settings(**keys)
        teacher.fingerprint = fingerprint
        teacher.model.to(dtype)
        student = self.start(settings, seed)
        record = transferred(
            student, teacher, layers, _windows() if windows_NL is None else windows_NL, settings, seed,
            _engine(precision), self.watch,
        )  # fmt: skip
        return student.state_dict(), record


@pytest.fixture
def stage(make_teacher) -> Stage:
    return Stage(make_teacher)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _entries(cache: Path) -> list[Path]:
    return sorted((cache / "transfers").glob("[!.]*"))


def test_the_stage_is_computed_once_and_leaves_what_computing_leaves(stage, cache):
    weights, record = stage()
    assert stage.passes == [2, 2, 2]
    again, read = stage()
    assert stage.passes == [2, 2, 2] and read == record and _same(again, weights)
    settings = _settings()
    student = stage.start(settings)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert settings.transfer is not None
    errors = transfer_mixers(student, stage.make_teacher(), LAYERS, _windows().split(2), settings.transfer, _engine())
    assert _same(student.state_dict(), weights) and (record.first, record.last) == errors
    assert not _same(before, weights)
    assert len(_entries(cache)) == 1


@pytest.mark.parametrize("neuron", ["fixed", "channel"])
def test_thresholds_that_train_and_thresholds_that_do_not_come_back(stage, neuron):
    keys = {"neuron": {"learn_threshold": neuron}}
    weights, _ = stage(**keys)
    assert _same(stage(**keys)[0], weights)
    assert any(name.endswith("neuron.log_threshold") for name in weights)


def test_the_record_holds_what_was_done(stage):
    began = time.monotonic()
    _, record = stage()
    assert record.tokens == 6 * 16
    assert 0.0 < record.seconds <= time.monotonic() - began
    for errors in (record.first, record.last):
        assert len(errors.time_mix) == len(errors.channel_mix) == 2


OTHERS = {
    "another seed": {"seed": 1},
    "other windows": {"windows_NL": _windows(seed=1)},
    "one window more": {"windows_NL": torch.cat([_windows(), _windows(seed=1)[:1]])},
    "the same tokens in longer windows": {"windows_NL": _windows().view(3, 32)},
    "another order": {"windows_NL": _windows().flip(0)},
    "another learning rate": {"transfer": {"tokens": 96, "lr": 1e-3}},
    "another batch": {"transfer": {"tokens": 96, "batch_size": 3}},
    "another neuron": {"neuron": {"offset": 0.5}},
    "another smoothing": {"smoothing": 0.5},
    "other layers": {"layers": (2, 1)},
    "another teacher": {"fingerprint": "another"},
    "another precision": {"precision": "bfloat16"},
    "the teacher in another dtype": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_start_is_another_entry(stage, cache, what):
    stage()
    stage.passes.clear()
    other = dict(OTHERS[what])
    weights, _ = stage(**other)
    assert stage.passes and len(_entries(cache)) == 2
    stage.passes.clear()
    assert _same(stage(**other)[0], weights) and not stage.passes


@pytest.mark.parametrize("damage", ["a byte", "a cut", "a missing file", "a missing manifest", "another record"])
def test_a_damaged_entry_is_made_anew(stage, cache, damage, caplog):
    weights, record = stage()
    (folder,) = _entries(cache)
    path = folder / "student.safetensors"
    content = path.read_bytes()
    if damage == "a byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "a cut":
        path.write_bytes(content[:-7])
    elif damage == "another record":
        (folder / "stage.json").write_text((folder / "stage.json").read_text().replace('"tokens": 96', '"tokens": 97'))
    else:
        (path if damage == "a missing file" else folder / "manifest.json").unlink()
    again, found = stage()
    assert stage.passes == [2] * 6 and "will be made anew" in caplog.text
    assert _same(again, weights) and (found.tokens, found.first, found.last) == (96, record.first, record.last)
    assert path.read_bytes() == content
    stage()
    assert stage.passes == [2] * 6


def test_a_stage_that_is_stopped_leaves_nothing_behind(stage, cache):
    def stopped(batches):
        yield batches[0]
        raise KeyboardInterrupt

    student, settings = stage.start(_settings()), _settings()
    with pytest.raises(KeyboardInterrupt):
        transferred(student, stage.make_teacher(), LAYERS, _windows(), settings, 0, _engine(), stopped)
    assert _entries(cache) == []
    stage()
    assert stage.passes == [2, 2, 2]


def test_the_sentence_has_the_means_of_both_errors():
    first, last = Errors([2.0, 1.0], [0.25, 0.75]), Errors([0.123456, 0.323456], [0.0125, 0.0135])
    assert Transferred(32_768, 61.6, first, last).sentence() == (
        "Before training, each mixer was matched to the teacher's on the teacher's inputs over 32,768 tokens (62 s, "
        "once): mean relative squared error of the time mixes 1.5 on the first batch and 0.223 on the last, of the "
        "channel mixes 0.5 and 0.013."
    )


RUN = {"student__init": "layers", "student__head_size": 8, "student__transfer__tokens": 64}


@pytest.mark.parametrize("before", [{"train__steps": 2}, {"student__fit_tokens": 32}], ids=str)
def test_a_runs_start_does_not_depend_on_the_runs_before_it(tiny_experiment, monkeypatch, tmp_path, before):
    """Another length, or text to fit on, gives the channels other sizes: 64 or 32 tokens instead of 128."""
    starts = []
    for name, runs in (("empty", [{}]), ("used", [before, {}])):
        for changes in runs:
            experiment = tiny_experiment(**RUN | changes)
            monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / name))
            student = prepare(experiment).module.student
        starts.append(student.state_dict())
    assert _same(*starts)


def test_preparing_again_reads_the_stage(tiny_experiment, monkeypatch, cache):
    experiment = tiny_experiment(**RUN)
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(cache))
    first, again = prepare(experiment), prepare(experiment)
    assert _same(first.module.student.state_dict(), again.module.student.state_dict())
    assert first.transfer == again.transfer and first.transfer is not None and first.transfer.tokens == 64
    assert len(_entries(cache)) == 1
