"""RWKV-7's time mix with spikes in front of receptance, key, value and output (arXiv 2503.14456).

Analog stay: the decay w, the in-context rate a, the value residual and the gate (low-rank products of the analog
input), the removal direction kappa, the recurrent state and the norms.

Shapes: B batch, L tokens, C channels, H heads, D channels of a head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.initialization import copy_

from asnn_goose.kernels.unit_length import unit_length
from asnn_goose.kernels.wkv7 import LOG_W_MIN, wkv7
from asnn_goose.models.channel_mix import shifted
from asnn_goose.models.spiking import Membranes, SpikingLinear

GROUP_NORM_EPS = 64e-5
"""RWKV-7's epsilon of the norm over each head's output."""
POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""Input of the mix -> power by which its share of the token before starts spread over the channels."""


class TimeMixState(NamedTuple):
    """What one layer carries from token to token."""

    previous_BC: Tensor
    wkv_BHDD: Tensor


def low_rank(width: int, factor: float, power: float) -> int:
    """Rank of a low-rank product: RWKV-7's factor * width^power, in steps of 8 and at least 8.

    The published floor of 32 suits widths from 1024 on; a narrow student would spend more on it than on a full matrix.
    """
    return max(8, round(factor * width**power / 8) * 8)


class LowRank(nn.Module):
    """act(x A) B + bias, with A = 0 and B orthogonal x 0.1 at the start, as in RWKV-7."""

    def __init__(self, width: int, rank: int, activation=None):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.empty(width, rank))
        self.bias_C = nn.Parameter(torch.empty(width))
        self.activation = activation

    def reset_parameters(self, bias_C: Tensor) -> None:
        nn.init.zeros_(self.down)
        nn.init.orthogonal_(self.up, gain=0.1)
        copy_(self.bias_C, bias_C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.down.to(x.dtype))
        y = F.linear(hidden if self.activation is None else self.activation(hidden), self.up.to(x.dtype)).to(x.dtype)
        return y + self.bias_C


