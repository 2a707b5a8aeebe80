"""From a trained classifier to the record of its run.

Shapes: N texts, B texts of a batch, L tokens, I classifiers, V classes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from asnn_goose.config.schema import SPIKING
from asnn_goose.data.corpora import SPLITS
from asnn_goose.evaluation import energy
from asnn_goose.evaluation.classification import Scored, score
from asnn_goose.evaluation.firing import SiteFiring, measure_firing, spike_raster
from asnn_goose.models.classification import first_sure
from asnn_goose.models.encoder import HEAD
from asnn_goose.reporting import RunFolder
from asnn_goose.reporting.classifier_record import (
    WATCHED,
    ClassifierResult,
    ExitResult,
    FinetunedResult,
    Score,
    SentenceEnergy,
    StudentScores,
    TaskResult,
)
from asnn_goose.reporting.record import Raster
from asnn_goose.train.checkpoint import Progress
from asnn_goose.train.class_targets import class_logits
from asnn_goose.train.classifier_loop import predictions
from asnn_goose.train.classifier_setting import ClassifierSetting
from asnn_goose.train.measure import RASTER_SITE, Clock, save_model
from asnn_goose.train.neuron_results import spike_result

CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""At which early exits are measured."""


def measure_classifier(
    setting: ClassifierSetting, folder: RunFolder, progress: Progress, clock: Clock, wall: Callable[[], float]
) -> ClassifierResult:
    """Evaluate on validation text and once on test text; save the student; return the record."""
    experiment, student, taught = setting.experiment, setting.module.student, setting.finetuned
    validation = clock.time("evaluation", lambda: predictions(setting, setting.texts["validation"]))
    logits_NIV = clock.time("evaluation", lambda: every_logits(setting))
    labels_N, classes = setting.texts["test"].labels_N, len(setting.task.labels)
    test = score(labels_N, logits_NIV[:, -1].argmax(1).numpy(), classes)
    sites = clock.time("evaluation", lambda: _firing(setting))
    exits = measure_exits(logits_NIV, labels_N, list(student.places)) if experiment.student.exits else ()
    raster = clock.time("evaluation", lambda: _raster(setting, folder))
    save_model(student, setting.tokenizer, folder)
    labels = setting.task.labels
    return ClassifierResult(
        run_id=folder.run_id,
        version=experiment.version,
        parent=experiment.parent,
        seed=experiment.seed,
        fingerprint=setting.fingerprint,
        scale=experiment.train.scale,
        started=folder.provenance.started,
        steps=progress.step,
        precision=setting.engine.precision,
        texts_seen=progress.tokens,
        wall_seconds=wall(),
        seconds_by_phase={name: round(seconds, 2) for name, seconds in clock.seconds.items()},
        task=TaskResult(
            name=setting.task.name,
            licence=setting.task.licence,
            labels=labels,
            counts={
                split: tuple(np.bincount(setting.texts[split].labels_N, minlength=len(labels)).tolist())
                for split in SPLITS
            },
            truncated={split: setting.texts[split].truncated for split in SPLITS},
            window=experiment.task.window,
            copies=setting.task.copies,
        ),
        teacher=FinetunedResult(
            name=experiment.teacher.name,
            parameters=sum(p.numel() for p in setting.encoder.model.parameters()),
            epochs=len(taught.epochs),
            validation=_score(taught.validation),
            test=_score(taught.test),
        ),
        student=StudentScores(
            parameters=sum(p.numel() for p in student.parameters()),
            trained_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
            blocks=student.config.num_hidden_layers,
            validation=_score(validation),
            test=_score(test),
        ),
        ratio_to_teacher=test.accuracy / taught.test.accuracy if taught.test.accuracy else None,
        spikes=spike_result(sites) if _spiking(setting) else None,
        energy=_energy(setting, sites),
        exits=exits,
        raster=raster,
        notes=() if setting.general is None else (setting.general.sentence(),),
    )


