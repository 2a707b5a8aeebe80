"""A transformer's blocks as the start of the student's: norms, attention matrices and gated MLP.

What a teacher gives its matrices has outlier channels, hundreds of times the size of the others, which a neuron with
one range for all channels would clip. Each channel is therefore divided by its own size where that is free, in the gain
of the norm or in the rows of the matrix before, and multiplied back in the columns of the matrix behind the neuron
(SmoothQuant, arXiv 2211.10438).

Shapes: B windows, L tokens, C channels, F hidden channels, H query heads, K key and value heads, D channels of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asnn_goose.errors import UserError
from asnn_goose.models.goose import GooseBlock, GooseForCausalLM
from asnn_goose.models.projections import reading
from asnn_goose.models.teacher import Teacher

SIZE_FLOOR = 1e-2
"""Smallest size of a channel as a share of the mean one: a channel that is 0 on the calibration text stays finite."""


@dataclass(frozen=True)
class BlockParts:
    """The modules of one block that have a counterpart in the student's."""

    attention: nn.Module
    mlp: nn.Module
    attention_norm: nn.Module
    mlp_norm: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def block_parts(teacher: Teacher, layer: int) -> BlockParts:
    """Of the teacher's block ``layer``, counted from 1.

    Raises:
        UserError: which part is missing or computes something else than the student can take over.
    """
    block = teacher.block(layer)

    def refuse(part: str) -> UserError:
        return UserError(
            f"teacher {teacher.name!r} cannot be converted layer by layer: block {layer} has {part}; choose "
            "--student goose"
        )

    def holding(names: Mapping[str, str], what: str) -> nn.Module:
        for module in block.children():
            if set(names.values()) <= dict(module.named_children()).keys():
                return module
        raise refuse(f"no {what} with {', '.join(names.values())}")

    attention, mlp = holding(ATTENTION, "attention"), holding(MLP, "gated MLP")
    linears = {ours: attention.get_submodule(theirs) for ours, theirs in ATTENTION.items()}
    linears |= {ours: mlp.get_submodule(theirs) for ours, theirs in MLP.items()}
    for ours, module in linears.items():
        if not isinstance(module, nn.Linear):
            raise refuse(f"a {type(module).__name__} where its {ours} matrix should be")
        if module.bias is not None and bool(module.bias.any()):
            raise refuse(f"a bias behind its {ours} matrix, which the student's has not")
    if extra := [name for name, _ in attention.named_children() if "norm" in name]:
        raise refuse(f"{' and '.join(extra)} in its attention, which the student's has not")
    kind = type(teacher.final_norm)
    norms = [module for module in block.children() if isinstance(module, kind)]
    if len(norms) != 2:
        raise refuse(f"{len(norms)} norms of the final norm's kind where the student's has two")
    if any(bool(p.any()) for norm in norms for name, p in norm.named_parameters() if name == "bias"):
        raise refuse("a bias in its norms, which is not taken over")
    parts = BlockParts(attention, mlp, *norms, **linears)  # pyright: ignore[reportArgumentType]
    _require_silu(parts, refuse)
    return parts


