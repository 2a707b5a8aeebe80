"""Thresholds that are set from data, so that a chosen share of the operands is 0 before the first step.

Shapes: ... any, C channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from asnn_goose.models.spiking import Neuron


def silence_for(neuron: Neuron, x: Tensor) -> float:
    """The smallest scaled current above a share ``settings["sparsity"]`` of x [..., C]."""
    size = (x.relu() if neuron.kind == "binary" else x.abs()) / neuron.scale(x)
    flat = size.flatten().float()
    rank = min(flat.numel(), max(1, round(neuron.settings["sparsity"] * flat.numel())))
    return torch.kthvalue(flat, rank).values.item()


def threshold_for(neuron: Neuron, x: Tensor) -> float:
    """theta at which a share ``settings["sparsity"]`` of currents x [..., C] stays silent through all micro-steps.

    A membrane without a spike reaches u S + o S / T after T micro-steps, S = sum_{t<T} decay^t, u = |x| / (theta scale)
    and o the offset; it stays below 1 where |x| / scale < theta (1 / S - o / T). Hence

        theta = q / (1 / S - o / T)

    with q = :func:`silence_for`. A binary neuron is silent on negative currents as well, which count as 0 here. Where
    so many currents are 0 anyway, as behind relu^2, q is 0 and theta stays as it is configured.
    """
    q = silence_for(neuron, x)
    if q == 0.0:
        return float(neuron.settings["threshold"])
    T = neuron.steps
    charge = sum(float(neuron.settings["decay"]) ** t for t in range(T))
    return q / (1.0 / charge - neuron.settings["offset"] / T)


@contextmanager
def fitting_thresholds(model: nn.Module) -> Iterator[None]:
    """Within it, what passes through a neuron with a ``sparsity`` first sets its theta or silence, then fires: one
    forward pass sets those of a whole model in the order in which they are met."""

    def fit(neuron: Neuron, arguments: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            x = arguments[0].float()
            if neuron.silence is None:
                neuron.log_threshold.fill_(threshold_for(neuron, x)).log_()
            else:
                neuron.silence.fill_(silence_for(neuron, x))

    hooks = [
        module.register_forward_pre_hook(fit)
        for module in model.modules()
        if isinstance(module, Neuron) and module.settings["sparsity"] is not None and module.kind != "dense"
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
