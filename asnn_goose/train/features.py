"""The terms of an objective that compare what lies inside the two models: states, pooled states, projections.

Every term is counted at the positions that predict a token, as the terms of the logits are, so that all are sums over
the same tokens. A term that is no sum over tokens (a relation, CKA) counts as its value for each of them.

Shapes: B windows, L positions, C student channels, E teacher channels, P pooled rows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asnn_goose.config.losses import CKA, PROJECTION_TERMS, Dynamics, Hidden, LayerTerm, Losses, Pooled, Relation
from asnn_goose.errors import UserError
from asnn_goose.losses import alignment, relation
from asnn_goose.losses.cka import minibatch_cka
from asnn_goose.losses.feature_dynamics import feature_dynamics, raw_dynamics_cka
from asnn_goose.losses.layer_map import layer_map

MEASURES: dict[str, Callable[..., Tensor]] = {
    "normalised_mse": alignment.normalised_mse,
    "channel_mse": alignment.channel_mse,
    "mse": alignment.mse,
    "pkd": alignment.pkd,
    "cosine": alignment.cosine,
}


@dataclass(frozen=True)
class Shape:
    """What the terms must know of a model before they see it run."""

    layers: int
    width: int


@dataclass(frozen=True)
class Inside:
    """What one pass of a model left, layers counted from 1."""

    layers: Mapping[int, Tensor]
    """Layer -> residual stream [B, L, C or E] behind that block."""
    projections: Mapping[str, Tensor]
    """query, key, value [B, L, C or E] of the block that is related."""
    read_out: Callable[[Tensor], Tensor]
    """States [N, C or E] -> logits [N, V], through a head that no gradient reaches."""


def feature_terms(losses: Losses, student: Shape, teacher: Shape) -> "FeatureTerms | None":
    """:class:`FeatureTerms`, or None where the objective has no such term."""
    terms = FeatureTerms(losses, student, teacher)
    return terms if terms.names else None


def compared_layers(student_layers: int, strategy: str) -> list[int]:
    """The student's layers that a layer map of that strategy gives a teacher layer to."""
    if strategy == "last":
        return [student_layers]
    return list(range(1, student_layers + (not strategy.startswith("pkd"))))


