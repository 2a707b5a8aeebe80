"""How much the student's spikes tell of the teacher.

Shapes: B windows, L positions, N measured tokens, C spike channels, E teacher channels, V vocabulary; D, S, K as in
evaluation/probes.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asnn_goose.evaluation.firing import projections
from asnn_goose.evaluation.probes import (
    Controlled,
    Split,
    binned_information,
    chance_information,
    controlled_cka,
    joint_counts,
    probe_classes,
    probe_states,
)
from asnn_goose.losses.alignment import token_mask
from asnn_goose.losses.layer_map import layer_map
from asnn_goose.models import GooseForCausalLM, Teacher

HELD_OUT = 0.25
"""Share of the windows that probes are tested on, and of the others, that their penalty is chosen on."""
LOGIT_ROWS = 256
"""Tokens whose logits exist at one time."""


@dataclass(frozen=True)
class SiteInformation:
    """One population's spikes beside the states of the teacher's layer that its block is mapped to."""

    layer: int
    """Block, counted from 1."""
    site: str
    teacher_layer: int
    cka: Controlled
    """Debiased linear CKA; the control has expectation 0."""
    top1_accuracy: Controlled
    """Of the class probe on held-out tokens; see Information.majority and coverage."""
    states_r2: Controlled
    """Of the probe of the teacher's states on held-out tokens, its channels weighted by variance."""
    binned_bits: Controlled
    """binned_information of evaluation/probes.py."""
    binned_bias_bits: float
    """Its first-order expectation where spikes and states are independent."""


@dataclass(frozen=True)
class Information:
    """What :func:`measure_information` found."""

    windows: int
    tokens: int
    """Measured ones."""
    held_out_tokens: int
    classes: int
    """Tokens that the class probe tells apart: the teacher's most frequent first choices on the fitted tokens."""
    coverage: float
    """Share of the held-out tokens whose first choice is among them; the probe is fitted and tested on such alone."""
    majority: float
    """Share of these held-out tokens that have the class most frequent on the fitted ones."""
    sites: tuple[SiteInformation, ...]


@torch.no_grad()
def measure_information(
    student: GooseForCausalLM,
    teacher: Teacher,
    batches: Sequence[Any],
    *,
    states: Callable[[Tensor], object] | None = None,
    sites: Sequence[str] = ("channel_key",),
    blocks: Sequence[int] | None = None,
    strategy: str = "uniform",
    tokens: int = 8192,
    classes: int = 256,
    seed: int = 0,
) -> Information:
    """Run both models over the first whole windows of ``batches`` and ask how much the spikes tell of the teacher.

    The first token of each window is left out: its state in the teacher is an outlier that carries no text, and dwarfs
    the others. Windows are split in their order, so that at most one document lies on both sides of a border: probes
    are fitted on the first ones, their penalty is chosen on the next, and the last quarter is held out. CKA and binned
    information are taken over all tokens.

    Until the end are kept 4 C bytes per token and population, and E numbers of the teacher's dtype per token and mapped
    layer; products are summed over blocks of tokens.

    Args:
        batches: with ``input_ids`` [B, L] and ``mask``, padding on the right.
        states: input_ids -> anything, by a forward pass of ``student``; None: its backbone.
        sites: populations of each block, by the names of evaluation/firing.py.
        blocks: whose populations are measured, counted from 1; None: all.
        strategy: which teacher layer each block is compared with (losses/layer_map.py).
        tokens: of the text that are read, at most.
        classes: most tokens that the class probe tells apart.
        seed: of the controls and of CKA's minibatches.

    Raises:
        ValueError: fewer than four windows; a site or block that the student lacks, a site that runs in the steps form;
            a strategy that does not map every block; a part of the split in which no first choice of the teacher is a
            class; held-out tokens with the same states.
    """
    windows = _take(batches, tokens)
    split, sizes = _split(windows)
    depth = student.config.num_hidden_layers
    theirs = layer_map(teacher.num_layers, depth, strategy)
    if len(theirs) != depth:
        raise ValueError(f"strategy {strategy!r} does not map every block of the student: use uniform")
    blocks = range(1, depth + 1) if blocks is None else blocks
    if beyond := [block for block in blocks if not 1 <= block <= depth]:
        raise ValueError(f"the student has no block {beyond[0]}: choose from 1 to {depth}")
    hidden, first_N = _read_teacher(teacher, windows, tuple(sorted({theirs[block - 1] for block in blocks})))
    spikes = _read_student(student, states or student.model, windows, sites, blocks)

    labels_N = _labels(first_N, split.fitted, classes)
    covered_N = labels_N >= 0
    class_split, labels_N = split.kept(covered_N), labels_N[covered_N]
    found_classes = int(labels_N.max()) + 1

    shuffled_N = split.permutation(seed)
    found = []
    for (layer, site), spikes_NC in spikes.items():
        hidden_NE = hidden[theirs[layer - 1]]
        counts_DSK = joint_counts(spikes_NC, hidden_NE)
        control_DSK = joint_counts(spikes_NC, hidden_NE[shuffled_N])
        found.append(
            SiteInformation(
                layer,
                site,
                theirs[layer - 1],
                cka=controlled_cka(spikes_NC, hidden_NE, shuffled_N, seed),
                top1_accuracy=probe_classes(spikes_NC[covered_N], labels_N, found_classes, class_split, seed),
                states_r2=probe_states(spikes_NC, hidden_NE, split, seed),
                binned_bits=Controlled(binned_information(counts_DSK), binned_information(control_DSK)),
                binned_bias_bits=chance_information(counts_DSK),
            )
        )
    return Information(
        windows=len(sizes),
        tokens=len(first_N),
        held_out_tokens=split.held_out,
        classes=found_classes,
        coverage=class_split.held_out / split.held_out,
        majority=float((labels_N[class_split.fitted :] == 0).double().mean()),
        sites=tuple(found),
    )


