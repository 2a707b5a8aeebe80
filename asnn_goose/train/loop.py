"""The training loop: steps, log lines, looks at validation, checkpoints, and what Ctrl-C does."""

import logging
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from asnn_goose.data.loader import EvaluationSet
from asnn_goose.evaluation.perplexity import Comparison, compare
from asnn_goose.reporting import RunFolder
from asnn_goose.train import checkpoint
from asnn_goose.train.checkpoint import Progress
from asnn_goose.train.optimisers import clip, set_learning_rates
from asnn_goose.train.setting import Setting
from asnn_goose.train.step import accumulate_gradients
from asnn_goose.train.tracking import Tracker

_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Ctrl-C was pressed; the checkpoint is written."""


@dataclass
class Recorder:
    """Where a run's lines go; only the main process has a folder."""

    folder: RunFolder | None
    tracker: Tracker

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.folder is not None:
            self.folder.log(step, **values)
            self.tracker.log(step, values)


def watch(items: Iterable, what: str) -> Iterable:
    """A progress bar over ``items`` that vanishes when it is full."""
    return tqdm(items, desc=what, unit="batch", leave=False, dynamic_ncols=True)


def evaluate(setting: Setting, split: EvaluationSet, teacher_states: list[Tensor], what: str) -> Comparison:
    """Student against teacher on a fixed set, in eval mode and at temperature 1: free of any schedule."""
    module = setting.module
    module.eval()
    try:
        with torch.no_grad(), autocast(setting):
            head_VE = module.head_VC()
            return compare(
                lambda ids: module.states(ids), head_VE, list(watch_states(teacher_states, what)),
                setting.teacher.head_VE, split.batches,
            )  # fmt: skip
    finally:
        module.train()


def watch_states(states: list[Tensor], what: str) -> Iterator[Tensor]:
    yield from watch(states, what)


def autocast(setting: Setting):
    """The dtype of the student's products, outside the engine's own forward."""
    return torch.autocast(setting.engine.device_type, torch.bfloat16, enabled=setting.engine.precision == "bfloat16")


@contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """Within it the first Ctrl-C only sets a flag, so that a step is never torn; a second one ends at once."""
    asked = [False]

    def ask(_signal, _frame):
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = True

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread, where a signal cannot arrive
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def train(setting: Setting, recorder: Recorder, progress: Progress) -> Progress:
    """Go from ``progress`` to the last step.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was written first.
    """
    config, engine = setting.experiment.train, setting.engine
    total = setting.context.total_steps
    module, optimisers = setting.module, setting.optimisers
    started, session = progress.wall_seconds, time.monotonic()
    validation = setting.teacher_states(setting.text.validation, lambda items: watch(items, "teacher, validation"))
    bar = tqdm(
        total=total, initial=progress.step, desc=setting.experiment.version, unit="step",
        dynamic_ncols=True, disable=engine.rank != 0,
    )  # fmt: skip
    shown: dict[str, str] = {}

    def save() -> None:
        progress.wall_seconds = started + time.monotonic() - session
        if recorder.folder is not None:
            checkpoint.save(
                recorder.folder.checkpoints,
                module,
                optimisers.present(),
                setting.windows,
                progress,
                setting.fingerprint,
            )

    def look() -> None:
        if engine.rank == 0:
            seen = evaluate(setting, setting.text.validation, validation, "validation")
            shown["val_ppl"] = f"{seen.student_ppl:.1f}"
            recorder.log(
                progress.step,
                {
                    "val_ppl": seen.student_ppl,
                    "val_ce": float(seen.student_nll_W.sum()) / seen.tokens,
                    "val_kl": seen.kl_to_teacher,
                    "val_top1": seen.top1_agreement,
                },
            )
        engine.barrier()

    with stop_on_interrupt() as asked, bar:
        if progress.step == 0:
            look()
        module.train()
        while progress.step < total:
            begun = time.monotonic()
            lr = set_learning_rates(optimisers.student, config, progress.step, total)
            batches = [next(setting.windows) for _ in range(config.accumulate)]
            metrics = accumulate_gradients(setting.context, batches, progress.step)
            metrics["grad_norm"] = clip(module, config, setting.experiment.distillation.temperature)
            for optimiser in optimisers.present():
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            tokens = int(engine.sum(float(sum(batch.input_ids.numel() for batch in batches))))
            progress.step += 1
            progress.tokens += tokens
            seconds = time.monotonic() - begun
            progress.train_seconds += seconds
            shown["tok/s"] = f"{tokens / seconds:.0f}"
            bar.set_postfix(shown)
            bar.update()
            if progress.step % config.log_every == 0 or progress.step == total:
                extra = {"lr": lr, "tokens": progress.tokens, "tokens_per_second": tokens / seconds}
                recorder.log(progress.step, metrics | extra)
            if progress.step % config.eval_every == 0 and progress.step < total:
                look()
            if progress.step % config.checkpoint_every == 0 or progress.step == total:
                save()
            if asked[0] and progress.step < total:
                save()
                raise Interrupted
        look()
    progress.wall_seconds = started + time.monotonic() - session
    return progress