class FeatureTerms(nn.Module):
    """The configured terms of this kind, with the projectors that they train.

    Args:
        losses: the objective's terms; those of the logits are left alone.
        student, teacher: the shapes of both models.

    Raises:
        UserError: a layer map or layer that these models have not got, or relation heads that do not divide them.
    """

    def __init__(self, losses: Losses, student: Shape, teacher: Shape):
        super().__init__()
        self.student, self.teacher = student, teacher
        terms = losses.present()
        self.hidden, self.cka = losses.hidden, losses.cka
        self.pooled = {name: t for name, t in terms.items() if isinstance(t, Pooled)}
        self.dynamics = {name: t for name, t in terms.items() if isinstance(t, Dynamics)}
        self.relations = {name: t for name, t in terms.items() if isinstance(t, Relation)}
        for name, term in self.relations.items():
            if student.width % term.heads:
                raise UserError(
                    f"distillation.losses.{name}.heads {term.heads} does not divide the student's width "
                    f"{student.width}: choose one that does"
                )
        aligned = {name: t.layers for name, t in terms.items() if isinstance(t, LayerTerm)}
        self.pairs = {name: self._pairs(name, strategy) for name, strategy in aligned.items()}
        self.read = {name: self._spaced(name, term.layers) for name, term in self.dynamics.items()}
        self.projectors, self.mixtures = nn.ModuleDict(), nn.ModuleDict()
        if self.hidden is not None:
            for ours, group in self._groups(self.hidden.aggregate):
                self.projectors[str(ours)] = self._projector("hidden", self.hidden.projector)
                # Trained by the alignment, gates would move the target to whatever is easiest.
                self.mixtures[str(ours)] = alignment.LayerAggregation(teacher.width, len(group)).requires_grad_(False)
        if losses.contrastive is not None:
            self.projectors["contrastive"] = self._projector("contrastive", "linear")

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.pairs, *self.pooled, *self.dynamics, *self.relations)

    def teacher_layers(self) -> tuple[int, ...]:
        """Layers of the teacher whose states the terms read, in order."""
        needed = {layer for pairs in self.pairs.values() for _, layer in pairs}
        needed |= {layer for _, teacher in self.read.values() for layer in teacher}
        if self.hidden is not None:
            needed |= {layer for _, group in self._groups(self.hidden.aggregate) for layer in group}
        if self.pooled:
            needed.add(self.teacher.layers)
        return tuple(sorted(needed))

    def projected_layer(self) -> int | None:
        """Layer of the teacher whose projections the terms read.

        Raises:
            UserError: two terms ask for two layers, or the teacher has no such layer.
        """
        asked = {term.layer or self.teacher.layers for term in self.relations.values()}
        if len(asked) > 1:
            raise UserError(f"{' and '.join(PROJECTION_TERMS)} must relate one teacher layer, not {sorted(asked)}")
        layer = next(iter(asked), None)
        if layer is not None and layer > self.teacher.layers:
            raise UserError(f"a relation needs a layer up to {self.teacher.layers}, the teacher's last, not {layer}")
        return layer

    def forward(self, student: Inside, teacher: Inside, mask_BL: Tensor) -> dict[str, Tensor]:
        """Name -> sum over the tokens of ``mask_BL``; all states and the mask hold the same positions."""
        count = int(mask_BL.sum())
        with torch.autocast(mask_BL.device.type, enabled=False):
            sums = {}
            if self.hidden is not None:
                values = self._hidden(self.hidden, student, teacher, mask_BL)
                sums["hidden"] = torch.stack(list(values)).mean() * count
            if self.cka is not None:
                values = self._cka(self.cka, student, teacher, mask_BL)
                sums["cka"] = torch.stack(list(values)).mean() * count
            for name, term in self.pooled.items():
                sums[name] = self._of_pooled(name, term, student, teacher, mask_BL) * count
            sums |= {name: value * count for name, value in self._of_dynamics(student, teacher, mask_BL)}
            for name, term in self.relations.items():
                chosen = ("value",) if name == "value_relation" else ("query", "key", "value")
                ours, theirs = ({key: side.projections[key] for key in chosen} for side in (student, teacher))
                try:
                    sums[name] = relation.minilmv2(ours, theirs, term.heads, mask_BL, term.block) * count
                except ValueError as error:
                    # The teacher's keys and values may be narrower than its states, by a factor that only they show.
                    raise UserError(f"distillation.losses.{name}.heads: {error}, so choose another number") from error
        return sums

    def _pairs(self, name: str, strategy: str) -> list[tuple[int, int]]:
        try:
            theirs = layer_map(self.teacher.layers, self.student.layers, strategy)
        except ValueError as error:
            raise UserError(f"distillation.losses.{name}.layers: {error}") from None
        if not theirs:
            raise UserError(f"distillation.losses.{name}.layers: {strategy} compares nothing of a student of one layer")
        return list(zip(compared_layers(self.student.layers, strategy), theirs, strict=True))

    def _spaced(self, name: str, count: int) -> tuple[list[int], list[int]]:
        fewest = min(self.student.layers, self.teacher.layers)
        if count > fewest or (count < 2 and name != "fdd_trajectory"):
            raise UserError(
                f"distillation.losses.{name}.layers must be at least {1 if name == 'fdd_trajectory' else 2}, and at "
                f"most {fewest}, as many as both models have, not {count}"
            )
        return layer_map(self.student.layers, count), layer_map(self.teacher.layers, count)

    def _projector(self, name: str, kind: str) -> alignment.Projector:
        try:
            return alignment.Projector(self.student.width, self.teacher.width, kind)
        except ValueError as error:
            raise UserError(f"distillation.losses.{name}.projector: {error}") from None

    def _groups(self, aggregate: bool) -> list[tuple[int, range]]:
        """Student layer -> its teacher layer, or with ``aggregate`` all those since the one mapped before it."""
        groups, before = [], 0
        for ours, theirs in self.pairs["hidden"]:
            groups.append((ours, range(min(before + 1, theirs) if aggregate else theirs, theirs + 1)))
            before = theirs
        return groups

    def _hidden(self, term: Hidden, student: Inside, teacher: Inside, mask_BL: Tensor) -> Iterator[Tensor]:
        mask_BL = alignment.token_mask(mask_BL, term.skip_first)
        for ours, group in self._groups(term.aggregate):
            target_BLE, _ = self.mixtures[str(ours)]([teacher.layers[layer].float() for layer in group])
            yield MEASURES[term.measure](self.projectors[str(ours)](student.layers[ours]), target_BLE, mask_BL)

    def _cka(self, term: CKA, student: Inside, teacher: Inside, mask_BL: Tensor) -> Iterator[Tensor]:
        keep_BL = alignment.token_mask(mask_BL, term.skip_first)
        for ours, theirs in self.pairs["cka"]:
            x_NC, y_NE = student.layers[ours][keep_BL], teacher.layers[theirs][keep_BL].float()
            parts = list(zip(x_NC.chunk(term.parts), y_NE.chunk(term.parts), strict=True))
            yield 1.0 - minibatch_cka(parts, term.debiased) if len(x_NC) else x_NC.sum()

    def _of_pooled(self, name: str, term: Pooled, student: Inside, teacher: Inside, mask_BL: Tensor) -> Tensor:
        mask_BL = alignment.token_mask(mask_BL, term.skip_first)
        ours = pooled(student.layers[self.student.layers], mask_BL, term.segment)
        theirs = pooled(teacher.layers[self.teacher.layers], mask_BL, term.segment)
        if len(ours) < 2:
            return 0.0 * ours.sum()
        if name == "contrastive":
            return relation.info_nce(self.projectors["contrastive"](ours), theirs, term.sharpness)  # pyright: ignore[reportAttributeAccessIssue]
        return {"rkd_distance": relation.rkd_distance, "rkd_angle": relation.rkd_angle}[name](ours, theirs)

    def _of_dynamics(self, student: Inside, teacher: Inside, mask_BL: Tensor) -> Iterator[tuple[str, Tensor]]:
        # Trajectory and derivative of the same layers come out of one pass over the vocabulary.
        shared: dict[int, tuple[Tensor, Tensor]] = {}
        for name, term in self.dynamics.items():
            ours = [student.layers[i] for i in self.read[name][0]]
            theirs = [teacher.layers[i] for i in self.read[name][1]]
            if name == "raw_dynamics":
                empty = not bool(mask_BL.any())
                changes = (ours, [x.float() for x in theirs], mask_BL)
                yield name, 0.0 * ours[0].sum() if empty else raw_dynamics_cka(*changes)
                continue
            if term.layers not in shared:
                shared[term.layers] = feature_dynamics(ours, theirs, student.read_out, teacher.read_out, mask_BL)
            yield name, shared[term.layers][name == "fdd_derivative"]


def pooled(states_BLD: Tensor, mask_BL: Tensor, segment: int) -> Tensor:
    """Mean state [P, D] of each run of ``segment`` positions, masked ones left out; a run without any gives no row."""
    pad = -states_BLD.shape[1] % segment
    states = F.pad(states_BLD.float(), (0, 0, 0, pad)).unflatten(1, (-1, segment)).flatten(0, 1)
    mask = F.pad(mask_BL, (0, pad)).unflatten(1, (-1, segment)).flatten(0, 1)
    tokens = mask.sum(1)
    means = torch.where(mask[..., None], states, 0.0).sum(1) / tokens.clamp_min(1)[:, None]
    return means[tokens > 0]