class TimeMix(nn.Module):
    """One layer's WKV-7 recurrence between spiking projections.

    r, k, v = R N(x_r), K N(x_k), V N(x_v)           x_i = x + (x_{t-1} - x) mu_i, N neurons
    log w   = -e^{-1/2} sigmoid(w0 + tanh(x_w A) B)  a = sigmoid(a0 + x_a A B),  g = 1 + sigmoid(x_g A) B
    kappa   = k xi / |k xi| per head,  k <- k (1 + (a - 1) alpha),  v <- v + (v_first - v) sigmoid(v0 + x_v A B)
    y       = wkv7(r, log w, k, v, -kappa, kappa a)
    out     = O N(g (GroupNorm(y) + (sum_d r k rho) v))

    The converted form has room for a softmax attention's query, key, value and output matrices (RADLADS, arXiv
    2505.03005, leaves token shift, value residual and group norm out likewise): r and k are of unit length in each
    head, y goes on without GroupNorm, nothing is blended into v, mu of r, k and v starts at 0, and ``out`` has a bias,
    since an attention that rests on the first token adds a constant.
    """

    def __init__(self, config, layer: int):
        super().__init__()
        C, self.heads = config.hidden_size, config.hidden_size // config.head_size
        self.head_size, self.layer, self.layers = config.head_size, layer, config.num_hidden_layers
        self.wkv_backend, self.wkv_chunk = config.wkv_backend, config.wkv_chunk
        self.converted = config.time_mix == "converted"
        for name in POWERS:
            self.register_parameter(f"mix_{name}_C", nn.Parameter(torch.empty(C)))
        self.decay = LowRank(C, low_rank(C, 1.8, 0.5), torch.tanh)
        self.rate = LowRank(C, low_rank(C, 1.8, 0.5))
        blends = layer > 0 and not self.converted
        self.value_residual = LowRank(C, low_rank(C, 1.3, 0.5)) if blends else None
        self.gate = LowRank(C, low_rank(C, 0.6, 0.8), torch.sigmoid)

        self.removal_C, self.key_rate_C = nn.Parameter(torch.empty(C)), nn.Parameter(torch.empty(C))
        self.bonus_HD = nn.Parameter(torch.empty(self.heads, self.head_size))
        if self.converted:
            self.output_bias_C = nn.Parameter(torch.empty(C))
        else:
            self.norm_weight_C, self.norm_bias_C = nn.Parameter(torch.empty(C)), nn.Parameter(torch.empty(C))
        self.receptance, self.key, self.value, self.output = (SpikingLinear(C, C, config.neuron) for _ in range(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """RWKV-7's start; the output matrix begins at 0, so that the block is the identity."""
        C = len(self.removal_C)
        ratio_1_to_0 = 1.0 - self.layer / self.layers
        ratio_0_to_1 = self.layer / max(self.layers - 1, 1)
        position = torch.arange(C) / C
        linear = torch.arange(C) / max(C - 1, 1) - 0.5
        within = (torch.arange(C) % self.head_size) / max(self.head_size - 1, 1) * 2.0 - 1.0
        zigzag = within * within.abs()
        for name, power in POWERS.items():
            spread = torch.zeros(C) if self.converted and name in "rkv" else 1.0 - position ** (power * ratio_1_to_0)
            copy_(self.get_parameter(f"mix_{name}_C"), spread)

        decay = -6.0 + 6.0 * (torch.arange(C) / max(C - 1, 1)) ** (1.0 + ratio_0_to_1**0.3)
        self.decay.reset_parameters(decay + 0.5 + 2.5 * zigzag)
        self.rate.reset_parameters(-0.19 + 0.3 * zigzag + 0.4 * linear)
        if self.value_residual is not None:
            self.value_residual.reset_parameters(0.73 - 0.4 * linear)
        # RWKV-7's gate has no bias; without one, channels whose gate starts near 0 never reach the threshold behind it.
        self.gate.reset_parameters(torch.ones(C))

        copy_(self.removal_C, 0.71 - 0.1 * linear)
        nn.init.constant_(self.key_rate_C, 1.02)
        nn.init.constant_(self.bonus_HD, -0.04)
        if self.converted:
            nn.init.zeros_(self.output_bias_C)
        else:
            nn.init.constant_(self.norm_weight_C, ((1.0 + self.layer) / self.layers) ** 0.7)
            nn.init.zeros_(self.norm_bias_C)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        x_BLC: Tensor,
        state: TimeMixState | None = None,
        v_first_BLC: Tensor | None = None,
        membranes: Membranes | None = None,
    ) -> tuple[Tensor, TimeMixState, Tensor]:
        """(output_BLC, state after the last token, the first layer's values, which later layers blend in)."""
        previous_BLC = shifted(x_BLC, None if state is None else state.previous_BC)
        r_in, w_in, k_in, v_in, a_in, g_in = (
            torch.lerp(x_BLC, previous_BLC, self.get_parameter(f"mix_{name}_C")) for name in "rwkvag"
        )
        r_BLC, k_BLC = self.receptance(r_in, membranes), self.key(k_in, membranes)
        v_BLC = self.value(v_in, membranes)
        log_w_BLC = LOG_W_MIN * torch.sigmoid(self.decay(w_in))
        rate_BLC = torch.sigmoid(self.rate(a_in))
        if self.value_residual is not None and v_first_BLC is not None:
            blend_BLC = torch.sigmoid(self.value_residual(v_in)).to(v_BLC.dtype)
            v_BLC = torch.lerp(v_BLC, v_first_BLC, blend_BLC)

        def heads(x):
            return rearrange(x, "b l (h d) -> b l h d", h=self.heads)

        kappa_BLHD = unit_length(heads(k_BLC * self.removal_C))
        k_BLC = k_BLC * (1.0 + (rate_BLC - 1.0) * self.key_rate_C)
        r, k, v, rate = (heads(x) for x in (r_BLC, k_BLC, v_BLC, rate_BLC))
        if self.converted:
            r, k = unit_length(r), unit_length(k)
        y_BLHD, wkv_BHDD = wkv7(
            r, heads(log_w_BLC), k, v, -kappa_BLHD, kappa_BLHD * rate,
            state=None if state is None else state.wkv_BHDD, chunk_size=self.wkv_chunk, backend=self.wkv_backend,
        )  # fmt: skip
        bonus_BLHD = (r * k * self.bonus_HD).sum(-1, keepdim=True) * v
        y_BLHD = y_BLHD if self.converted else self._group_norm(y_BLHD)
        y_BLC = rearrange(y_BLHD + bonus_BLHD, "b l h d -> b l (h d)")
        out_BLC = self.output(y_BLC * self.gate(g_in), membranes)
        out_BLC = out_BLC + self.output_bias_C if self.converted else out_BLC
        return out_BLC, TimeMixState(x_BLC[:, -1], wkv_BHDD), v_BLC if v_first_BLC is None else v_first_BLC

    def _group_norm(self, y_BLHD: Tensor) -> Tensor:
        weight_HD = self.norm_weight_C.view(self.heads, self.head_size)
        bias_HD = self.norm_bias_C.view(self.heads, self.head_size)
        return F.layer_norm(y_BLHD, (self.head_size,), eps=GROUP_NORM_EPS) * weight_HD + bias_HD