@torch.no_grad()
def _require_silu(parts: BlockParts, refuse) -> None:
    weight = parts.gate.weight
    x = torch.linspace(-1.0, 1.0, weight.shape[1], device=weight.device, dtype=weight.dtype)[None]
    expected = parts.down(F.silu(parts.gate(x)) * parts.up(x))
    # The same products in the same dtype.
    if not torch.allclose(parts.mlp(x), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise refuse("an MLP that is not down(silu(gate x) * (up x))")


@torch.no_grad()
def channel_sizes(teacher: Teacher, layers: Sequence[int], ids_BL: Tensor) -> dict[int, dict[str, Tensor]]:
    """Layer -> name -> root mean square of each input channel of query (key and value), output, gate (and up) and down.

    The first position of a window is left out: a softmax attention rests on it, with activations far larger than any
    others, which a recurrence has no use for.
    """
    sizes: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    hooks = []

    def measuring(layer: int, name: str):
        def hook(_module, arguments):
            sizes[layer][name] = arguments[0][:, 1:].float().square().mean((0, 1)).sqrt()

        return hook

    for layer, parts in {layer: block_parts(teacher, layer) for layer in sizes}.items():
        for name in ("query", "output", "gate", "down"):
            hooks.append(getattr(parts, name).register_forward_pre_hook(measuring(layer, name)))
    try:
        teacher.states(ids_BL.to(teacher.model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


@torch.no_grad()
def convert_layers(
    student: GooseForCausalLM, teacher: Teacher, layers: Sequence[int], ids_BL: Tensor, smoothing: float
) -> None:
    """Start block j of the student from the teacher's block ``layers[j]``.

    With s a channel's size over the mean size, to the power ``smoothing``: gains of the norms are divided by s of the
    attention's and the MLP's input, rows of value and up by s of what output and down take, and the columns of the
    matrices behind the neurons are multiplied by them. Without neurons the MLP computes what the teacher's does.

    Args:
        student: with time mix ``converted`` and channel mix ``gated``, of the teacher's widths.
        layers: teacher layers, counted from 1, one per block.
        ids_BL: text on which the channels' sizes are measured.
        smoothing: in [0, 1].

    Raises:
        UserError: as :func:`block_parts`; head sizes or hidden widths that differ.
    """
    _require_plain_stream(teacher, layers)
    sizes = channel_sizes(teacher, layers, ids_BL)
    blocks = list(student.model.blocks)
    for layer, block in zip(layers, blocks, strict=True):
        assert isinstance(block, GooseBlock)
        scales = {name: _scale(size_C, smoothing) for name, size_C in sizes[layer].items()}
        parts, hidden = block_parts(teacher, layer), student.config.channel_mix_size
        if parts.up.out_features != hidden:
            raise UserError(
                f"teacher {teacher.name!r} has {parts.up.out_features} hidden channels in block {layer} and {hidden} "
                f"in block {layers[0]}, and the student has one number for all: choose --student goose"
            )
        _convert(block, parts, scales, student, teacher)


@torch.no_grad()
def _require_plain_stream(teacher: Teacher, layers: Sequence[int]) -> None:
    """A teacher whose residual stream is not embedding + attentions + MLPs, one to one, is refused."""
    ids_BL = torch.arange(4, device=teacher.model.device)[None] % teacher.vocab_size
    with reading(mixer_modules(teacher, layers)) as outputs:
        hidden = teacher(ids_BL, (0, *layers, *(layer - 1 for layer in layers))).hidden
    sums = {n: hidden[n - 1] + outputs[f"{n} attention"] + outputs[f"{n} mlp"] for n in layers}
    rows = {0: teacher.embedding_weight_VE[ids_BL.to(teacher.embedding_weight_VE.device)].to(hidden[0])}
    for layer, expected in (rows | sums).items():
        # Sums in the teacher's dtype; the tolerance is two steps of bfloat16.
        if not torch.allclose(hidden[layer], expected, rtol=2**-7, atol=2**-7 * float(expected.abs().mean())):
            part = f"block {layer} has outputs" if layer else "it has an embedding"
            raise UserError(
                f"teacher {teacher.name!r} cannot be converted layer by layer: {part} scaled before the residual "
                "stream, which the student's has not; choose --student goose"
            )


def mixer_modules(teacher: Teacher, layers: Sequence[int]) -> dict[str, nn.Module]:
    """The attentions and MLPs of these blocks as "3 attention", "3 mlp", for :func:`reading`."""
    found = {layer: block_parts(teacher, layer) for layer in layers}
    attentions = {f"{layer} attention": parts.attention for layer, parts in found.items()}
    return attentions | {f"{layer} mlp": parts.mlp for layer, parts in found.items()}


def _scale(size_C: Tensor, smoothing: float) -> Tensor:
    mean = size_C.mean().clamp_min(torch.finfo(size_C.dtype).tiny)
    return (size_C / mean).clamp_min(SIZE_FLOOR) ** smoothing


def _convert(
    block: GooseBlock, parts: BlockParts, scales: Mapping[str, Tensor], student: GooseForCausalLM, teacher: Teacher
) -> None:
    weights = {
        field.name: getattr(parts, field.name).weight.float()
        for field in fields(parts)
        if field.name not in ("attention", "mlp")
    }
    C = student.config.hidden_size
    for name in ("key", "value"):
        weights[name] = _repeated(weights[name], C, student.config.head_size, teacher)
    s_in, s_out, s_mlp, s_hidden = (scales[name] for name in ("query", "output", "gate", "down"))
    mix, channel = block.time_mix, block.channel_mix
    block.time_norm.get_parameter("weight").copy_(weights["attention_norm"] / s_in)
    mix.receptance.weight.copy_(weights["query"] * s_in)
    mix.key.weight.copy_(weights["key"] * s_in)
    mix.value.weight.copy_(weights["value"] * s_in / s_out[:, None])
    mix.output.weight.copy_(weights["output"] * s_out)
    block.channel_norm.get_parameter("weight").copy_(weights["mlp_norm"] / s_mlp)
    channel.key.weight.copy_(torch.cat([weights["gate"] * s_mlp, weights["up"] * s_mlp / s_hidden[:, None]]))
    channel.value.weight.copy_(weights["down"] * s_hidden)


def _repeated(weight_KDC: Tensor, C: int, D: int, teacher: Teacher) -> Tensor:
    """[H D, C] from [K D, C]: each key head for all the query heads that share it."""
    facts = vars(teacher.model.config)
    heads = teacher.model.config.num_attention_heads
    size = facts.get("head_dim") or teacher.hidden_size // heads
    if size != D or heads * size != C:
        raise UserError(
            f"teacher {teacher.name!r} has {heads} heads of {size} channels, and the student {C} channels in heads of "
            f"{D}: set student.head_size to {size} and student.width to null, or choose --student goose"
        )
    return weight_KDC.view(-1, D, weight_KDC.shape[-1]).repeat_interleave(C // len(weight_KDC), 0).flatten(0, 1)
