"""The second stage of a classifier: steps, log lines, looks at validation, checkpoints, and what Ctrl-C does."""

import logging
import math
import time
from collections.abc import Mapping

import torch
from tqdm import tqdm

from asnn_goose.data.labelled_texts import LabelledTexts
from asnn_goose.errors import UserError
from asnn_goose.evaluation.classification import Scored, score
from asnn_goose.train import checkpoint
from asnn_goose.train.checkpoint import Progress, Stateful
from asnn_goose.train.class_targets import class_logits
from asnn_goose.train.classifier_setting import ClassifierSetting
from asnn_goose.train.loop import Interrupted, Recorder, line, stop_on_interrupt
from asnn_goose.train.optimisers import set_warmup_cosine

_log = logging.getLogger(__name__)


def parts(setting: ClassifierSetting) -> Mapping[str, Stateful]:
    """What a checkpoint keeps beside weights and optimiser."""
    return {"texts": setting.training}


def predictions(setting: ClassifierSetting, texts: LabelledTexts) -> Scored:
    """The student's of a split, in eval mode."""
    classes = len(setting.task.labels)
    with setting.engine.looking(setting.module):
        logits_NV = class_logits(
            lambda ids, mask: setting.module.student(ids, mask).logits, texts, classes, setting.engine
        )
    return score(texts.labels_N, logits_NV.argmax(1).numpy(), classes)


def train_classifier(setting: ClassifierSetting, recorder: Recorder, progress: Progress) -> None:
    """Go from ``progress``, which counts on, to the last step; its tokens are texts here.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was written first.
        UserError: a loss or the gradient is no longer finite.
    """
    config, total = setting.experiment.train, setting.total_steps
    started, session, first = progress.wall_seconds, time.monotonic(), progress.step
    shown: dict[str, str] = {}
    bar = tqdm(
        total=total, initial=first, desc=setting.experiment.version, unit="step", dynamic_ncols=True, disable=None
    )
    with stop_on_interrupt() as asked, bar:
        setting.module.train()
        while progress.step < total:
            begun = time.monotonic()
            metrics, texts = _step(setting, progress.step)
            progress.step += 1
            progress.tokens += texts
            seconds = time.monotonic() - begun
            progress.train_seconds += seconds
            shown["texts/s"] = f"{texts / seconds:.0f}"
            bar.update()
            last = progress.step == total
            if progress.step % config.log_every == 0 or last:
                recorder.log(progress.step, metrics | {"texts": progress.tokens})
                left = (total - progress.step) * (time.monotonic() - session) / (progress.step - first)
                _log.info(line(progress.step, total, metrics, shown, left))
            if progress.step % config.eval_every == 0 or last:
                seen = predictions(setting, setting.texts["validation"])
                shown["val_accuracy"] = f"{seen.accuracy:.4f}"
                recorder.log(progress.step, {"val_accuracy": seen.accuracy, "val_macro_f1": seen.macro_f1})
            bar.set_postfix(shown)
            stop = asked[0]
            if progress.step % config.checkpoint_every == 0 or last or stop:
                progress.wall_seconds = started + time.monotonic() - session
                assert recorder.folder is not None, "classifiers train in one process"
                checkpoint.save(
                    recorder.folder.checkpoints, setting.module, [setting.optimiser], parts(setting), progress,
                    setting.fingerprint,
                )  # fmt: skip
            if stop or (last and asked[0]):
                raise Interrupted
    progress.wall_seconds = started + time.monotonic() - session


def _step(setting: ClassifierSetting, step: int) -> tuple[dict[str, float], int]:
    """One update; returns its metrics and how many texts it read."""
    config, engine, module = setting.experiment.train, setting.engine, setting.module
    lr = set_warmup_cosine(setting.optimiser, config, step, setting.total_steps)
    batch = next(setting.training)
    ids, mask, labels = (x.to(engine.device) for x in batch[:3])
    taught = setting.taught(batch)
    with engine.autocast():
        values = module(ids, mask, labels, taught)
    weights = module.weights()
    loss = torch.stack([weights[name] * value for name, value in values.items()]).sum()
    if not math.isfinite(loss.item()):
        raise UserError(
            f"training broke down in step {step + 1} with a loss of {loss.item()}: lower train.lr {config.lr}"
        )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], config.clip)
    if not math.isfinite(norm.item()):
        raise UserError(f"the gradient of step {step + 1} is not finite: lower train.lr {config.lr}")
    setting.optimiser.step()
    setting.optimiser.zero_grad(set_to_none=True)
    metrics = {"loss_total": loss.item(), "lr": lr, "grad_norm": norm.item()}
    for name, value in values.items():
        metrics |= {f"loss_{name}_raw": value.item(), f"loss_{name}_weighted": weights[name] * value.item()}
    return metrics, len(labels)
