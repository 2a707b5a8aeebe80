"""The neuron in front of a weight matrix, and the product that takes its spikes.

Shapes: ... any, C channels, T micro-steps.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asnn_goose.errors import UserError
from asnn_goose.kernels.lif import lif, lif_rate

SCALE_FLOOR = 1e-6
"""Smallest per-token scale: a token whose current is 0 everywhere stays 0 instead of becoming NaN."""


@dataclass(frozen=True)
class SpikeStatistics:
    """Counts over everything a neuron has emitted since recording began; all tensors are [C], int64."""

    values: int
    """Tokens."""
    spikes_C: Tensor
    """Sum of |count| over tokens, count in 0..T."""
    nonzero_C: Tensor
    """Tokens on which the channel fired at least once."""
    full_C: Tensor
    """Tokens on which the channel fired at every micro-step."""


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0]


class Neuron(nn.Module):
    """Turns an analog current into the mean spike s of T micro-steps and a gain, so that the current is about s * gain.

    The current is divided by theta and, with ``scale: token``, by the token's mean |x|, and drives a membrane with
    threshold 1: the same dynamics as threshold theta, and the gradient of theta comes from both places it is used,

        s = lif_rate(x / gain),    gain = theta * mean_c |x_c|,    operand of the product: s in {-1, -1+1/T, ..., 1}

    With a fresh membrane per token this is a quantiser of 2T + 1 levels (T + 1 for binary) that rounds towards 0, or
    with ``offset`` 0.5, which adds half a threshold over the micro-steps in the current's direction (a membrane that
    starts half way gives binary spikes the same counts, arXiv 2303.04347), to the nearest; a decay below 1 widens its
    dead zone. kind ``quantised`` rounds to the nearest of the same
    levels instead, with a straight-through gradient; kind ``dense`` returns the current itself.

    Args:
        channels: C.
        settings: the fields of config.schema.NeuronConfig.

    Raises:
        UserError: the decay is to be learned and starts at 0 or 1, where its logit is infinite.
    """

    def __init__(self, channels: int, settings: dict[str, Any]):
        super().__init__()
        self.channels, self.settings = channels, settings
        self.kind, self.steps = settings["kind"], settings["steps"]
        shape = {"fixed": (), "layer": (), "channel": (channels,)}
        spiking = self.kind in ("ternary", "binary")
        log_threshold = torch.full(shape[settings["learn_threshold"]], math.log(settings["threshold"]))
        if settings["learn_threshold"] == "fixed" or self.kind == "dense":
            self.register_buffer("log_threshold", log_threshold)
        else:
            self.log_threshold = nn.Parameter(log_threshold)
        if settings["learn_decay"] == "fixed" or not spiking:
            self.decay_logit = None
        elif settings["decay"] >= 1.0 or settings["decay"] <= 0.0:
            raise UserError(
                f"a neuron's decay of {settings['decay']} cannot be learned (learn_decay: {settings['learn_decay']}): "
                "start it strictly between 0 and 1"
            )
        else:
            start = math.log(settings["decay"] / (1.0 - settings["decay"]))
            self.decay_logit = nn.Parameter(torch.full(shape[settings["learn_decay"]], start))
        self._recorded: Tensor | None = None

    @property
    def threshold(self) -> Tensor:
        """theta > 0, scalar or [C], in units of the scaled current."""
        return self.log_threshold.exp()

    @property
    def decay(self) -> Tensor | float:
        """beta in [0, 1], scalar or [C], per micro-step."""
        return self.settings["decay"] if self.decay_logit is None else torch.sigmoid(self.decay_logit)

    def gain(self, x: Tensor) -> Tensor:
        """theta times the token's scale, broadcastable against x."""
        if self.settings["scale"] == "token":
            return self.threshold * x.abs().mean(-1, keepdim=True).clamp_min(SCALE_FLOOR)
        return self.threshold

    def _current(self, x: Tensor, gain: Tensor) -> Tensor:
        """The current in units of theta, with the offset's share of each micro-step."""
        u, offset = x / gain, self.settings["offset"]
        return u + u.detach().sign() * (offset / self.steps) if offset else u

    def _dynamics(self) -> dict[str, Any]:
        names = ("kind", "reset", "detach_reset", "surrogate", "width", "backend")
        return {"threshold": 1.0, "decay": self.decay} | {name: self.settings[name] for name in names}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(s, gain): mean spike in [-1, 1] and the factor that turns it back into units of x; float32 or float64.

        A dense neuron gives the current itself and None.
        """
        x = x if x.dtype == torch.float64 else x.float()
        if self.kind == "dense":
            return x, None
        gain = self.gain(x)
        if self.kind == "quantised":
            s = _RoundStraightThrough.apply((x / gain).clamp(-1.0, 1.0) * self.steps) / self.steps
        else:
            s = lif_rate(self._current(x, gain), self.steps, **self._dynamics())
        if self._recorded is not None:
            self._record(s.detach())
        return s, gain

    def spikes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(spikes [T, ..., C] in {-1, 0, 1}, gain): the micro-steps one by one."""
        x = x if x.dtype == torch.float64 else x.float()
        gain = self.gain(x)
        currents = self._current(x, gain).expand(self.steps, *x.shape)
        spikes = lif(currents, **self._dynamics())[0]
        if self._recorded is not None:
            self._record(spikes.detach().mean(0))
        return spikes, gain

    def start_recording(self) -> None:
        """Count spikes from now on (see :meth:`stop_recording`)."""
        self._recorded = torch.zeros(4, self.channels, dtype=torch.int64)

    def _record(self, s: Tensor) -> None:
        assert self._recorded is not None
        # Sums of small whole numbers are exact in floating point, and several times faster than in int64.
        counts = (s.reshape(-1, self.channels).abs() * self.steps).round()
        full = (counts == self.steps).to(counts.dtype)
        new = torch.stack([counts.sum(0), counts.sign().sum(0), full.sum(0)])
        self._recorded[:3] += new.to(torch.int64).cpu()
        self._recorded[3] += counts.shape[0]

    def stop_recording(self) -> SpikeStatistics:
        """Counts since :meth:`start_recording`."""
        assert self._recorded is not None, "start_recording comes first"
        spikes_C, nonzero_C, full_C, tokens_C = self._recorded.unbind(0)
        self._recorded = None
        return SpikeStatistics(int(tokens_C[0]), spikes_C, nonzero_C, full_C)