def _take(batches: Sequence[Any], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, measured) [B, L] of the first windows that together have at most ``tokens`` tokens of text."""
    taken = []
    for batch in batches:
        fits_B = batch.mask.sum(1).cumsum(0) <= tokens
        if fits_B.any():
            taken.append((batch.input_ids[fits_B], token_mask(batch.mask, skip_first=True)[fits_B]))
        tokens -= int(batch.mask.sum())
    return taken


def _split(windows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Split, list[int]]:
    """The split by windows, and each window's measured tokens."""
    sizes = [size for _, measured_BL in windows for size in measured_BL.sum(1).tolist()]
    if len(sizes) < 4:
        raise ValueError(f"information is measured on at least 4 windows, not {len(sizes)}: give more windows")
    held_out = round(HELD_OUT * len(sizes))
    choice = max(1, round(HELD_OUT * (len(sizes) - held_out)))
    fit = len(sizes) - held_out - choice
    return Split(sum(sizes[:fit]), sum(sizes[fit:-held_out]), sum(sizes[-held_out:])), sizes


def _labels(first_N: Tensor, fitted: int, classes: int) -> Tensor:
    """Rank [N] of each token among the ``classes`` most frequent of the fitted ones, 0 the first; -1 elsewhere."""
    frequent = first_N[:fitted].bincount(minlength=int(first_N.max()) + 1).sort(descending=True, stable=True)
    labels_V = torch.full_like(frequent.indices, -1)
    chosen = frequent.indices[frequent.values > 0][:classes]
    labels_V[chosen] = torch.arange(len(chosen))
    return labels_V[first_N]


def _read_teacher(
    teacher: Teacher, windows: Sequence[tuple[Tensor, Tensor]], layers: tuple[int, ...]
) -> tuple[dict[int, Tensor], Tensor]:
    """(residual stream [N, E] by layer, first choice [N] for the next token)."""
    device, head_VE = teacher.model.device, teacher.head_VE
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    first = []
    # Autocast would multiply a float32 teacher's states in bfloat16.
    with torch.autocast(device.type, enabled=False):
        for input_ids, measured_BL in windows:
            last_BLE, hidden = teacher.states_and_layers(input_ids.to(device), layers)
            for layer, parts in kept.items():
                parts.append(hidden[layer][measured_BL.to(device)].cpu())
            rows = last_BLE[measured_BL.to(device)].split(LOGIT_ROWS)
            first += [F.linear(states_NE.to(head_VE.dtype), head_VE).argmax(-1).cpu() for states_NE in rows]
    return {layer: torch.cat(parts) for layer, parts in kept.items()}, torch.cat(first)


def _read_student(
    student: GooseForCausalLM,
    states: Callable[[Tensor], object],
    windows: Sequence[tuple[Tensor, Tensor]],
    sites: Sequence[str],
    blocks: Sequence[int],
) -> dict[tuple[int, str], Tensor]:
    """(block from 1, site) -> mean spikes [N, C]."""
    kept: dict[tuple[int, str], list[Tensor]] = {}
    with _watching(student, sites, blocks) as emitted:
        for input_ids, measured_BL in windows:
            states(input_ids.to(student.device))
            for place, spikes_BLC in emitted.items():
                kept.setdefault(place, []).append(spikes_BLC[measured_BL.to(spikes_BLC.device)].cpu())
    return {place: torch.cat(parts) for place, parts in kept.items()}


@contextmanager
def _watching(
    student: GooseForCausalLM, sites: Sequence[str], blocks: Sequence[int]
) -> Iterator[dict[tuple[int, str], Tensor]]:
    """A mapping that after a forward pass holds what the neurons of these sites and blocks emitted, [B, L, C]."""
    known = dict.fromkeys(site for _, site, _ in projections(student))
    if unknown := sorted(set(sites) - set(known)):
        raise ValueError(f"the student has no site {unknown[0]!r}: choose from {', '.join(known)}")
    emitted: dict[tuple[int, str], Tensor] = {}

    def keep(place: tuple[int, str]):
        def hook(_module, _inputs, output):
            emitted[place] = output[0]

        return hook

    watched = [place for place in projections(student) if place[0] in blocks and place[1] in sites]
    if any(linear.form != "rate" for _, _, linear in watched):
        raise ValueError("spikes are read in the rate form: set form to rate on every SpikingLinear")
    hooks = [linear.neuron.register_forward_hook(keep((layer, site))) for layer, site, linear in watched]
    try:
        yield emitted
    finally:
        for hook in hooks:
            hook.remove()
