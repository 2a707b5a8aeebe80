"""Streaming token by token against one pass over 2,048 tokens, in float64 and in float32.

Shapes: B batch, L tokens, C channels, V vocabulary.
"""

import pytest
import torch
from torch import Tensor

from asnn_goose.models import GooseForCausalLM
from asnn_goose.models.spiking import Neuron

L, V = 2048, 50


def neurons(student: GooseForCausalLM) -> list[Neuron]:
    return [module for module in student.modules() if isinstance(module, Neuron)]


def input_ids() -> Tensor:
    return torch.randint(V, (1, L), generator=torch.Generator().manual_seed(0))


def _append_to(calls: list[Tensor]):
    return lambda _module, _inputs, output: calls.append(output[0][0])


@torch.no_grad()
def run(student: GooseForCausalLM, pieces: int) -> tuple[Tensor, list[Tensor]]:
    """(logits [L, V], mean spikes [L, C] of each neuron) of one pass, or of as many calls as there are pieces."""
    spikes: list[list[Tensor]] = [[] for _ in neurons(student)]
    hooks = [
        neuron.register_forward_hook(_append_to(calls)) for neuron, calls in zip(neurons(student), spikes, strict=True)
    ]
    state, logits = None, []
    for part in input_ids().chunk(pieces, 1):
        output = student(part, state=state)
        state = output.state
        logits.append(output.logits[0])
    for hook in hooks:
        hook.remove()
    return torch.cat(logits), [torch.cat(calls) for calls in spikes]


def replay(student: GooseForCausalLM, spikes: list[Tensor]) -> Tensor:
    """Logits token by token, with every neuron's spikes taken from a recording."""
    position = [0] * len(spikes)

    def replaced(index: int):
        def hook(_module, _inputs, output):
            at = position[index]
            position[index] += 1
            return spikes[index][None, at : at + 1], output[1]

        return hook

    hooks = [neuron.register_forward_hook(replaced(i)) for i, neuron in enumerate(neurons(student))]
    logits, _ = run(student, L)
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.slow
def test_in_float64_every_chunk_size_streams_to_the_same_spikes(make_student):
    student = make_student(dtype=torch.float64, wkv_backend="reference")
    streamed, streamed_spikes = run(student, L)
    for chunk_size in (1, 7, 16, 32, 64, 1024):
        for block in student.model.blocks:
            block.time_mix.wkv_backend, block.time_mix.wkv_chunk = "torch_chunk", chunk_size
        logits, spikes = run(student, 1)
        torch.testing.assert_close(logits, streamed, rtol=0, atol=1e-9)
        assert all(torch.equal(a, b) for a, b in zip(spikes, streamed_spikes, strict=True))
    assert 0.05 < torch.cat([s.flatten() for s in spikes]).ne(0).double().mean() < 0.95


@pytest.mark.slow
def test_in_float32_the_difference_is_one_of_rounding(make_student):
    student = make_student()
    streamed, streamed_spikes = run(student, L)
    for backend in ("torch_chunk", "native"):
        for block in student.model.blocks:
            block.time_mix.wkv_backend = backend
        logits, spikes = run(student, 1)
        different = sum((a != b).sum().item() for a, b in zip(spikes, streamed_spikes, strict=True))
        p, q = (x.double().log_softmax(-1) for x in (logits, streamed))
        kl_L = (p.exp() * (p - q)).sum(-1)
        # A current is rounded to about 1e-7 of the distance between two levels; a flipped spike then moves later ones.
        assert different / sum(s.numel() for s in spikes) <= 1e-4
        assert kl_L.mean() <= 1e-6
    # With the last form's spikes replayed only sums remain to differ.
    torch.testing.assert_close(replay(student, spikes), logits, rtol=0, atol=1e-4)
