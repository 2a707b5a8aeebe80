"""Operations with a plain reference form and faster exact ones."""

from asnn_goose.kernels.lif import lif, lif_rate
from asnn_goose.kernels.linear_divergence import linear_divergence
from asnn_goose.kernels.wkv7 import wkv7

__all__ = ["lif", "lif_rate", "linear_divergence", "wkv7"]
