"""One optimiser step of distillation: student and temperature against a frozen teacher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asnn_goose.config.distillation import DistillationConfig
from asnn_goose.config.losses import TEMPERED
from asnn_goose.data.loader import Batch
from asnn_goose.errors import UserError
from asnn_goose.losses import combine
from asnn_goose.schedules import Curriculum, Stage, anchor_penalty
from asnn_goose.train import plan
from asnn_goose.train.balance import GradNorm
from asnn_goose.train.engine import Engine
from asnn_goose.train.teacher_targets import Targets
from asnn_goose.train.term_gradients import Balancer, weighted_sum


@dataclass(frozen=True)
class StepContext:
    """What a step needs besides the batches."""

    engine: Engine
    module: Any
    """:class:`~asnn_goose.train.objective.Distillation` as the engine wraps it."""
    targets: Callable[[Batch], Targets]
    config: DistillationConfig
    total_steps: int
    balancer: Balancer
    hand_over: Callable[[list[Tensor | None]], None] | None = None
    """For an optimiser that wants the gradient of all terms but ce apart: where to, in the order of
    ``Distillation.steered()``. ``.grad`` then holds that of ce alone."""
    curriculum: Curriculum | None = None
    """Whose present stage sets temperature and weights, where it has any."""

    @property
    def stage(self) -> Stage | None:
        """What holds now, with a curriculum."""
        return None if self.curriculum is None else self.curriculum.settings

    def lam(self, step: int) -> float:
        """Strength of the temperature's adversary at an optimiser step."""
        return plan.adversary(self.config, step, self.total_steps)

    def weights(self, step: int) -> dict[str, float]:
        """Name -> configured weight at an optimiser step."""
        return plan.weights(self.config, step, self.total_steps, self.stage)

    def temperature(self, step: int) -> float:
        """The scheduled temperature at an optimiser step."""
        return plan.temperature(self.config, step, self.total_steps, self.stage)


def accumulate_gradients(context: StepContext, batches: Sequence[Batch], step: int) -> dict[str, float]:
    """Gradients of one optimiser step, from micro-batches that may be ragged; returns the step's metrics.

    Every term is a sum over tokens divided by the step's token count over all micro-batches and processes. DDP averages
    gradients over processes, so the loss is multiplied by their number. The anchor is one number per step, not per
    token, and is spread evenly over the micro-batches.
    """
    engine, module, balancer = context.engine, context.module, context.balancer
    lam, weights, scheduled = context.lam(step), context.weights(step), context.temperature(step)
    factors = balancer.weights()
    apart = context.hand_over is not None or balancer.needs_gradients(step)
    forward = engine.unwrapped(module) if apart else module
    applied = weights if apart else {name: weight * factors[name] for name, weight in weights.items()}
    count = engine.sum(float(sum(int(batch.mask[:, 1:].sum()) for batch in batches)))
    metrics: dict[str, float] = {}
    slopes: list[Tensor] = []
    plain, moments = None, torch.zeros(2, dtype=torch.float64)
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients: dict[str, list[Tensor | None]] = {name: [None] * len(trained) for name in weights}
    for index, batch in enumerate(batches):
        ids, mask = batch.input_ids.to(engine.device), batch.mask.to(engine.device)
        targets = context.targets(batch)
        with engine.no_sync(module, enabled=index < len(batches) - 1):
            sums, adversarial, plain = forward(ids, mask, targets, lam, scheduled, applied, apart=apart)
            total, parts = combine(sums, applied, count)
            if module.temperature is not None:
                # Only the distillation terms reach the adversarial T: sum of w dL/dT, before the reversal.
                adversarial.register_hook(lambda slope: None if slope is None else slopes.append(slope.sum()))
                penalty = _anchor(context, plain, scheduled)
                if plain.ndim:
                    kept = plain.detach()[mask[:, 1:]].double()
                    moments += torch.stack([kept.sum(), kept.square().sum()]).cpu()
                    penalty = penalty[mask[:, 1:]].sum() / max(1.0, count)
                else:
                    penalty = penalty / (len(batches) * engine.world_size)
                parts["loss_anchor"] = penalty.item()
                total = total + penalty
                if apart:
                    # What an instance's temperature is computed from leads to the terms as well.
                    engine.backward(penalty, retain_graph=True)
            if apart:
                _add_gradients(gradients, {n: w * sums[n] / max(1.0, count) for n, w in weights.items()}, trained)
            else:
                engine.backward(total * engine.world_size)
        for name, value in parts.items():
            metrics[name] = metrics.get(name, 0.0) + value
    metrics = {name: engine.sum(value) for name, value in metrics.items()}
    losses = {name: weights[name] * metrics[f"loss_{name}_raw"] for name in weights}
    if apart:
        factors = _bring_together(context, gradients, losses, trained, step)
    else:
        balancer.observe(losses)
    # The shares of progress are measured from where learning rate and weights have warmed up.
    warm = step >= context.config.balance.start * context.total_steps
    if warm and isinstance(balancer, GradNorm) and not balancer.needs_gradients(step):
        try:
            balancer.record_start(losses)
        except ValueError as error:
            raise UserError(f"distillation.balance.start {context.config.balance.start}: {error}") from error
    for name, weight in weights.items():
        metrics[f"weight_{name}"] = weight * factors[name]
        metrics[f"loss_{name}_weighted"] = weight * factors[name] * metrics[f"loss_{name}_raw"]
    metrics["loss_total"] = sum(metrics[f"loss_{name}_weighted"] for name in weights)
    metrics["valid_tokens"] = count
    metrics["temperature"] = scheduled
    if module.temperature is not None and plain is not None:
        if plain.ndim:
            metrics |= _instances(engine, module, moments, count)
        else:
            metrics["temperature"] = plain.item()
        slope = engine.sum(sum(slope.item() for slope in slopes)) / engine.world_size
        tempered = sum(weight for name, weight in applied.items() if name in TEMPERED)
        if context.config.temperature.mode == "learned":
            metrics["temperature_lambda"], metrics["temperature_anchor"] = lam, _anchor_at(context, scheduled)
        metrics["temperature_gradient"] = slope / tempered if tempered else 0.0
    return metrics


