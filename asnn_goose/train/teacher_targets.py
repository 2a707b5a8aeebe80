"""What a step is told of the teacher, from the teacher itself or from the store of what it said.

Shapes: B windows, L tokens, K kept tokens, J nodes of the tail, E teacher channels, V vocabulary.
"""

from collections.abc import Mapping

from torch import Tensor

from asnn_goose.data.loader import Batch
from asnn_goose.data.window_targets import WindowTargets
from asnn_goose.models import Teacher
from asnn_goose.models.projections import attention_projections, reading
from asnn_goose.train.features import FeatureTerms


class Targets:
    """Of one batch, without gradient.

    A plain class: the engine casts bare tensors, and those of mappings and dataclasses, to the student's dtype on their
    way into ``forward``.

    Args:
        teacher: for its head and its read-out of inner states.
        states_BLE: states behind the final norm; None where only the best tokens are known.
        topk: ids [B, L, K], log-probabilities [B, L, K], log tail partitions [B, L, J].
        layers: layer -> residual stream [B, L, E].
        projections: query, key, value of the related layer.
    """

    def __init__(
        self,
        teacher: Teacher,
        states_BLE: Tensor | None = None,
        topk: tuple[Tensor, Tensor, Tensor] | None = None,
        layers: Mapping[int, Tensor] | None = None,
        projections: Mapping[str, Tensor] | None = None,
    ):
        self.teacher, self.states_BLE, self.topk = teacher, states_BLE, topk
        self.layers, self.projections = layers or {}, projections or {}


class OnlineTargets:
    """The teacher runs on every batch."""

    def __init__(self, teacher: Teacher, features: FeatureTerms | None):
        self.teacher, self.layers = teacher, () if features is None else features.teacher_layers()
        layer = None if features is None else features.projected_layer()
        self.modules = {} if layer is None else attention_projections(teacher.name, teacher.block(layer))

    def __call__(self, batch: Batch) -> Targets:
        with reading(self.modules) as projections:
            ids = batch.input_ids.to(self.teacher.model.device)
            states_BLE, layers = self.teacher.states_and_layers(ids, self.layers)
        return Targets(self.teacher, states_BLE, None, layers, projections)


class StoredTargets:
    """What the teacher said of the batch's windows when they were captured."""

    def __init__(self, teacher: Teacher, store: WindowTargets, layers: tuple[int, ...]):
        self.teacher, self.store, self.layers = teacher, store, layers

    def __call__(self, batch: Batch) -> Targets:
        if batch.windows is None:
            raise LookupError("stored targets are of training windows, and this batch does not say which it holds")
        device, windows_B = self.teacher.model.device, batch.windows
        if self.store.k is not None:
            ids, log_p, log_tail = (x.to(device) for x in self.store.topk(windows_B))
            return Targets(self.teacher, topk=(ids, log_p, log_tail))
        layers = {layer: self.store.layer(layer, windows_B).to(device) for layer in self.layers}
        return Targets(self.teacher, self.store.final(windows_B).to(device), layers=layers)
