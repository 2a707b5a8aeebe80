"""Runs of the tiny teacher in memory."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from asnn_goose.config import Experiment, dump
from asnn_goose.data.loader import Batch
from asnn_goose.evaluation.perplexity import Comparison
from asnn_goose.reporting import RunFolder, collect_provenance
from asnn_goose.train import checkpoint
from asnn_goose.train.checkpoint import Progress
from asnn_goose.train.loop import Recorder, train
from asnn_goose.train.setting import Setting, prepare
from asnn_goose.train.tracking import Tracker


@dataclass
class Session:
    """A run between two of its steps."""

    setting: Setting
    folder: RunFolder
    progress: Progress
    recorder: Recorder
    seen: Comparison | None = None
    """What the look after the last step saw."""
    random: torch.Tensor | None = None
    """Torch's random state after the last step."""

    def train(self) -> "Session":
        """Take the steps that are left."""
        self.seen = train(self.setting, self.recorder, self.progress)
        self.random = torch.get_rng_state()
        return self


def _no_tracker() -> Tracker:
    return Tracker("off", Path(), "", "", {})


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Session]:
    """A new run below ``tmp_path``; ``recorder`` may be a kind of Recorder of the test's own."""

    def started(experiment: Experiment, recorder: type[Recorder] = Recorder) -> Session:
        setting = prepare(experiment)
        provenance = collect_provenance(experiment, setting.fingerprint, argv=["x.py"], overrides={})
        folder = RunFolder.create(tmp_path / "runs", experiment, dump(experiment), provenance)
        return Session(setting, folder, Progress(), recorder(folder, _no_tracker()))

    return started


@pytest.fixture
def go_on() -> Callable[..., Session]:
    """The run in a folder, taken up by parts that are all built anew."""

    def gone_on(experiment: Experiment, path: Path) -> Session:
        setting, folder = prepare(experiment), RunFolder.open(path)
        progress = checkpoint.load(
            folder.checkpoints, setting.module, setting.optimisers.present(), setting.parts(), setting.fingerprint
        )
        folder.resume(progress.step)
        return Session(setting, folder, progress, Recorder(folder, _no_tracker()))

    return gone_on


@pytest.fixture
def stopping_at() -> Callable[[int], type[Recorder]]:
    """Kinds of recorder beside which Ctrl-C is pressed, a real signal, while a step is logged."""

    def stopping(step: int) -> type[Recorder]:
        class Stopping(Recorder):
            def log(self, at: int, values: dict[str, float]) -> None:
                super().log(at, values)
                if at == step and "lr" in values:
                    signal.raise_signal(signal.SIGINT)

        return Stopping

    return stopping


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[float]]:
    """Makes up the validation cross-entropies of the looks to come, one each; returns those that are left."""

    def made_up(*values: float) -> Iterator[float]:
        left = iter(values)

        def evaluate(*_):
            nll = torch.tensor([next(left)])
            return SimpleNamespace(
                student_nll_W=nll, tokens=1, student_ppl=nll.exp().item(), kl_to_teacher=0.0, top1_agreement=0.0
            )

        monkeypatch.setattr("asnn_goose.train.loop.evaluate", evaluate)
        return left

    return made_up


DENSE = {"student__neuron__kind": "dense", "student__hidden_neuron__kind": "dense"}
LENGTHS = (16, 9, 2, 13)
"""Real tokens of the four ragged windows."""


@pytest.fixture
def moved(tiny_experiment) -> Callable[..., Setting]:
    """A setting whose student has left its start, where most gradients are 0, for a fixed point of its own.

    Its neurons are dense: a product of other shape rounds otherwise, and a spike that flips on it would hide what is
    compared.
    """

    def built(version: str = "v11_1", **changes) -> Setting:
        setting = prepare(tiny_experiment(version, **(DENSE | changes)))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in setting.module.student.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        return setting

    return built


@pytest.fixture
def ragged() -> Callable[[Setting], Batch]:
    """Four windows of training text, cut to LENGTHS and padded."""

    def cut(setting: Setting) -> Batch:
        windows = setting.text.shards["train"].tokens[: 4 * 16].reshape(4, 16)
        ids_BL = torch.tensor(windows.astype("int64"))
        mask_BL = torch.arange(16)[None] < torch.tensor(LENGTHS)[:, None]
        return Batch(ids_BL.where(mask_BL, 0), mask_BL)

    return cut
