"""RWKV-7's channel mix with spikes in front of both matrices.

Shapes: B batch, L tokens, C channels, F hidden channels.
"""

import torch
from torch import Tensor, nn

from asnn_goose.models.spiking import SpikingLinear


def shifted(x_BLC: Tensor, previous_BC: Tensor | None) -> Tensor:
    """Each token's predecessor; the first one's is ``previous_BC`` (None: 0)."""
    first = torch.zeros_like(x_BLC[:, :1]) if previous_BC is None else previous_BC[:, None].to(x_BLC.dtype)
    return torch.cat([first, x_BLC[:, :-1]], 1)


class ChannelMix(nn.Module):
    """V N(relu(K N(x + (x_{t-1} - x) mu))^2), N the neurons; relu^2 is never negative, so its spikes count upwards."""

    def __init__(self, config, layer: int):
        super().__init__()
        C, hidden = config.hidden_size, config.channel_mix_size
        ratio = 1.0 - layer / config.num_hidden_layers
        position = torch.arange(C) / C
        self.mix_C = nn.Parameter(1.0 - position ** (ratio**4))
        self.key = SpikingLinear(C, hidden, config.neuron)
        self.value = SpikingLinear(hidden, C, config.hidden_neuron)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """RWKV-7's start: orthogonal key, value 0, so that the block begins as the identity."""
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x_BLC: Tensor, previous_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(output_BLC, last token's input_BC, the ``previous_BC`` of the next call)."""
        current_BLC = torch.lerp(x_BLC, shifted(x_BLC, previous_BC), self.mix_C)
        hidden_BLF = torch.relu(self.key(current_BLC)) ** 2
        return self.value(hidden_BLF), x_BLC[:, -1]
