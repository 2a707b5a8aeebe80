"""The neuron in front of a weight matrix, and the product that takes its spikes.

Shapes: ... any, B batch, L tokens, C channels, T micro-steps.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asnn_goose.config.annealing import Annealed
from asnn_goose.config.schema import COUNTED, SPIKING
from asnn_goose.kernels.count import count, token_scale
from asnn_goose.kernels.count.tally import tally
from asnn_goose.kernels.lif import lif, lif_rate
from asnn_goose.kernels.lif.surrogate import DEFAULT_WIDTH
from asnn_goose.kernels.precision import widened
from asnn_goose.models.counts import SpikeStatistics, digits, levels, weighted


@dataclass
class Membranes:
    """What the neurons of a block carry from token to token through one call, where ``membrane`` is ``sequence``."""

    keep_BL1: Tensor | None = None
    """0 on padding, which has no current; None: there is none."""
    after: dict["Neuron", Tensor] = field(default_factory=dict)
    """Neuron -> membrane behind the last token that it saw; one that is missing starts at 0."""


class Neuron(nn.Module):
    """Turns an analog current into the mean spike s of T micro-steps and a gain, so that the current is about s * gain.

    The current is divided by theta and, with ``scale: token``, by the token's mean |x|, and drives a membrane with
    threshold 1: the same dynamics as threshold theta, and the gradient of theta comes from both places it is used,

        s = lif_rate(x / gain),    gain = theta * mean_c |x_c|,    operand of the product: s in {-1, -1+1/T, ..., 1}

    With a fresh membrane per token this is a quantiser of 2T + 1 levels (T + 1 for binary) that rounds towards 0, or
    with ``offset`` 0.5, which adds half a threshold over the micro-steps in the current's direction (a membrane that
    starts half way gives binary spikes the same counts, arXiv 2303.04347), to the nearest; a decay below 1 widens its
    dead zone. kind ``integer`` takes the count of these ternary spikes at once, with a gradient of 1 within the range
    and 0 beyond (I-LIF, arXiv 2407.20708), and unfolds it into the same spikes at inference.

    kind ``radix`` is charged once, with N |x| / gain, and the weight of a spike falls from micro-step to micro-step by
    ``base``, and the threshold with it (radix encoding, arXiv 2105.06943):

        v_0 = N min(|x| / gain, 1) + offset,   w_t = base^(T-1-t),   N = sum_t w_t,   s = sum_t w_t s_t / N

        base 2:  s_t = sign(x) [v_t >= w_t],                      v_{t+1} = v_t - w_t |s_t|
        base 3:  s_t = sign(x) ([v_t >= w_t / 2] - [v_t < -w_t / 2]),    v_{t+1} = v_t - w_t sign(x) s_t

    so that T ternary spikes tell 2N + 1 levels apart: 31 at T = 4 with base 2, and all 81 = 3^4 that there are with
    base 3, whose later spikes can take back what the earlier were too much (balanced ternary digits), so that it rounds
    to the nearest without an offset. kind ``quantised`` rounds to the nearest of 2T + 1 levels, with
    the gradient of ``integer``, and is no count of spikes; kind ``dense`` returns the current itself. ``silence`` holds
    back the spikes of currents that are small beside the token's mean |x|, whatever theta.

    With ``membrane: sequence`` the membrane of a ternary or binary neuron is charged afresh at the first token alone,
    and the T micro-steps of a token start from what those of the token before left:

        v_{l,0} = v_{l-1,T} (0 for l = 0),    s_l = lif(x_l / gain_l over T micro-steps, from v_{l,0}).mean

    It is in units of theta times the scale of the token that is being read: with ``scale: token`` what one token leaves
    is worth gain_l in the next, whatever gain_{l-1} was.

    Args:
        channels: C.
        settings: the fields of config.schema.NeuronConfig.
    """

    def __init__(self, channels: int, settings: dict[str, Any]):
        super().__init__()
        self.channels, self.settings = channels, settings
        self.kind, self.steps, self.base = settings["kind"], settings["steps"], settings["base"]
        self.along_tokens = settings["membrane"] == "sequence"
        self.annealed = Annealed()
        """Of training steps; in eval mode the neuron is as configured."""
        self.silence: Tensor | None
        silenced = self.kind in COUNTED and (settings["silence"] > 0.0 or settings["sparsity"] is not None)
        self.register_buffer("silence", torch.empty(()) if silenced else None)
        shape = {"fixed": (), "layer": (), "channel": (channels,)}
        spiking = self.kind in ("ternary", "binary")
        log_threshold = torch.empty(shape[settings["learn_threshold"]])
        if settings["learn_threshold"] == "fixed" or self.kind == "dense":
            self.register_buffer("log_threshold", log_threshold)
        else:
            self.log_threshold = nn.Parameter(log_threshold)
        if settings["learn_decay"] == "fixed" or not spiking:
            self.decay_logit = None
        else:
            self.decay_logit = nn.Parameter(torch.empty(shape[settings["learn_decay"]]))
        self._recorded: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Threshold, decay and silence as the settings say."""
        nn.init.constant_(self.log_threshold, math.log(self.settings["threshold"]))
        if self.silence is not None:
            nn.init.constant_(self.silence, self.settings["silence"])
        if self.decay_logit is not None:
            decay = self.settings["decay"]
            nn.init.constant_(self.decay_logit, math.log(decay / (1.0 - decay)))

    @property
    def levels(self) -> int:
        """N: operands are k / N, |k| <= N."""
        return levels(self.kind, self.steps, self.base)

    @property
    def weights(self) -> list[float]:
        """Share of each micro-step's spike in s; their sum is 1."""
        if self.kind == "radix":
            return [self.base**t / self.levels for t in reversed(range(self.steps))]
        return [1.0 / self.steps] * self.steps

    @property
    def threshold(self) -> Tensor:
        """theta > 0, scalar or [C], in units of the scaled current."""
        return self.log_threshold.exp()

    @property
    def decay(self) -> Tensor | float:
        """beta in [0, 1], scalar or [C], per micro-step."""
        return self.settings["decay"] if self.decay_logit is None else torch.sigmoid(self.decay_logit)

    def scale(self, x: Tensor) -> Tensor | float:
        """mean_c |x_c| of each token, or 1 with ``scale: none``."""
        return token_scale(x) if self.settings["scale"] == "token" else 1.0

    def gain(self, x: Tensor) -> Tensor:
        """theta times the token's scale, broadcastable against x."""
        return self.threshold * self.scale(x)

    def _with_offset(self, u: Tensor, steps: int) -> Tensor:
        """The current in units of theta, with the offset's share of each micro-step."""
        offset = self.settings["offset"]
        return u + u.detach().sign() * (offset / steps) if offset else u

    def _dynamics(self, width: float = 1.0) -> dict[str, Any]:
        dynamics = {name: self.settings[name] for name in ("reset", "detach_reset", "surrogate", "width", "backend")}
        if width != 1.0:
            dynamics["width"] = width * (dynamics["width"] or DEFAULT_WIDTH[dynamics["surrogate"]])
        kind = "binary" if self.kind == "binary" else "ternary"
        return dynamics | {"threshold": 1.0, "decay": self.decay, "kind": kind}

    def _from_token_to_token(self, u: Tensor, steps: int, width: float, membranes: Membranes | None) -> Tensor:
        """Spikes [T, ..., L, C] of one membrane over the L T micro-steps of currents [..., L, C] in units of theta."""
        membranes = Membranes() if membranes is None else membranes
        if membranes.keep_BL1 is not None:
            u = u * membranes.keep_BL1
        currents = u.movedim(-2, 0).repeat_interleave(steps, 0)
        spikes, membranes.after[self] = lif(currents, v0=membranes.after.get(self), **self._dynamics(width))
        return spikes.unflatten(0, (-1, steps)).movedim(0, -2)

    def forward(self, x: Tensor, membranes: Membranes | None = None) -> tuple[Tensor, Tensor | None]:
        """(s, gain): mean spike in [-1, 1] and the factor that turns it back into units of x; float32 or float64.

        A dense neuron gives the current itself and None. ``membranes`` is read and written by neurons whose membrane
        lives on; they take x [..., L, C], and start at 0 without it.
        """
        x = widened(x)
        if self.kind == "dense":
            return x, None
        mix, factor, width, more = self.annealed if self.training else Annealed()
        steps = self.steps + more
        spikes = None
        if self.kind in COUNTED:
            s, gain = self._counted(x, steps, factor)
        else:
            gain = self.gain(x) if factor == 1.0 else self.gain(x) * factor
            u = x / gain
            if self.along_tokens:
                spikes = self._from_token_to_token(u, steps, width, membranes)
                s = spikes.sum(0) / steps
            else:
                s = lif_rate(self._with_offset(u, steps), steps, **self._dynamics(width))
        if mix < 1.0:
            s = mix * s + (1.0 - mix) * (x / gain)
        if self._recorded is not None:
            self._record(s.detach(), spikes)
        return s, gain

    def spikes(self, x: Tensor, membranes: Membranes | None = None) -> tuple[Tensor, Tensor]:
        """(spikes [T, ..., C] in {-1, 0, 1}, gain): the micro-steps one by one."""
        x = widened(x)
        if self.kind == "radix":
            s, gain = self._counted(x, self.steps)
            spikes = s.sign() * digits((s.abs() * self.levels).round(), self.steps, self.base)
        else:
            gain = self.gain(x)
            u = x / gain
            if self.along_tokens:
                spikes = self._from_token_to_token(u, self.steps, 1.0, membranes)
            else:
                heard = u if self.silence is None else torch.where(u.abs() < self.silence / self.threshold, 0.0, u)
                spikes = lif(self._with_offset(heard, self.steps).expand(self.steps, *x.shape), **self._dynamics())[0]
        if self._recorded is not None:
            self._record(weighted(self.weights, spikes.detach()), spikes)
        return spikes, gain

    def _counted(self, x: Tensor, steps: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """(s, gain) of the kinds that count a token's spikes at once, with theta times ``factor``."""
        rounds = self.kind == "quantised" or (self.kind == "radix" and self.base == 3)
        return count(
            x,
            levels(self.kind, steps, self.base),
            threshold=self.threshold if factor == 1.0 else self.threshold * factor,
            per_token=self.settings["scale"] == "token",
            offset=0.5 if rounds else self.settings["offset"],
            silence=self.silence,
            backend=self.settings["backend"],
        )

    def start_recording(self) -> None:
        """Count spikes from now on (see :meth:`stop_recording`)."""
        self._recorded = torch.zeros(4, self.channels, dtype=torch.int64)

    def _record(self, s: Tensor, spikes: Tensor | None) -> None:
        """``spikes`` [T, ..., C] where they are known: a membrane that lives on can fire both ways in one token."""
        assert self._recorded is not None
        spikes_K = torch.arange(self.levels + 1)
        if self.kind == "radix":
            spikes_K = digits(spikes_K.double(), self.steps, self.base).abs().sum(0).long()
        new = tally(s, self.levels, spikes_K, self.steps).cpu()
        if spikes is not None:
            fired = spikes.detach().abs().sum(0).reshape(-1, self.channels)
            new[0], new[2] = fired.sum(0), (fired == self.steps).sum(0)
        self._recorded[:3] += new
        self._recorded[3] += s.numel() // self.channels

    def stop_recording(self) -> SpikeStatistics:
        """Counts since :meth:`start_recording`."""
        assert self._recorded is not None, "start_recording comes first"
        spikes_C, nonzero_C, full_C, tokens_C = self._recorded.unbind(0)
        self._recorded = None
        return SpikeStatistics(int(tokens_C[0]), spikes_C, nonzero_C, full_C)


def anneal(model: nn.Module, annealed: Annealed) -> None:
    """Tell every neuron of a model how far it is from its configuration while it trains."""
    for module in model.modules():
        if isinstance(module, Neuron):
            module.annealed = annealed


class SpikingLinear(nn.Module):
    """y = (s W^T) gain with s = Neuron(x): the matrix product's operand are spikes.

    ``form`` chooses how the mean spike meets the matrix: ``rate`` multiplies the mean once, ``steps`` multiplies every
    micro-step's spikes and takes the mean of the products, weighted as the neuron weighs its micro-steps. The product
    is linear, so the two agree up to rounding.
    """

    def __init__(self, inputs: int, outputs: int, neuron: dict[str, Any]):
        super().__init__()
        self.neuron = Neuron(inputs, neuron)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.form = "rate"

    def forward(self, x: Tensor, membranes: Membranes | None = None) -> Tensor:
        if self.form == "steps" and self.neuron.kind in SPIKING:
            spikes, gain = self.neuron.spikes(x, membranes)
            return weighted(self.neuron.weights, self._product(spikes, gain))
        s, gain = self.neuron(x, membranes)
        N = self.neuron.levels
        if N & (N - 1) and gain is not None:
            # Under autocast the product is bfloat16, which holds every count up to 256, but k / N for powers of 2 only.
            s, gain = s * N, gain / N
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
