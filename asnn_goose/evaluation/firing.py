"""What the student's neurons emit on evaluation text: rates, silent and saturated channels, operands, a raster.

Shapes: B windows, L tokens, T micro-steps, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asnn_goose.kernels.count.tally import on_and_off_levels
from asnn_goose.models import GooseForCausalLM, GooseForSequenceClassification
from asnn_goose.models.spiking import SpikeStatistics, SpikingLinear

AnyStudent = GooseForCausalLM | GooseForSequenceClassification
SITES = {
    "time_mix.receptance": "receptance",
    "time_mix.key": "key",
    "time_mix.value": "value",
    "time_mix.output": "output",
    "channel_mix.key": "channel_key",
    "channel_mix.value": "channel_value",
}
"""Names of the usual projections; another one is called by its path with underscores for dots."""


@dataclass(frozen=True)
class SiteFiring:
    """One population on the evaluated text; a dense neuron's has no spikes at all."""

    layer: int
    """Block, counted from 1."""
    site: str
    channels: int
    outputs: int
    """Rows of the matrix that takes these spikes."""
    rate: float
    """Share of (token, channel, micro-step) that spike."""
    zero_fraction: float
    """Share of (token, channel) whose spikes add up to 0."""
    dead_fraction: float
    """Share of channels that never spiked."""
    saturated_fraction: float
    """Share of channels that spiked at every micro-step of every token."""
    operand_fraction: float
    """Share of the operands other than 0 that lie on the neuron's levels k / N, |k| <= N; 1 for spikes (also where
    none came), about 0 for analog values."""
    steps: int
    """Micro-steps per token; 1 for a dense neuron."""
    threshold: float
    """theta, mean over channels, in units of the scaled current."""
    decay: float
    """beta, mean over channels."""
    tokens: int
    """Tokens seen, padding among them."""
    spikes: int
    """Over tokens, channels and micro-steps."""
    active: int
    """Tokens x channels whose operand is a count other than 0."""
    analog: int
    """Tokens x channels whose operand is no count: all of a dense neuron's, else those off the levels k / N."""
    gain_varies: bool
    """Whether the gain behind the product differs from token to token, so that no matrix can take it in."""

    @property
    def additions(self) -> int:
        """What the spikes of all tokens come to in the matrix, micro-step by micro-step."""
        return self.spikes * self.outputs


def projections(student: AnyStudent) -> Iterator[tuple[int, str, SpikingLinear]]:
    """(block from 1, site, projection): every one that a block has, in the order in which it builds them."""
    for index, block in enumerate(student.model.blocks):
        for path, module in block.named_modules():
            if isinstance(module, SpikingLinear):
                yield index + 1, SITES.get(path, path.replace(".", "_")), module


class _Operands:
    """Counts what one projection multiplies."""

    def __init__(self, levels: int):
        self.levels, self.tokens, self.on_level, self.off_level, self.gain_varies = levels, 0, 0, 0, False

    def __call__(self, _module, _inputs, output) -> None:
        s, gain = output[0].detach(), output[1]
        on_level, off_level = on_and_off_levels(s, self.levels)
        self.on_level += on_level
        self.off_level += off_level
        self.tokens += s.numel() // s.shape[-1]
        self.gain_varies |= gain is not None and gain.ndim > 1


@torch.no_grad()
def measure_firing(student: AnyStudent, states: Callable[[Tensor], object], batches: Sequence[Any]) -> list[SiteFiring]:
    """Run ``states`` over ``batches`` and count what every neuron emits; padding is counted like text.

    Args:
        student: the model whose neurons are watched.
        states: input_ids -> anything, by a forward pass of that model.
        batches: with ``input_ids``.

    Raises:
        ValueError: a projection runs in the steps form, whose operands are not watched.
    """
    watched = list(projections(student))
    if any(linear.form != "rate" for _, _, linear in watched):
        raise ValueError("firing is measured in the rate form: set form to rate on every SpikingLinear")
    operands = [_Operands(linear.neuron.levels) for _, _, linear in watched]
    hooks = [
        linear.neuron.register_forward_hook(counter) for (_, _, linear), counter in zip(watched, operands, strict=True)
    ]
    for _, _, linear in watched:
        linear.neuron.start_recording()
    try:
        for batch in batches:
            states(batch.input_ids.to(student.device))
    finally:
        for hook in hooks:
            hook.remove()
        statistics = [linear.neuron.stop_recording() for _, _, linear in watched]
    return [
        _site(layer, site, linear, counts, operand)
        for (layer, site, linear), counts, operand in zip(watched, statistics, operands, strict=True)
    ]


def _site(layer: int, site: str, linear: SpikingLinear, counts: SpikeStatistics, operand: _Operands) -> SiteFiring:
    neuron = linear.neuron
    dense = neuron.kind == "dense"
    values = max(1, counts.values * neuron.channels)
    spikes, active = int(counts.spikes_C.sum()), int(counts.nonzero_C.sum())
    nonzero = operand.on_level + operand.off_level
    return SiteFiring(
        layer=layer,
        site=site,
        channels=neuron.channels,
        outputs=linear.weight.shape[0],
        rate=spikes / values / neuron.steps,
        zero_fraction=1.0 - active / values,
        dead_fraction=float((counts.nonzero_C == 0).double().mean()),
        saturated_fraction=float(((counts.full_C == counts.values) & (counts.full_C > 0)).double().mean()),
        operand_fraction=operand.on_level / nonzero if nonzero else float(not dense),
        steps=1 if dense else neuron.steps,
        threshold=float(neuron.threshold.mean()),
        decay=float(torch.as_tensor(neuron.decay).mean()),
        tokens=operand.tokens,
        spikes=spikes,
        active=active,
        analog=operand.tokens * neuron.channels if dense else operand.off_level,
        gain_varies=operand.gain_varies,
    )


def pooled(sites: Sequence[SiteFiring], field: str, weight: Callable[[SiteFiring], float]) -> float:
    """Weighted mean of one field over the populations."""
    return sum(weight(s) * vars(s)[field] for s in sites) / sum(weight(s) for s in sites)


@torch.no_grad()
def spike_raster(student: AnyStudent, input_ids: Tensor, layer: int, site: str) -> np.ndarray:
    """Spikes [L * T, C] in {-1, 0, 1} of one population on one sequence [1, L], micro-steps innermost."""
    linear = next(m for at, name, m in projections(student) if (at, name) == (layer, site))
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        student(input_ids)
    finally:
        hook.remove()
    spikes_TLC = linear.neuron.spikes(seen[0])[0][:, 0]
    return spikes_TLC.permute(1, 0, 2).flatten(0, 1).to(torch.int8).cpu().numpy()
