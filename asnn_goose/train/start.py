"""The student before its first step: built, fitted to the teacher, and taken through its first stage.

Shapes: B windows, L tokens, E teacher channels.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asnn_goose.config import Experiment
from asnn_goose.data.loader import Batch, TrainingWindows
from asnn_goose.data.tokenize import TokenShard
from asnn_goose.errors import UserError
from asnn_goose.losses import layer_map
from asnn_goose.models import GooseForCausalLM, Teacher, build_student
from asnn_goose.models.conversion import WINDOWS
from asnn_goose.models.thresholds import fitting_thresholds
from asnn_goose.train.engine import Engine
from asnn_goose.train.progress import watch
from asnn_goose.train.states import EVALUATION_BATCH, teacher_states
from asnn_goose.train.teacher_targets import OnlineTargets, StoredTargets
from asnn_goose.train.transfer import run_mixers
from asnn_goose.train.transfer_store import Transferred, transferred

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A student at its start, and what it has seen by then."""

    student: GooseForCausalLM
    fit_tokens: int
    """Tokens of the windows that a fit may read."""
    fitted: tuple[int, ...]
    """Training windows that went into the start, the first that training will read too."""
    transfer: Transferred | None
    """The first stage, if there was one."""


def start_student(
    experiment: Experiment,
    engine: Engine,
    teacher: Teacher,
    shard: TokenShard,
    targets: OnlineTargets | StoredTargets,
    upcoming: Sequence[int],
) -> Start:
    """As ``student.init`` and ``student.transfer`` say.

    Args:
        shard: training text.
        targets: of the windows that training will read.
        upcoming: these windows, in order.

    Raises:
        UserError: a teacher that cannot be converted, a layer map that does not fit, a first stage that breaks down.
    """
    settings, window, seed = experiment.student, experiment.data.window, experiment.seed
    # Not more than training will read: the baselines are fitted on exactly what the student saw.
    most = experiment.train.total_steps(window) * experiment.train.step_tokens(window)
    fit_BL = first_windows(shard, window, seed, min(settings.fit_tokens, most))
    shown_BL = fit_BL[:WINDOWS]
    fit_BLE, count = None, 0
    if settings.init == "regression":
        count = len(fit_BL)
        if isinstance(targets, StoredTargets) and targets.store.k is None:
            fit_BLE = targets.store.final(torch.tensor(upcoming[:count]))
        else:
            fit_BLE = fit_states(teacher, fit_BL)
    layers: list[int] = []
    if settings.init == "layers":
        count = len(shown_BL)
        try:
            layers = layer_map(teacher.num_layers, settings.layers or teacher.num_layers, settings.layer_map)
        except ValueError as error:
            raise UserError(f"student.layer_map: {error}") from None
    # Again: students of one seed start alike, whatever projectors were drawn before them.
    torch.manual_seed(seed)
    student = build_student(settings, teacher, fit_BL, fit_BLE, layers)
    if settings.neuron.sparsity is not None or settings.hidden_neuron.sparsity is not None:
        set_thresholds(student, teacher, layers, shown_BL)
        count = max(count, len(shown_BL))
    transfer = None
    if settings.transfer is not None:
        stage_BL = first_windows(shard, window, seed, min(settings.transfer.tokens, most))
        count = max(count, len(stage_BL))
        try:
            transfer = transferred(
                student, teacher, layers, stage_BL, settings, seed, engine,
                lambda batches: watch(batches, "matching the mixers"),
            )  # fmt: skip
        except FloatingPointError as error:
            raise UserError(f"the first stage broke down: {error}") from error
    return Start(student, fit_BL.numel(), tuple(upcoming[:count]), transfer)


@torch.no_grad()
def set_thresholds(student: GooseForCausalLM, teacher: Teacher, layers: Sequence[int], ids_BL: Tensor) -> None:
    """Thresholds from the currents that these windows cause; those of converted blocks, whose own chain is not yet
    worth anything, from the teacher's stream."""
    with fitting_thresholds(student):
        if layers:
            run_mixers(student, teacher, layers, ids_BL)
        else:
            student.model(ids_BL)


def fit_states(teacher: Teacher, fit_BL: Tensor) -> Tensor:
    """The teacher's states [B, L, E] of the windows that the student's start is fitted on."""

    def announce(items: Iterable) -> Iterable:
        _log.info(
            "computing the teacher's states on %d training tokens, to fit the student's start (once)", fit_BL.numel()
        )
        return items

    batches = [Batch(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool)) for ids_BL in fit_BL.split(EVALUATION_BATCH)]
    return torch.cat(teacher_states(teacher, batches, announce))


def first_windows(shard: TokenShard, window: int, seed: int, tokens: int) -> Tensor:
    """The first windows [B, L] that training will read, at least one, for what is fitted before the first step."""
    windows = TrainingWindows(shard, window, 1, seed)
    count = min(max(1, tokens // window), windows.windows)
    return torch.cat([next(windows).input_ids for _ in range(count)])
