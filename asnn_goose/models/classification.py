"""The student as a classifier: RWKV-7 blocks that read a text both ways, or once, and classifiers at several depths.

Shapes: B texts, L tokens, C channels, V classes, I classifiers, in exit_logits without the deepest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.initialization import copy_
from transformers.utils.generic import ModelOutput, can_return_tuple

from asnn_goose.models.configuration import GooseConfig
from asnn_goose.models.goose import GooseModel, GoosePreTrainedModel, make_norm, mean_cross_entropy, required_ids

READINGS = ("bidirectional", "last")


class GooseClassifierConfig(GooseConfig):
    """Configuration of a spiking RWKV-7 classifier.

    Args:
        reading: bidirectional: every block reads the text forwards and backwards, and the classifier sees the mean of
            the tokens' states. last: every block reads it forwards, and the classifier sees the last token's state.
        exits: blocks, counted from 1 and below the last, behind which a further classifier stands.
        keywords: those of :class:`GooseConfig`, and num_labels or id2label.
    """

    model_type = "asnn_goose_classifier"

    def __init__(self, reading: str = "bidirectional", exits: Sequence[int] = (), **keywords):
        self.reading, self.exits = reading, list(exits)
        # A language model's configuration, read as a classifier's, brings its own.
        super().__init__(**{key: value for key, value in keywords.items() if key != "model_type"})

    def check(self) -> None:
        super().check()
        if self.reading not in READINGS:
            raise ValueError(f"reading must be {' or '.join(READINGS)}, not {self.reading!r}")
        exits = list(self.exits)
        if exits != sorted(set(exits)) or not set(exits) <= set(range(1, self.num_hidden_layers)):
            raise ValueError(
                f"exits must rise within 1..{self.num_hidden_layers - 1}, the blocks before the last, not {exits}"
            )


@dataclass
class GooseClassifierOutput(ModelOutput):
    """What a pass gives. States are block outputs, computed from spikes that are averaged over their micro-steps."""

    loss: Tensor | None = None
    """Cross-entropy of the deepest classifier in nats, mean over the texts, where labels were given."""
    logits: Tensor | None = None
    """[B, V] of the deepest classifier."""
    exit_logits: Tensor | None = None
    """[B, I, V] of the classifiers before it, in the order of ``config.exits``; None without exits."""
    pooled: Tensor | None = None
    """[B, I + 1, C] that each classifier saw, the deepest one's last."""
    hidden_states: tuple[Tensor, ...] | None = None
    """[B, L, C]: the embedding's output and every block's, the last before the norm; padded places hold anything."""


class EarlyExit(NamedTuple):
    """Predictions of texts that each went only as deep as was needed."""

    logits_BV: Tensor
    depth_B: Tensor
    """int64: blocks that each text went through."""

    @property
    def mean_depth(self) -> float:
        """In blocks."""
        return self.depth_B.double().mean().item()


def first_sure(logits_BIV: Tensor, confidence: float) -> Tensor:
    """int64 [B]: the first classifier whose largest probability is >= ``confidence``; the last one where none is."""
    sure_BI = logits_BIV.float().softmax(-1).amax(-1) >= confidence
    sure_BI[:, -1] = True
    return sure_BI.int().argmax(1)


