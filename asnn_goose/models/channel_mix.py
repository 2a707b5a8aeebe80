"""RWKV-7's channel mix, or a transformer's gated MLP in its place, with spikes in front of every matrix.

Shapes: B batch, L tokens, C channels, F hidden channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.initialization import copy_

from asnn_goose.models.spiking import Membranes, SpikingLinear


def shifted(x_BLC: Tensor, previous_BC: Tensor | None) -> Tensor:
    """Each token's predecessor; the first one's is ``previous_BC`` (None: 0)."""
    first = torch.zeros_like(x_BLC[:, :1]) if previous_BC is None else previous_BC[:, None].to(x_BLC.dtype)
    return torch.cat([first, x_BLC[:, :-1]], 1)


class ChannelMix(nn.Module):
    """With x' = x + (x_{t-1} - x) mu and N the neurons:

    relu2   V N(relu(K N(x'))^2); relu^2 is never negative, so its spikes count upwards
    gated   V N(silu(G s) * (U s)), s = N(x'): gate and up share one neuron and stand, in this order, in ``key``;
            mu starts at 0, where the published one is spread over the channels
    """

    def __init__(self, config, layer: int):
        super().__init__()
        C, hidden = config.hidden_size, config.channel_mix_size
        self.gated, self.depth = config.channel_mix == "gated", layer / config.num_hidden_layers
        self.mix_C = nn.Parameter(torch.empty(C))
        self.key = SpikingLinear(C, 2 * hidden if self.gated else hidden, config.neuron)
        self.value = SpikingLinear(hidden, C, config.hidden_neuron)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """RWKV-7's start: orthogonal key, value 0, so that the block begins as the identity."""
        position = torch.arange(len(self.mix_C)) / len(self.mix_C)
        copy_(self.mix_C, torch.zeros_like(position) if self.gated else 1.0 - position ** ((1.0 - self.depth) ** 4))
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def forward(
        self, x_BLC: Tensor, previous_BC: Tensor | None = None, membranes: Membranes | None = None
    ) -> tuple[Tensor, Tensor]:
        """(output_BLC, last token's input_BC, the ``previous_BC`` of the next call)."""
        current_BLC = torch.lerp(x_BLC, shifted(x_BLC, previous_BC), self.mix_C)
        hidden_BLF = self.key(current_BLC, membranes)
        if self.gated:
            gate_BLF, up_BLF = hidden_BLF.chunk(2, -1)
            hidden_BLF = F.silu(gate_BLF) * up_BLF
        else:
            hidden_BLF = torch.relu(hidden_BLF) ** 2
        return self.value(hidden_BLF, membranes), x_BLC[:, -1]
