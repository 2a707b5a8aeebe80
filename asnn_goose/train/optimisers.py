"""Parameter groups and their optimisers."""

import math
from typing import NamedTuple

import torch
from torch import nn

from asnn_goose.config.schema import TemperatureConfig, TrainConfig
from asnn_goose.models.spiking import Neuron
from asnn_goose.schedules import warmup_cosine
from asnn_goose.train.step import Distillation

ELEMENTWISE = ("bonus_HD",)
"""Parameters of two dimensions that no product of matrices takes: vectors, as far as weight decay goes."""


class Optimisers(NamedTuple):
    """AdamW for the student; plain SGD for the temperature, since Adam would cancel the scale of lambda."""

    student: torch.optim.Optimizer
    temperature: torch.optim.Optimizer | None

    def present(self) -> list[torch.optim.Optimizer]:
        return [optimiser for optimiser in self if optimiser is not None]


def freeze(module: Distillation, config: TrainConfig) -> None:
    """Stop embedding and head from moving, where ``train.embeddings`` says so."""
    if config.embeddings == "frozen":
        module.student.model.embeddings.requires_grad_(False)
        module.student.lm_head.requires_grad_(False)


def student_groups(module: Distillation, config: TrainConfig) -> list[dict]:
    """Every trainable parameter of the student in exactly one of: matrices (decayed), vectors, neurons."""
    neurons = {id(p) for m in module.student.modules() if isinstance(m, Neuron) for p in m.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "neurons": []}
    for path, parameter in module.student.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and path.rpartition(".")[2] not in ELEMENTWISE
            name = "neurons" if id(parameter) in neurons else "matrices" if matrix else "vectors"
            groups[name].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": config.weight_decay if name == "matrices" else 0.0,
            "factor": config.neuron_lr_factor if name == "neurons" else 1.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def build_optimisers(module: Distillation, train: TrainConfig, temperature: TemperatureConfig) -> Optimisers:
    """AdamW over the student's groups, SGD without momentum or decay over the raw temperature."""
    student = torch.optim.AdamW(
        student_groups(module, train), lr=train.lr, betas=(train.beta1, train.beta2), fused=True
    )
    if module.temperature is None:
        return Optimisers(student, None)
    return Optimisers(student, torch.optim.SGD(module.temperature.parameters(), lr=temperature.lr))


def set_learning_rates(optimiser: torch.optim.Optimizer, config: TrainConfig, step: int, total: int) -> float:
    """Write the rates of the update that follows ``step`` updates; returns the matrices' rate."""
    lr = config.lr * warmup_cosine(step, total, config.warmup, config.lr_end)
    for group in optimiser.param_groups:
        group["lr"] = lr * group["factor"]
    return lr


def clip(module: Distillation, train: TrainConfig, temperature: TemperatureConfig) -> float:
    """Clip the student's global norm and the raw temperature's size apart; returns the student's norm before.

    Raises:
        FloatingPointError: the norm is not finite, so that a step would spoil the weights.
    """
    student = [p for p in module.student.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(student, train.clip).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the norm of the gradient is {norm}: lower train.lr, or look at the batch")
    if module.temperature is not None and module.temperature.raw.grad is not None:
        module.temperature.raw.grad.clamp_(-temperature.clip, temperature.clip)
    return norm
