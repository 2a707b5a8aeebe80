"""ASNN-Goose: distil transformer language models into spiking, recurrent RWKV-7 students."""

__version__ = "0.11.1"
