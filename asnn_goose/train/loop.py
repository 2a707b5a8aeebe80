"""The training loop: steps, log lines, looks at validation, checkpoints, and what Ctrl-C does."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from asnn_goose.data.loader import EvaluationSet
from asnn_goose.errors import UserError
from asnn_goose.evaluation.perplexity import Comparison, compare
from asnn_goose.models.spiking import anneal
from asnn_goose.reporting import RunFolder
from asnn_goose.train import checkpoint
from asnn_goose.train.checkpoint import Progress
from asnn_goose.train.monitor import Monitor
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
    with setting.engine.looking(module):
        head_VE = module.head_VC()
        batches = watch(split.batches, what)
        return compare(states or module.states, head_VE, teacher_states, setting.teacher.head_VE, batches)


@contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """Within it the first Ctrl-C only sets a flag, so that a step is never torn; a second one ends at once."""
    asked = [False]
    # Not from the signal handler: it may have cut into a write to the same stream, which Python refuses to nest.
    telling = threading.Thread(target=_log.info, args=("stopping after this step; Ctrl-C again stops at once",))

    def ask(_signal, _frame):
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = True
        telling.start()

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread, where a signal cannot arrive
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
        if asked[0]:
            telling.join()


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

    None where there was no step left to take, where weights of an earlier step were put back, and on processes other
    than the main one.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was written first.
        UserError: a loss or the gradient is no longer finite, with weights and checkpoints as they were; or the
            validation cross-entropy that early stopping or the stages go by is not.
    """
    config, engine = setting.experiment.train, setting.engine
    annealing = setting.experiment.student.annealing
    total = setting.context.total_steps
    module, optimisers, stages = setting.module, setting.optimisers, setting.stages
    started, session = progress.wall_seconds, time.monotonic()
    validation = watch_teacher(setting, setting.text.validation, "validation")
    monitor = Monitor(setting, validation)
    shown: dict[str, str] = {}
    seen = None

    def save() -> None:
        progress.wall_seconds = started + time.monotonic() - session
        if recorder.folder is not None:
            checkpoint.save(
                recorder.folder.checkpoints,
                module,
                optimisers.present(),
                setting.parts(),
                progress,
                setting.fingerprint,
            )

    def look() -> Comparison | None:
        seen = None
        if engine.rank == 0:
            seen = evaluate(setting, setting.text.validation, validation, "validation")
            shown["val_ppl"] = f"{seen.student_ppl:.1f}"
            found = {
                "val_ppl": seen.student_ppl,
                "val_ce": float(seen.student_nll_W.sum()) / seen.tokens,
                "val_kl": seen.kl_to_teacher,
                "val_top1": seen.top1_agreement,
            } | monitor.look(progress.step)
            recorder.log(progress.step, found | ({} if stages is None else stages.forgetting(module, engine)))
        engine.barrier()
        return seen

    def judge(seen: Comparison | None) -> None:
        """Ask early stopping and the curriculum, with one answer for all processes."""
        if setting.stopper is None and stages is None:
            return
        val_ce = engine.sum(0.0 if seen is None else float(seen.student_nll_W.sum()) / seen.tokens)
        if not math.isfinite(val_ce):
            raise UserError(
                f"the validation cross-entropy after step {progress.step} is {val_ce}, so the run has diverged: lower "
                f"train.lr ({config.lr})"
            )
        if stages is not None and stages.observe(progress.step, val_ce):
            begin_stage()
        if setting.stopper is None:
            return
        progress.stopped = setting.stopper.observe(progress.step, val_ce)
        if setting.stopper.best_step == progress.step and recorder.folder is not None:
            checkpoint.save_best(recorder.folder.checkpoints, module)

    def begin_stage() -> None:
        if stages is not None and stages.config.restart_on_stage:
            optimisers.restart()

    def step() -> tuple[dict[str, float], int]:
        if stages is not None and stages.advance(progress.step):
            begin_stage()
        if annealing is not None:
            anneal(module.student, annealing.at(progress.step / total))
        begin, end = (0, total) if stages is None else stages.span()
        lr = set_learning_rates(optimisers.student, config, progress.step - begin, end - begin)
        batches = [next(setting.windows) for _ in range(config.accumulate)]
        monitor.batch = batches[0]
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
        metrics |= {"lr": lr, "skipped_steps": progress.skipped} | ({} if stages is None else {"stage": stages.number})
        return metrics, int(engine.sum(float(sum(batch.input_ids.numel() for batch in batches))))

    bar = tqdm(
        total=total, initial=progress.step, desc=setting.experiment.version, unit="step",
        dynamic_ncols=True, disable=True if engine.rank else None,
    )  # fmt: skip
    with stop_on_interrupt() as asked, bar:
        module.train()
        first = progress.step
        while progress.step < total and not progress.stopped:
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
                judge(seen)
            bar.set_postfix(shown)
            # Every process must leave after the same step, or one would wait for the others for ever.
            stop = engine.sum(float(asked[0])) > 0
            best = setting.stopper is not None and setting.stopper.best_step == progress.step
            ends = last or progress.stopped
            # After the best weights too: a run that went on from before them need not come by the same again.
            if progress.step % config.checkpoint_every == 0 or best or stop or ends:
                save()
            if stop or (ends and engine.sum(float(asked[0])) > 0):
                engine.barrier()
                raise Interrupted
    if put_best_back(setting, recorder, progress):
        seen = None
    progress.wall_seconds = started + time.monotonic() - session
    return seen


def put_best_back(setting: Setting, recorder: Recorder, progress: Progress) -> bool:
    """Give the student the weights of its best look, where early stopping is asked for; whether they are others."""
    stopper = setting.stopper
    if stopper is None or stopper.best_step in (None, progress.step) or recorder.folder is None:
        return False
    ended = "stopped early" if progress.stopped else "ended"
    _log.info("training %s at step %d; the student is that of step %d", ended, progress.step, stopper.best_step)
    checkpoint.load_best(recorder.folder.checkpoints, setting.module)
    return True
