"""What a look at validation also measures of training, without moving it by a bit: the teacher's targets at the
temperature that training has reached, and on request how large each term's gradient is."""

import math

import torch
from torch import Tensor

from asnn_goose.config.losses import TEMPERED
from asnn_goose.data.loader import Batch
from asnn_goose.evaluation.entropy import TargetStatistics
from asnn_goose.train.setting import Setting
from asnn_goose.train.step import StepContext

POSITIONS = 512
"""Predicted positions whose targets are watched; a learned temperature is a new one at every look."""


class Monitor:
    """Measurements for metrics.jsonl beside those of validation.

    Args:
        setting: of the run.
        validation: the teacher's states on the validation batches, of which the first is watched, up to POSITIONS.
    """

    def __init__(self, setting: Setting, validation: list[Tensor]):
        self.setting = setting
        self.batch: Batch | None = None
        """The last training batch read, on which gradients are measured."""
        self.targets: TargetStatistics | None = None
        if any(name in TEMPERED for name in setting.experiment.distillation.losses.present()):
            batch, head_VE = setting.text.validation.batches[0], setting.teacher.head_VE
            states_NE = validation[0][:, :-1][batch.mask[:, 1:]][:POSITIONS]
            self.targets = TargetStatistics(states_NE.to(head_VE.device), head_VE)

    def look(self, step: int) -> dict[str, float]:
        """What :class:`TargetStatistics` says of the temperature after ``step`` updates, where a term has one;
        with train.monitor_gradients what :func:`gradient_norms` gives."""
        found: dict[str, float] = {}
        context = self.setting.context
        if self.targets is not None:
            learned = self.setting.module.temperature
            found |= self.targets.at(context.temperature(step) if learned is None else learned.current())
        if self.setting.experiment.train.monitor_gradients and self.batch is not None:
            found |= gradient_norms(context, self.batch, step)
        return found


def gradient_norms(context: StepContext, batch: Batch, step: int) -> dict[str, float]:
    """grad_norm_<term>: norm of the gradient of each term times its configured weight, token mean over one batch;
    grad_ratio_<term>: the same over that of ce, where ce is a term.

    Taken over the student's parameters, which all terms share, and before any balance of the terms. It costs a forward
    pass and a backward pass for each term. ``.grad``, every random generator and the balancer stay as they are. A term
    that is not finite gives nan.
    """
    engine, module = context.engine, context.module
    weights = context.weights(step)
    ids, mask = batch.input_ids.to(engine.device), batch.mask.to(engine.device)
    shared = [p for p in module.student.parameters() if p.requires_grad]
    cuda = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.enable_grad():
        sums, *_ = engine.unwrapped(module)(
            ids, mask, context.targets(batch), context.lam(step), context.temperature(step), weights, apart=True
        )
        count = max(1.0, float(batch.mask[:, 1:].sum()))
        found: dict[str, float] = {}
        for number, (name, weight) in enumerate(weights.items(), 1):
            parts = torch.autograd.grad(
                weight * sums[name] / count, shared, retain_graph=number < len(weights), allow_unused=True
            )
            squares = [part.double().square().sum() for part in parts if part is not None]
            found[f"grad_norm_{name}"] = math.sqrt(torch.stack(squares).sum().item()) if squares else 0.0
    if reference := found.get("grad_norm_ce"):
        found |= {f"grad_ratio_{name}": found[f"grad_norm_{name}"] / reference for name in weights if name != "ce"}
    return found
