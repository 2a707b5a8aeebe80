"""One optimiser step of distillation: student and temperature against a frozen teacher.

Shapes: B windows, L tokens, N predicted positions, C student channels, E teacher channels, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asnn_goose.config.schema import DistillationConfig
from asnn_goose.data.loader import Batch
from asnn_goose.kernels.linear_divergence import linear_divergence
from asnn_goose.losses import combine
from asnn_goose.models import GooseForCausalLM, Teacher
from asnn_goose.schedules import LearnableTemperature, anchor_penalty, cosine_lambda
from asnn_goose.train.engine import Engine


class Targets:
    """What the teacher says of a batch: its last states [B, L, E] and its head [V, E].

    A class of its own, since the engine would cast bare tensors to the student's dtype on their way into ``forward``.
    """

    def __init__(self, teacher: Teacher, input_ids: Tensor):
        self.states_BLE, self.head_VE = teacher.states(input_ids), teacher.head_VE


class Distillation(nn.Module):
    """Everything that trains, in one module: the student, and the temperature if it is learned.

    ``forward`` goes from tokens to the sums of the configured terms, so that the engine's autocast covers the student
    and one implementation serves training and validation.
    """

    def __init__(self, student: GooseForCausalLM, config: DistillationConfig):
        super().__init__()
        self.student = student
        self._narrow_head: Tensor | None = None
        self.weights = {name: loss.weight for name, loss in config.losses.items()}
        temperature = config.temperature
        self.fixed_temperature = temperature.init
        self.temperature = (
            LearnableTemperature(temperature.init, temperature.low, temperature.high)
            if temperature.mode == "learned"
            else None
        )

    def head_VC(self) -> Tensor:
        """The student's head in the dtype of its products; a frozen one is cast once."""
        weight_VC = self.student.lm_head.weight
        dtype = torch.bfloat16 if torch.is_autocast_enabled(weight_VC.device.type) else weight_VC.dtype
        if weight_VC.requires_grad or dtype == weight_VC.dtype:
            return weight_VC.to(dtype)
        if self._narrow_head is None:
            self._narrow_head = weight_VC.detach().to(dtype)
        return self._narrow_head

    def states(self, input_ids: Tensor) -> Tensor:
        """The student's states [B, L, E] in front of its head."""
        last_BLC = self.student.model(input_ids).last_hidden_state
        return last_BLC if self.student.narrow is None else self.student.narrow(last_BLC)

    def forward(self, input_ids: Tensor, mask: Tensor, targets: Targets, lam: float):
        """(name -> sum in nats, adversarial temperature, plain temperature) over the predicted positions."""
        adversarial, plain = (self.fixed_temperature,) * 2 if self.temperature is None else self.temperature(lam)
        sums, _ = linear_divergence(
            self.states(input_ids)[:, :-1].flatten(0, 1),
            self.head_VC(),
            targets.states_BLE[:, :-1].flatten(0, 1),
            targets.head_VE,
            targets_N=input_ids[:, 1:].flatten(),
            weights=self.weights,
            temperature=adversarial,
            mask=mask[:, 1:].flatten(),
        )
        return sums, adversarial, plain


@dataclass(frozen=True)
class StepContext:
    """What a step needs besides the batches."""

    engine: Engine
    module: Any
    """:class:`Distillation` as the engine wraps it."""
    teacher: Teacher
    config: DistillationConfig
    total_steps: int

    def lam(self, step: int) -> float:
        """Strength of the temperature's adversary at an optimiser step."""
        temperature = self.config.temperature
        start, end = temperature.lambda_start * self.total_steps, temperature.lambda_end * self.total_steps
        return temperature.lambda_max * cosine_lambda(step, start, end)


def accumulate_gradients(context: StepContext, batches: Sequence[Batch], step: int) -> dict[str, float]:
    """Gradients of one optimiser step, from micro-batches that may be ragged; returns the step's metrics.

    Every term is a sum over tokens divided by the step's token count over all micro-batches and processes. DDP averages
    gradients over processes, so the loss is multiplied by their number. The anchor is one number per step, not per
    token, and is spread evenly over the micro-batches.
    """
    engine, module = context.engine, context.module
    temperature = context.config.temperature
    lam = context.lam(step)
    count = engine.sum(float(sum(int(batch.mask[:, 1:].sum()) for batch in batches)))
    metrics: dict[str, float] = {}
    slopes: list[Tensor] = []
    for index, batch in enumerate(batches):
        ids, mask = batch.input_ids.to(engine.device), batch.mask.to(engine.device)
        targets = Targets(context.teacher, ids)
        with engine.no_sync(module, enabled=index < len(batches) - 1):
            sums, adversarial, plain = module(ids, mask, targets, lam)
            total, parts = combine(sums, module.weights, count)
            if module.temperature is not None:
                # Only the distillation term reaches the adversarial T: w dL_KD/dT, before the reversal.
                adversarial.register_hook(slopes.append)
                anchor = temperature.init if temperature.anchor is None else temperature.anchor
                penalty = anchor_penalty(plain, anchor, temperature.anchor_weight) / (len(batches) * engine.world_size)
                parts["loss_anchor"] = penalty.item()
                total = total + penalty
            engine.backward(total * engine.world_size)
        for name, value in parts.items():
            metrics[name] = metrics.get(name, 0.0) + value
    metrics = {name: engine.sum(value) for name, value in metrics.items()}
    metrics |= {f"weight_{name}": weight for name, weight in module.weights.items()}
    metrics["valid_tokens"] = count
    metrics["temperature"] = module.fixed_temperature
    if module.temperature is not None:
        slope = engine.sum(sum(slope.item() for slope in slopes)) / engine.world_size
        metrics["temperature"] = plain.item()
        metrics["temperature_lambda"] = lam
        metrics["temperature_gradient"] = slope / module.weights["forward_kl"]
    return metrics