def _score(scored: Scored) -> Score:
    (accuracy_low, accuracy_high), (f1_low, f1_high) = scored.accuracy_interval(), scored.macro_f1_interval()
    return Score(
        accuracy=scored.accuracy,
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        macro_f1=scored.macro_f1,
        macro_f1_low=f1_low,
        macro_f1_high=f1_high,
        confusion=tuple(tuple(row) for row in scored.confusion_CC.tolist()),
    )


def _spiking(setting: ClassifierSetting) -> bool:
    return setting.experiment.student.neuron.kind in SPIKING


def _firing(setting: ClassifierSetting) -> list[SiteFiring]:
    """Each neuron on the first test texts, those of one length together, so that there is no padding to count."""
    texts = setting.texts["test"]
    rows = range(min(WATCHED, len(texts.ids)))
    lengths = texts.lengths_N[: len(rows)]
    batches = [texts.batch([row for row in rows if lengths[row] == length]) for length in sorted(set(lengths))]
    with setting.engine.looking(setting.module):
        return measure_firing(setting.module.student, setting.module.student, batches)


def every_logits(setting: ClassifierSetting) -> Tensor:
    """[N, I, V] of every classifier on the test texts, the deepest one's last, from one pass through all blocks."""
    student, classes = setting.module.student, len(setting.task.labels)

    def every_exit(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        output = student(ids_BL, mask_BL)
        deepest_B1V = output.logits[:, None]
        every_BIV = deepest_B1V if output.exit_logits is None else torch.cat([output.exit_logits, deepest_B1V], 1)
        return every_BIV.flatten(1)

    classifiers = len(student.places)
    with setting.engine.looking(setting.module):
        logits_NI = class_logits(every_exit, setting.texts["test"], classifiers * classes, setting.engine)
    return logits_NI.unflatten(1, (classifiers, classes))


def measure_exits(logits_NIV: Tensor, labels_N: np.ndarray, places: Sequence[int]) -> tuple[ExitResult, ...]:
    """What early exits give: a text's logits at an exit do not depend on later blocks, so they tell where it leaves.

    Args:
        logits_NIV: see :func:`every_logits`.
        places: the block behind which each classifier stands, counted from 1.
    """
    found = []
    for confidence in CONFIDENCES:
        exit_N = first_sure(logits_NIV, confidence)
        right_N = logits_NIV[torch.arange(len(exit_N)), exit_N].argmax(-1).numpy() == labels_N
        depth_N = np.array(places)[exit_N]
        found.append(
            ExitResult(confidence=confidence, accuracy=right_N.mean().item(), mean_depth=depth_N.mean().item())
        )
    return tuple(found)


def _raster(setting: ClassifierSetting, folder: RunFolder) -> Raster | None:
    """One layer's spikes on the first test text, read forwards; none for a student without micro-steps."""
    if not _spiking(setting):
        return None
    ids_1L = setting.texts["test"].batch([0]).input_ids.to(setting.engine.device)
    layer = (setting.module.student.config.num_hidden_layers + 1) // 2
    with setting.engine.looking(setting.module):
        spikes = spike_raster(setting.module.student, ids_1L, layer, RASTER_SITE)
    tokens = setting.tokenizer.convert_ids_to_tokens(ids_1L[0].tolist())
    return folder.write_raster(layer, RASTER_SITE, tokens, spikes)


def _energy(setting: ClassifierSetting, sites: list[SiteFiring]) -> SentenceEnergy:
    """Of both bodies, without what is done once a text, in pooling and classifiers, and without the teacher's norms and
    activations."""
    student, model = setting.module.student, setting.encoder.model
    tokens = float(setting.texts["test"].lengths_N.mean())
    directions = 2 if student.config.reading == "bidirectional" else 1
    per_token = energy.joules_per_token(energy.body_operations(student, sites), unrolled=_spiking(setting))
    matrices = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and HEAD.isdisjoint(name.split("."))
    )
    attention = 2 * setting.encoder.num_layers * tokens * setting.encoder.hidden_size
    theirs = tokens * energy.Operations(macs=matrices + attention).joules()
    return SentenceEnergy(tokens=tokens, student_joules=directions * tokens * per_token, teacher_joules=theirs)
