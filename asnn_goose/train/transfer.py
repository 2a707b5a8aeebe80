"""The first stage of a conversion: each mixer learns to do what the teacher's does, on the teacher's own inputs.

All layers at once, without embedding, head or a path through other layers, so that a token costs the teacher's pass and
one pass through the mixers (MOHAWK, arXiv 2408.10189; LoLCATs, arXiv 2410.10254; RADLADS, arXiv 2505.03005).

Shapes: B windows, L tokens, C channels.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asnn_goose.config.schema import TransferConfig
from asnn_goose.models import GooseForCausalLM, Teacher
from asnn_goose.models.goose import GooseBlock
from asnn_goose.models.layer_conversion import mixer_modules
from asnn_goose.models.projections import reading
from asnn_goose.train.engine import Engine
from asnn_goose.train.optimisers import set_warmup_cosine

CLIP = 1.0
"""Largest norm of a mixer's gradient."""


@dataclass(frozen=True)
class Errors:
    """|out - target|^2 / |target - mean|^2 of each mixer, by block: 1 is what the mean alone would give."""

    time_mix: list[float]
    channel_mix: list[float]

    def means(self) -> tuple[float, float]:
        return sum(self.time_mix) / len(self.time_mix), sum(self.channel_mix) / len(self.channel_mix)


class _Seen(NamedTuple):
    """What one teacher block received and gave in a pass [B, L, C]."""

    attention_in: Tensor
    attention_out: Tensor
    mlp_out: Tensor

    @property
    def mlp_in(self) -> Tensor:
        """The residual stream between the mixers."""
        return self.attention_in + self.attention_out


def relative_error(out_BLC: Tensor, target_BLC: Tensor) -> Tensor:
    """|out - target|^2 / |target - mean|^2, float32, over all positions but a window's first.

    There a softmax attention has only itself to look at, and its block makes the activations that later positions rest
    on, hundreds of times larger than any other.
    """
    out, target = out_BLC[:, 1:].float(), target_BLC[:, 1:].float()
    return (out - target).square().sum() / (target - target.mean((0, 1))).square().sum()


def transfer_mixers(
    student: GooseForCausalLM,
    teacher: Teacher,
    layers: Sequence[int],
    batches: Sequence[Tensor],
    config: TransferConfig,
    engine: Engine,
    watch: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> tuple[Errors, Errors]:
    """Train the blocks of ``student`` in place, one optimiser step per batch of ids [B, L]; errors of the first and the
    last batch, each before its step.

    Every mixer minimises :func:`relative_error` between its output and that of the teacher's block ``layers[j]``, given
    the residual stream that the teacher's block saw. Mixers share nothing, so each gradient is clipped alone.
    """
    blocks = list(student.model.blocks)
    mixers = [_mixers(block) for block in blocks]
    trained = [p for pair in mixers for mixer in pair for p in mixer if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    first = last = None
    for step, seen in enumerate(_passes(teacher, layers, watch(batches))):
        set_warmup_cosine(optimiser, config, step, len(batches))
        last = _step(blocks, mixers, seen, engine)
        first = first or last
        optimiser.step()
        optimiser.zero_grad()
    assert first is not None and last is not None, "at least one batch"
    if not all(map(math.isfinite, (*last.time_mix, *last.channel_mix))):
        raise FloatingPointError("a mixer's error is not finite: lower student.transfer.lr")
    return first, last


@torch.no_grad()
def run_mixers(student: GooseForCausalLM, teacher: Teacher, layers: Sequence[int], ids_BL: Tensor) -> None:
    """Every mixer once, on what the teacher's block ``layers[j]`` receives for these tokens."""
    for block, parts in zip(student.model.blocks, next(_passes(teacher, layers, [ids_BL])), strict=True):
        assert isinstance(block, GooseBlock)
        # The teacher's device may be another: a student is built on the CPU and moved before it trains.
        block.time_mix(block.time_norm(parts.attention_in.to(student.device, torch.float32)))
        block.channel_mix(block.channel_norm(parts.mlp_in.to(student.device, torch.float32)))


def _passes(teacher: Teacher, layers: Sequence[int], batches: Iterable[Tensor]) -> Iterator[list[_Seen]]:
    """What the teacher's blocks see and give, batch by batch."""
    inputs = tuple(layer - 1 for layer in layers)
    with reading(mixer_modules(teacher, layers)) as outputs:
        for ids_BL in batches:
            _, stream = teacher.states_and_layers(ids_BL.to(teacher.model.device), inputs)
            yield [_Seen(stream[n - 1], outputs[f"{n} attention"], outputs[f"{n} mlp"]) for n in layers]


def _mixers(block: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    assert isinstance(block, GooseBlock)
    return (
        [*block.time_norm.parameters(), *block.time_mix.parameters()],
        [*block.channel_norm.parameters(), *block.channel_mix.parameters()],
    )


def _step(blocks, mixers, seen: Sequence[_Seen], engine: Engine) -> Errors:
    """Gradients of every mixer, clipped; the errors before the update."""
    errors = Errors([], [])
    for block, (time, channel), parts in zip(blocks, mixers, seen, strict=True):
        with engine.autocast():
            out_BLC, _, _ = block.time_mix(block.time_norm(parts.attention_in.float()))
            time_error = relative_error(out_BLC, parts.attention_out)
            out_BLC, _ = block.channel_mix(block.channel_norm(parts.mlp_in.float()))
            channel_error = relative_error(out_BLC, parts.mlp_out)
        time_error.backward()
        channel_error.backward()
        for parameters in (time, channel):
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        errors.time_mix.append(time_error.item())
        errors.channel_mix.append(channel_error.item())
    return errors
