"""Parameter groups and their optimisers."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asnn_goose.config.classifier import GeneralConfig, TaskTrainConfig
from asnn_goose.config.distillation import TemperatureConfig
from asnn_goose.config.schema import TrainConfig, TransferConfig
from asnn_goose.config.task import FinetuneConfig
from asnn_goose.models.spiking import Neuron
from asnn_goose.schedules import warmup_cosine
from asnn_goose.train.dot import DOT
from asnn_goose.train.objective import Distillation
from asnn_goose.train.plan import learning_rate

ELEMENTWISE = ("bonus_HD",)
"""Parameters of two dimensions that no product of matrices takes: vectors, as far as weight decay goes."""


def is_matrix(path: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for a parameter of that dotted name."""
    return parameter.ndim >= 2 and path.rpartition(".")[2] not in ELEMENTWISE


class Optimisers(NamedTuple):
    """AdamW or DOT for the student. Plain SGD for a learned temperature, since Adam would cancel the scale of lambda;
    Adam for a minimised one."""

    student: torch.optim.Optimizer
    temperature: torch.optim.Optimizer | None = None

    def present(self) -> list[torch.optim.Optimizer]:
        return [optimiser for optimiser in self if optimiser is not None]

    def handed_over(self) -> list[Tensor]:
        """Gradients that wait in the student's optimiser beside ``.grad``."""
        return self.student.handed_over() if isinstance(self.student, DOT) else []

    def restart(self) -> None:
        """Forget moments and momenta, as if the next step were the first."""
        for optimiser in self.present():
            optimiser.state.clear()


def freeze(module: Distillation, config: TrainConfig) -> None:
    """Stop embedding and head from moving, where ``train.embeddings`` says so."""
    if config.embeddings == "frozen":
        module.student.model.embeddings.requires_grad_(False)
        module.student.lm_head.requires_grad_(False)


def student_groups(module: Distillation, config: TrainConfig) -> list[dict]:
    """Every trainable parameter but the temperature in exactly one of: matrices (decayed), vectors, neurons of the
    student; projectors, which exist in training only (decayed)."""
    neurons = {id(p) for m in module.student.modules() if isinstance(m, Neuron) for p in m.parameters()}
    students = set(map(id, module.student.parameters()))
    steered = set(map(id, module.steered()))
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "neurons": [], "projectors": []}
    for path, parameter in module.named_parameters():
        if id(parameter) in steered:
            matrix = is_matrix(path, parameter)
            kind = "neurons" if id(parameter) in neurons else "matrices" if matrix else "vectors"
            groups[kind if id(parameter) in students else "projectors"].append(parameter)
    factors = {"neurons": config.neuron_lr_factor, "projectors": config.projector_lr_factor}
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": config.weight_decay if name in ("matrices", "projectors") else 0.0,
            "factor": factors.get(name, 1.0),
        }
        for name, parameters in groups.items()
        if parameters
    ]


def build_optimisers(module: Distillation, train: TrainConfig, temperature: TemperatureConfig) -> Optimisers:
    """AdamW over the student's groups, or DOT, which knows one group; SGD without momentum or decay over the
    temperature's parameters, or Adam where it is minimised."""
    student: torch.optim.Optimizer
    if train.optimiser == "dot":
        group = {"name": "all", "params": module.steered(), "factor": 1.0}
        student = DOT([group], train.lr, train.momentum, train.momentum_gap, train.weight_decay)
    else:
        groups, betas = student_groups(module, train), (train.beta1, train.beta2)
        student = torch.optim.AdamW(groups, lr=train.lr, betas=betas, fused=True)
    if module.temperature is None:
        return Optimisers(student)
    kind = torch.optim.SGD if temperature.mode == "learned" else torch.optim.Adam
    return Optimisers(student, kind(module.temperature.parameters(), lr=temperature.lr))


def set_learning_rates(optimiser: torch.optim.Optimizer, config: TrainConfig, step: int, total: int) -> float:
    """Write the rates of the update that follows ``step`` of ``total`` updates; returns the matrices' rate."""
    lr = learning_rate(config, step, total)
    for group in optimiser.param_groups:
        group["lr"] = lr * group["factor"]
    return lr


def plain_adamw(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices; ``named`` are (dotted name, parameter)."""
    every = list(named)
    groups = [
        {"params": [p for name, p in every if is_matrix(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in every if not is_matrix(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def set_warmup_cosine(
    optimiser: torch.optim.Optimizer,
    config: FinetuneConfig | GeneralConfig | TaskTrainConfig | TransferConfig,
    step: int,
    total: int,
) -> float:
    """Write and return the rate of the update that follows ``step`` of ``total`` updates, one for all groups."""
    lr = config.lr * warmup_cosine(step, total, config.warmup, config.lr_end)
    for group in optimiser.param_groups:
        group["lr"] = lr
    return lr


def clip(
    module: Distillation, train: TrainConfig, temperature: TemperatureConfig, handed_over: Sequence[Tensor] = ()
) -> float:
    """Clip the global norm of what the student's optimiser moves, and that of the temperature's gradient apart.

    ``handed_over`` are gradients that the optimiser was given apart: they count and are scaled together with ``.grad``.
    Returns the norm before.

    Raises:
        FloatingPointError: the norm is not finite, so that a step would spoil the weights.
    """
    steered = module.steered()
    norm = torch.nn.utils.get_total_norm([p.grad for p in steered if p.grad is not None] + list(handed_over))
    if not math.isfinite(norm.item()):
        raise FloatingPointError(f"the norm of the gradient is {norm.item()}: lower train.lr, or look at the batch")
    torch.nn.utils.clip_grads_with_norm_(steered, train.clip, norm)
    for gradient in handed_over:
        gradient.mul_((train.clip / (norm + 1e-6)).clamp(max=1.0))
    if module.temperature is not None:
        torch.nn.utils.clip_grad_norm_(module.temperature.parameters(), temperature.clip)
    return norm.item()
