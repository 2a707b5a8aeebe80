"""The training loop: steps, log lines, looks at validation, checkpoints, and what Ctrl-C does."""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from asnn_goose.data.loader import EvaluationSet
from asnn_goose.errors import UserError
from asnn_goose.evaluation.perplexity import Comparison, compare
from asnn_goose.reporting import RunFolder
from asnn_goose.train import checkpoint
from asnn_goose.train.checkpoint import Progress
from asnn_goose.train.optimisers import clip, set_learning_rates
from asnn_goose.train.progress import watch
from asnn_goose.train.setting import Setting
from asnn_goose.train.step import accumulate_gradients
from asnn_goose.train.tracking import Tracker

_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Ctrl-C was pressed, and a checkpoint is there to go on from."""


@dataclass
class Recorder:
    """Where a run's lines go; only the main process has a folder."""

    folder: RunFolder | None
    tracker: Tracker

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.folder is not None:
            self.folder.log(step, **values)
            self.tracker.log(step, values)


def watch_teacher(setting: Setting, split: EvaluationSet, what: str) -> list[Tensor]:
    """The teacher's states on an evaluation set; says so where they have to be computed first."""

    def announce(items: Iterable) -> Iterable:
        _log.info("computing the teacher's states on %s text (once)", what)
        return watch(items, f"teacher, {what}")

    return setting.teacher_states(split, announce)


def evaluate(
    setting: Setting,
    split: EvaluationSet,
    teacher_states: list[Tensor],
    what: str,
    states: Callable[[Tensor], Tensor] | None = None,
) -> Comparison:
    """Student against teacher on a fixed set, in eval mode and at temperature 1: free of any schedule.

    ``states`` gives the student's states of each batch in turn, where they are known already.
    """
    module = setting.module
    module.eval()
    try:
        with torch.no_grad(), autocast(setting):
            head_VE = module.head_VC()
            batches = watch(split.batches, what)
            return compare(states or module.states, head_VE, teacher_states, setting.teacher.head_VE, batches)
    finally:
        module.train()


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
        _log.info("stopping after this step; Ctrl-C again stops at once")

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread, where a signal cannot arrive
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def line(step: int, total: int, metrics: Mapping[str, float], shown: Mapping[str, str], seconds_left: float) -> str:
    """One interval of training in one line of the log."""
    losses = {key[5:-4]: value for key, value in metrics.items() if key.startswith("loss_") and key.endswith("_raw")}
    parts = [f"step {step}/{total}"]
    parts += [f"loss {metrics['loss_total']:.4g}"] if losses else ["left out"]
    parts += [f"{name} {value:.4g}" for name, value in losses.items()]
    parts += [f"{name} {value}" for name, value in shown.items()]
    return "  ".join([*parts, f"ETA {tqdm.format_interval(seconds_left)}"])


def train(setting: Setting, recorder: Recorder, progress: Progress) -> Comparison | None:
    """Go from ``progress``, which counts on, to the last step; returns what the look after that step saw.

    None where there was no step left to take, and on processes other than the main one.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was written first.
        UserError: a loss or the gradient is no longer finite; weights and checkpoints are as they were.
    """
    config, engine = setting.experiment.train, setting.engine
    total = setting.context.total_steps
    module, optimisers = setting.module, setting.optimisers
    started, session = progress.wall_seconds, time.monotonic()
    validation = watch_teacher(setting, setting.text.validation, "validation")
    shown: dict[str, str] = {}
    seen = None

    def save() -> None:
        progress.wall_seconds = started + time.monotonic() - session
        if recorder.folder is not None:
            checkpoint.save(
                recorder.folder.checkpoints,
                module,
                optimisers.present(),
                setting.windows,
                setting.context.balancer,
                progress,
                setting.fingerprint,
            )

    def look() -> Comparison | None:
        seen = None
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
        return seen

    def step() -> tuple[dict[str, float], int]:
        lr = set_learning_rates(optimisers.student, config, progress.step, total)
        batches = [next(setting.windows) for _ in range(config.accumulate)]
        try:
            metrics = accumulate_gradients(setting.context, batches, progress.step)
            handed_over = optimisers.handed_over()
            metrics["grad_norm"] = clip(module, config, setting.experiment.distillation.temperature, handed_over)
            for optimiser in optimisers.present():
                optimiser.step()
        except FloatingPointError as error:
            progress.skipped += 1
            if progress.skipped > config.skip_limit:
                raise UserError(f"training broke down in step {progress.step + 1}: {error}") from error
            _log.warning("step %d is left out (%d so far): %s", progress.step + 1, progress.skipped, error)
            metrics = {}
        for optimiser in optimisers.present():
            optimiser.zero_grad(set_to_none=True)
        metrics |= {"lr": lr, "skipped_steps": progress.skipped}
        return metrics, int(engine.sum(float(sum(batch.input_ids.numel() for batch in batches))))

    bar = tqdm(
        total=total, initial=progress.step, desc=setting.experiment.version, unit="step",
        dynamic_ncols=True, disable=True if engine.rank else None,
    )  # fmt: skip
    with stop_on_interrupt() as asked, bar:
        module.train()
        first = progress.step
        while progress.step < total:
            begun = time.monotonic()
            metrics, tokens = step()
            progress.step += 1
            progress.tokens += tokens
            seconds = time.monotonic() - begun
            progress.train_seconds += seconds
            shown["tok/s"] = f"{tokens / seconds:.0f}"
            bar.update()
            last = progress.step == total
            if progress.step % config.log_every == 0 or last:
                metrics |= {"tokens": progress.tokens, "tokens_per_second": tokens / seconds}
                recorder.log(progress.step, metrics)
                left = (total - progress.step) * (time.monotonic() - session) / (progress.step - first)
                _log.info(line(progress.step, total, metrics, shown, left))
            if progress.step % config.eval_every == 0 or last:
                seen = look()
            bar.set_postfix(shown)
            # Every process must leave after the same step, or one would wait for the others for ever.
            stop = engine.sum(float(asked[0])) > 0
            if progress.step % config.checkpoint_every == 0 or last or stop:
                save()
            if stop:
                engine.barrier()
                raise Interrupted
    progress.wall_seconds = started + time.monotonic() - session
    return seen