def _instances(engine: Engine, module: Any, moments: Tensor, count: float) -> dict[str, float]:
    """Mean and standard deviation of the step's temperatures over its tokens, from the sums of T and T^2."""
    total, squares = (engine.sum(moment) for moment in moments.tolist())
    mean = total / max(1.0, count)
    module.temperature.recent.fill_(mean)
    return {"temperature": mean, "temperature_spread": max(0.0, squares / max(1.0, count) - mean**2) ** 0.5}


def _anchor(context: StepContext, temperature: Tensor, scheduled: float) -> Tensor:
    return anchor_penalty(temperature, _anchor_at(context, scheduled), context.config.temperature.anchor_weight)


def _anchor_at(context: StepContext, scheduled: float) -> float:
    anchor = context.config.temperature.anchor
    return scheduled if anchor is None else anchor


def _add_gradients(
    gradients: Mapping[str, list[Tensor | None]], losses: Mapping[str, Tensor], trained: Sequence[nn.Parameter]
) -> None:
    """Add each loss's own gradient to its list: one backward pass through the student per loss."""
    for number, (name, loss) in enumerate(losses.items(), 1):
        found = torch.autograd.grad(loss, trained, retain_graph=number < len(losses), allow_unused=True)
        for index, new in enumerate(found):
            old = gradients[name][index]
            gradients[name][index] = old if new is None else new if old is None else old + new


def _bring_together(
    context: StepContext,
    gradients: Mapping[str, list[Tensor | None]],
    losses: Mapping[str, float],
    trained: Sequence[nn.Parameter],
    step: int,
) -> dict[str, float]:
    """Write the update's gradient from the terms' own; returns the factors that were applied.

    The terms are compared on the student's parameters, which they share; the gradient of a projector or of the
    temperature gets the same factors.
    """
    index = {id(p): i for i, p in enumerate(trained)}
    shared = [index[id(p)] for p in context.module.student.parameters() if p.requires_grad]
    common = {name: [parts[i] for i in shared] for name, parts in gradients.items()}
    factors = context.balancer.factors(step, common, losses)
    apart = () if context.hand_over is None else tuple(name for name in gradients if name != "ce")
    total = weighted_sum({name: parts for name, parts in gradients.items() if name not in apart}, factors)
    if context.hand_over is not None:
        others = weighted_sum({name: gradients[name] for name in apart}, factors)
        context.hand_over([others[index[id(p)]] for p in context.module.steered()])
        # The temperature has an optimiser of its own, which takes one gradient.
        for i in set(index.values()) - {index[id(p)] for p in context.module.steered()}:
            total[i] = others[i]
    for parameter, gradient in zip(trained, total, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return factors