class SpikingLinear(nn.Module):
    """y = (s W^T) gain with s = Neuron(x): the matrix product's operand are spikes.

    ``form`` chooses how the mean spike meets the matrix: ``rate`` multiplies the mean once, ``steps`` multiplies every
    micro-step's spikes and takes the mean of the products. The product is linear, so the two agree up to rounding.
    """

    def __init__(self, inputs: int, outputs: int, neuron: dict[str, Any]):
        super().__init__()
        self.neuron = Neuron(inputs, neuron)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.form = "rate"

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "steps" and self.neuron.kind in ("ternary", "binary"):
            spikes, gain = self.neuron.spikes(x)
            return self._product(spikes, gain).mean(0)
        s, gain = self.neuron(x)
        T = self.neuron.steps
        if T & (T - 1) and gain is not None:
            # Under autocast the product is bfloat16, which holds every count up to 256, but k / T for powers of 2 only.
            s, gain = s * T, gain / T
        return self._product(s, gain)

    def _product(self, s: Tensor, gain: Tensor | None) -> Tensor:
        if gain is not None and gain.ndim and gain.shape[-1] > 1:
            # A gain per channel cannot leave the sum over channels: its threshold part scales the matrix's columns.
            threshold_C = self.neuron.threshold
            y = F.linear(s, (self.weight * threshold_C).to(s.dtype)).to(s.dtype)
            return y * (gain[..., :1] / threshold_C[:1])
        # Whatever the dtype of the product, the gain is applied in the state's.
        y = F.linear(s, self.weight.to(s.dtype)).to(s.dtype)
        return y if gain is None else y * gain