class BothWays(nn.Module):
    """m forward + (1 - m) backward, one m per channel of a block.

    The block is the same in both directions, so that with one m for all channels a text and its reversal would give the
    same mean state. At the start even channels hold what was read forwards and odd ones what was read backwards, as if
    two narrower networks stood side by side.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.forward_share_C = nn.Parameter(torch.empty(channels))

    def reset_parameters(self) -> None:
        copy_(self.forward_share_C, 1.0 - torch.arange(len(self.forward_share_C)) % 2)

    def forward(self, forward_BLC: Tensor, backward_BLC: Tensor) -> Tensor:
        return torch.lerp(backward_BLC, forward_BLC, self.forward_share_C.to(forward_BLC.dtype))


class GooseForSequenceClassification(GoosePreTrainedModel):
    """A classifier of texts. A plain :class:`GooseConfig` gives one that reads both ways, without further exits.

    The blocks are the language model's, so a saved language model can be read as the start of one.

    Raises:
        ValueError: one label, or a problem_type other than the choice of one class.
    """

    config_class = GooseClassifierConfig
    accepts_loss_kwargs = False
    """So that transformers' Trainer divides each micro-batch's mean by their number."""
    _is_stateful = False

    def __init__(self, config: GooseConfig):
        if not isinstance(config, GooseClassifierConfig):
            config = GooseClassifierConfig(**config.to_dict())
        if config.num_labels == 1 or config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"num_labels {config.num_labels} and problem_type {config.problem_type} are not for this classifier, "
                "which chooses one of several classes: set num_labels to 2 or more, and problem_type to null"
            )
        super().__init__(config)
        self.model = GooseModel(config)
        blocks = range(config.num_hidden_layers if config.reading == "bidirectional" else 0)
        self.both_ways = nn.ModuleList(BothWays(config.hidden_size) for _ in blocks)
        self.exit_norms = nn.ModuleList(make_norm(config, config.hidden_size) for _ in config.exits)
        self.num_labels: int = config.num_labels or 0
        self.classifiers = nn.ModuleList(
            nn.Linear(config.hidden_size, self.num_labels) for _ in range(len(config.exits) + 1)
        )
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, BothWays):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def get_input_embeddings(self):
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.model.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **others,
    ) -> GooseClassifierOutput:
        """Class logits of every text.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 on padding, which may stand at either end of a text; None: every place is text.
            labels: int64 [B]; texts with -100 are left out of the loss, which is 0 where all are.
            output_hidden_states: None: as the configuration says.

        Raises:
            ValueError: no input_ids; inputs_embeds or past_key_values.
        """
        input_ids = required_ids(input_ids, others)
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h_BLC, v_first = self.model.embedded(input_ids), None
        hidden, logits, pooled = [h_BLC], [], []
        for layer in range(1, self.config.num_hidden_layers + 1):
            h_BLC, v_first = self._block(layer, h_BLC, mask_BL, v_first)
            hidden.append(h_BLC)
            if layer in self.places:
                pooled.append(self._pooled(self.places[layer], h_BLC, mask_BL))
                logits.append(self.classifiers[self.places[layer]](pooled[-1]))
        loss = None if labels is None else mean_cross_entropy(logits[-1], labels)
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return GooseClassifierOutput(
            loss=loss,
            logits=logits[-1],
            exit_logits=torch.stack(logits[:-1], 1) if self.config.exits else None,
            pooled=torch.stack(pooled, 1),
            hidden_states=tuple(hidden) if shown else None,
        )

    @torch.no_grad()
    def early_exit(self, input_ids: Tensor, attention_mask: Tensor | None = None, confidence: float = 0.9) -> EarlyExit:
        """Class logits of the first classifier that is sure of a text: its largest probability is >= ``confidence``.

        Texts that have left cost no further block. The deepest classifier answers for those that nobody was sure of.
        """
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h_BLC, v_first = self.model.embedded(input_ids), None
        logits_BV = h_BLC.new_zeros(len(input_ids), self.num_labels)
        depth_B = torch.full((len(input_ids),), self.config.num_hidden_layers, device=input_ids.device)
        left = torch.arange(len(input_ids), device=input_ids.device)
        for layer in range(1, self.config.num_hidden_layers + 1):
            h_BLC, v_first = self._block(layer, h_BLC, mask_BL, v_first)
            if layer not in self.places:
                continue
            found_BV = self.classifiers[self.places[layer]](self._pooled(self.places[layer], h_BLC, mask_BL))
            logits_BV[left] = found_BV.to(logits_BV.dtype)
            depth_B[left] = layer
            unsure_B = found_BV.float().softmax(-1).amax(-1) < confidence
            if not unsure_B.any():
                break
            left, h_BLC, mask_BL = left[unsure_B], h_BLC[unsure_B], mask_BL[unsure_B]
            v_first = v_first[unsure_B.repeat(len(v_first) // len(unsure_B))]
        return EarlyExit(logits_BV, depth_B)

    @property
    def places(self) -> dict[int, int]:
        """Block, counted from 1 -> number of the classifier behind it."""
        return {layer: place for place, layer in enumerate([*self.config.exits, self.config.num_hidden_layers])}

    def _block(self, layer: int, h_BLC: Tensor, mask_BL: Tensor, v_first: Tensor | None) -> tuple[Tensor, Any]:
        """The stream behind a block, and the first block's values; those of the backward reading follow the others'."""
        keep_BL1, block = mask_BL[..., None].to(h_BLC.dtype), self.model.blocks[layer - 1]
        if self.config.reading == "last":
            h_BLC, _, v_first = block(h_BLC, keep_BL1, None, v_first)
            return h_BLC, v_first
        both = torch.cat([h_BLC, h_BLC.flip(1)]), torch.cat([keep_BL1, keep_BL1.flip(1)])
        both, _, v_first = block(*both, None, v_first)
        forward_BLC, backward_BLC = both.chunk(2)
        return self.both_ways[layer - 1](forward_BLC, backward_BLC.flip(1)), v_first

    def _pooled(self, place: int, h_BLC: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, C]: mean over a text's tokens, or the state of its last one."""
        norm = self.exit_norms[place] if place < len(self.exit_norms) else self.model.norm
        if self.config.reading == "last":
            last_B = (mask_BL * torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device)).argmax(1)
            return norm(h_BLC[torch.arange(len(h_BLC), device=h_BLC.device), last_B])
        states_BLC = norm(h_BLC) * mask_BL[..., None].to(h_BLC.dtype)
        return states_BLC.sum(1) / mask_BL.sum(1, keepdim=True).clamp_min(1).to(h_BLC.dtype)


AutoConfig.register(GooseClassifierConfig.model_type, GooseClassifierConfig)
AutoModelForSequenceClassification.register(GooseClassifierConfig, GooseForSequenceClassification)
# So that a language model can be read as the start of a classifier; register() itself insists on the class's own
# configuration.
AutoModelForSequenceClassification._model_mapping.register(GooseConfig, GooseForSequenceClassification)  # pyright: ignore[reportArgumentType]
