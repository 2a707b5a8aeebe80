"""What a spiking classifier minimises, with the projectors that exist in training only.

Shapes: B texts, L tokens, C student channels, E teacher channels, V classes, N tokens of the vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asnn_goose.config.classifier import ClassLosses, ExitLosses
from asnn_goose.losses.alignment import Projector, mse
from asnn_goose.losses.classification import require_as_many_classes, self_distillation
from asnn_goose.losses.divergence import cross_entropy, forward_kl
from asnn_goose.losses.layer_map import layer_map
from asnn_goose.models.classification import GooseForSequenceClassification


@dataclass(frozen=True)
class Taught:
    """What the teacher says of a batch; None where no term reads it."""

    logits_BV: Tensor | None = None
    states: Mapping[int, Tensor] | None = None
    """Layer -> [B, L, E], behind that block."""


class ClassifierDistillation(nn.Module):
    """A classifier under the terms of its objective (SpikeBERT, arXiv 2308.15122; exits: arXiv 1905.08094).

    Args:
        student: the classifier.
        losses, exit_losses: weights.
        teacher_layers, teacher_width: shape of the encoder, whose layers are spread evenly over the student's blocks.
        table_NE: the teacher's embeddings, which the student's are compared with; None: they are not.
    """

    def __init__(
        self,
        student: GooseForSequenceClassification,
        losses: ClassLosses,
        exit_losses: ExitLosses,
        teacher_layers: int,
        teacher_width: int,
        table_NE: Tensor | None = None,
    ):
        super().__init__()
        self.student, self.losses, self.exit_losses = student, losses, exit_losses
        self.layers = layer_map(teacher_layers, student.config.num_hidden_layers)
        width = student.config.hidden_size
        self.projectors = nn.ModuleList(Projector(width, teacher_width, "linear_norm") for _ in self.layers)
        self.table_NE: Tensor | None
        self.register_buffer("table_NE", table_NE, persistent=False)

    def weights(self) -> dict[str, float]:
        """Name of each term that is computed -> its weight; exits have theirs within."""
        losses = self.losses
        named = {"ce": losses.ce, "kl": losses.kl, "features": losses.features, "embeddings": losses.embeddings}
        exits = {"exits": 1.0} if self.student.config.exits else {}
        return {name: weight for name, weight in named.items() if weight} | exits

    def features(self, hidden: tuple[Tensor, ...], states: Mapping[int, Tensor], mask_BL: Tensor) -> Tensor:
        """Mean over blocks of :func:`mse` between each block's projected states and its teacher layer's.

        Args:
            hidden: [B, L, C]: the embedding's output, then every block's.
            states: the teacher's layers.
            mask_BL: true on text.
        """
        errors = [
            mse(projector(ours), states[layer], mask_BL)
            for projector, ours, layer in zip(self.projectors, hidden[1:], self.layers, strict=True)
        ]
        return torch.stack(errors).mean()

    def forward(self, input_ids: Tensor, mask_BL: Tensor, labels_B: Tensor, taught: Taught) -> dict[str, Tensor]:
        """Name -> raw value of every term that has a weight, nats or squared units, mean over texts or tokens.

        Raises:
            UserError: the teacher tells apart another number of classes.
        """
        terms = self.weights()
        output = self.student(input_ids, mask_BL, output_hidden_states="features" in terms)
        assert output.logits is not None and output.pooled is not None
        values: dict[str, Tensor] = {}
        with torch.autocast(input_ids.device.type, enabled=False):
            logits_BV = output.logits.float()
            if "ce" in terms:
                values["ce"] = cross_entropy(logits_BV, labels_B)
            if "kl" in terms:
                assert taught.logits_BV is not None, "a teacher's classes are there where kl has a weight"
                require_as_many_classes(logits_BV.shape[-1], taught.logits_BV.shape[-1])
                values["kl"] = forward_kl(logits_BV, taught.logits_BV, temperature=self.losses.temperature)
            if "features" in terms:
                assert output.hidden_states is not None and taught.states is not None
                values["features"] = self.features(output.hidden_states, taught.states, mask_BL)
            if "embeddings" in terms:
                assert self.table_NE is not None
                values["embeddings"] = F.mse_loss(self.student.model.embeddings.weight, self.table_NE)
            if "exits" in terms:
                assert output.exit_logits is not None
                e, pooled_BIC = self.exit_losses, output.pooled.float()
                values["exits"] = self_distillation(
                    output.exit_logits.float(), pooled_BIC[:, :-1], logits_BV, pooled_BIC[:, -1], labels_B,
                    w_ce=e.ce, w_kd=e.kl, w_hint=e.hint, temperature=e.temperature,
                )  # fmt: skip
        return values
