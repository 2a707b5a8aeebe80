"""Which form of each kernel a run takes, for its fingerprint."""

import torch

from asnn_goose.config.neuron import NeuronConfig
from asnn_goose.config.schema import COUNTED
from asnn_goose.errors import UserError
from asnn_goose.kernels.count import count_backend
from asnn_goose.kernels.lif import lif_backend
from asnn_goose.kernels.wkv7 import wkv7_backend
from asnn_goose.train.engine import Engine


def recurrence_form(backend: str, tokens: int, engine: Engine) -> str:
    """What ``student.wkv_backend`` comes to for texts of that many tokens.

    Raises:
        UserError: that form cannot run here.
    """
    try:
        return wkv7_backend(backend, engine.device, torch.float32, tokens=tokens)
    except ValueError as error:
        raise UserError(f"student.wkv_backend: {error}") from None


def neuron_form(neuron: NeuronConfig, engine: Engine, key: str) -> str:
    """What the backend of the neuron at that key comes to; none for a dense one.

    Raises:
        UserError: that form cannot run here.
    """
    if neuron.kind == "dense":
        return "none"
    decay = torch.tensor(neuron.decay, requires_grad=neuron.learn_decay != "fixed")
    options = neuron.model_dump(include={"kind", "reset", "detach_reset", "surrogate"})
    try:
        if neuron.kind in COUNTED:
            return count_backend(neuron.backend, engine.device, torch.float32)
        return lif_backend(neuron.backend, engine.device, torch.float32, decay=decay, **options)
    except ValueError as error:
        raise UserError(f"{key}.backend: {error}") from None
