"""The spiking RWKV-7 student as a transformers model.

Shapes: B batch, L tokens, C channels, E embedding channels, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import ModelOutput, can_return_tuple

from asnn_goose.kernels.precision import widened
from asnn_goose.models.channel_mix import ChannelMix
from asnn_goose.models.configuration import GooseConfig
from asnn_goose.models.spiking import Membranes, Neuron
from asnn_goose.models.time_mix import TimeMix, TimeMixState


class LayerState(NamedTuple):
    """What one block carries from token to token: constant memory, whatever the length."""

    time_mix: TimeMixState
    channel_mix_BC: Tensor
    membranes_BC: tuple[Tensor, ...] = ()
    """Of the neurons whose membrane lives on, in the order in which the block has them; C those of each."""


@dataclass
class GooseOutput(ModelOutput):
    """Backbone output; hidden_states holds the embedding output and every block's output, the last before the norm."""

    last_hidden_state: Tensor | None = None
    state: list[LayerState] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class GooseCausalLMOutput(ModelOutput):
    """loss (if labels were given), logits_BLV, state to go on from, hidden states as in :class:`GooseOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: list[LayerState] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def make_norm(config: GooseConfig, width: int) -> nn.Module:
    """RMSNorm or LayerNorm over ``width`` channels."""
    kind = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[config.norm]
    return kind(width, eps=config.norm_eps)


def mean_cross_entropy(logits_NV: Tensor, labels_N: Tensor, number: Tensor | int | None = None) -> Tensor:
    """Sum over the labels that are not -100, in nats, over their number or the given one; 0 where there are none."""
    # PyTorch's own mean over no label is 0 / 0.
    total = F.cross_entropy(widened(logits_NV), labels_N, reduction="sum")
    return total / ((labels_N != -100).sum().clamp_min(1) if number is None else number)


def required_ids(input_ids: Tensor | None, keywords: Mapping[str, Any]) -> Tensor:
    """The input_ids.

    Raises:
        ValueError: there are none, or transformers' inputs_embeds or past_key_values are among the keywords.
    """
    if keywords.get("past_key_values") is not None:
        raise ValueError("past_key_values are not read: what was read before is carried on in state")
    if input_ids is None or keywords.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds are not read: give input_ids instead, whose embeddings the model looks up")
    return input_ids


def _check_state(state: Sequence[LayerState], input_ids: Tensor, attention_mask: Tensor | None) -> None:
    rows = len(state[0].channel_mix_BC)
    if rows != len(input_ids):
        raise ValueError(
            f"the state is of {rows} rows and input_ids of {len(input_ids)}: give a state of the same rows"
        )
    # A padded position would let the state decay and take the last token out of the next one's sight.
    if attention_mask is not None and not attention_mask[:, -input_ids.shape[1] :].all():
        raise ValueError("with a state no token may be padding: continue rows of unequal length one by one")


class GooseBlock(nn.Module):
    """h + TimeMix(norm(h)), then h + ChannelMix(norm(h)); the residual stream is analog."""

    def __init__(self, config: GooseConfig, layer: int):
        super().__init__()
        self.time_norm, self.time_mix = make_norm(config, config.hidden_size), TimeMix(config, layer)
        self.channel_norm, self.channel_mix = make_norm(config, config.hidden_size), ChannelMix(config, layer)
        # Everything here has drawn its start, and transformers is not to draw it again; on meta, where it builds what
        # it loads, nothing was drawn.
        for module in self.modules():
            module._is_hf_initialized = not self.time_mix.removal_C.is_meta  # pyright: ignore[reportArgumentType]

    def forward(self, h_BLC, keep_BL1, state: LayerState | None, v_first_BLC):
        living_on = [module for module in self.modules() if isinstance(module, Neuron) and module.along_tokens]
        membranes = Membranes(keep_BL1, {} if state is None else dict(zip(living_on, state.membranes_BC, strict=True)))
        # A padded position whose input is 0 neither writes to a state that is still 0 nor is seen by the next token.
        x_BLC = self.time_norm(h_BLC) if keep_BL1 is None else self.time_norm(h_BLC) * keep_BL1
        time_state = None if state is None else state.time_mix
        out_BLC, time_state, v_first_BLC = self.time_mix(x_BLC, time_state, v_first_BLC, membranes)
        h_BLC = h_BLC + out_BLC.to(h_BLC.dtype)
        x_BLC = self.channel_norm(h_BLC) if keep_BL1 is None else self.channel_norm(h_BLC) * keep_BL1
        out_BLC, channel_BC = self.channel_mix(x_BLC, None if state is None else state.channel_mix_BC, membranes)
        membranes_BC = tuple(membranes.after[neuron] for neuron in living_on)
        return h_BLC + out_BLC.to(h_BLC.dtype), LayerState(time_state, channel_BC, membranes_BC), v_first_BLC


class GoosePreTrainedModel(PreTrainedModel):
    config_class = GooseConfig
    base_model_prefix = "model"
    _no_split_modules = ["GooseBlock"]  # noqa: RUF012  (transformers reads a class attribute)
    _is_stateful = True

    def __init__(self, config: GooseConfig):
        config.check()
        super().__init__(config)

    def _initialize_weights(self, module, is_custom_code: bool = False):
        # Not as custom code, of which a module is passed over whose own tensors were all loaded: a mixer draws those of
        # its parts too, with functions that leave alone what was loaded.
        super()._initialize_weights(module)

    def _init_weights(self, module):
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm | Neuron | TimeMix | ChannelMix):
            module.reset_parameters()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class GooseModel(GoosePreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: GooseConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.embedding_norm = make_norm(config, config.embedding_size) if config.embedding_norm else nn.Identity()
        self.widen = nn.Linear(config.embedding_size, config.hidden_size) if config.embedding_projection else None
        if self.widen is not None and not self.widen.bias.is_meta:
            # It keeps the small random start that torch has given it.
            self.widen.bias._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        self.blocks = nn.ModuleList(GooseBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings = value

    def embedded(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, L] -> the stream [B, L, C] that goes into the first block."""
        h_BLE = self.embedding_norm(self.embeddings(input_ids))
        return h_BLE if self.widen is None else self.widen(h_BLE).to(h_BLE.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: list[LayerState] | None = None,
        output_hidden_states: bool | None = None,
        **others,
    ) -> GooseOutput:
        input_ids = required_ids(input_ids, others)
        if state is not None:
            _check_state(state, input_ids, attention_mask)
        h_BLC = self.embedded(input_ids)
        keep_BL1 = None
        if attention_mask is not None:
            keep_BL1 = attention_mask[:, -input_ids.shape[1] :, None].to(h_BLC.dtype)
        hidden, new_state, v_first_BLC = [h_BLC], [], None
        for layer, block in enumerate(self.blocks):
            h_BLC, layer_state, v_first_BLC = block(
                h_BLC, keep_BL1, None if state is None else state[layer], v_first_BLC
            )
            new_state.append(layer_state)
            hidden.append(h_BLC)
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return GooseOutput(self.norm(h_BLC), new_state, tuple(hidden) if shown else None)


class GooseForCausalLM(GoosePreTrainedModel, GenerationMixin):
    """Language model with a head tied to the embedding; ``generate`` carries the recurrent state."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GooseConfig):
        super().__init__(config)
        self.model = GooseModel(config)
        factorised = config.embedding_size != config.hidden_size
        self.narrow = nn.Linear(config.hidden_size, config.embedding_size, bias=False) if factorised else None
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: list[LayerState] | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others,
    ) -> GooseCausalLMOutput:
        """Logits for the next token of every position.

        Args:
            input_ids: [B, L]; with ``state`` only the tokens that the state has not seen.
            attention_mask: [B, L], 0 on padding, which belongs on the left where the state is to be carried on; with a
                state there is none.
            state: as returned by an earlier call, of as many rows.
            labels: [B, L], unshifted, -100 where ignored; the loss is the token-mean cross-entropy in nats, 0 where no
                token counts.
            output_hidden_states: None: as the configuration says.
            logits_to_keep: only the last so many positions, 0: all; or the numbers of the positions, int64.
            num_items_in_batch: labels that count in all the micro-batches of an optimiser step, by which the loss is
                divided in the place of this one's (transformers' Trainer gives it).

        Raises:
            ValueError: no input_ids; inputs_embeds or past_key_values; a state with padding or of other rows; labels
                with logits_to_keep.
        """
        input_ids = required_ids(input_ids, others)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of every position: leave logits_to_keep at 0")
        backbone = self.model(input_ids, attention_mask, state, output_hidden_states, return_dict=True)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last_BLC = backbone.last_hidden_state[:, kept]
        logits_BLV = self.lm_head(last_BLC if self.narrow is None else self.narrow(last_BLC))
        loss = None
        if labels is not None:
            loss = mean_cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), num_items_in_batch)
        return GooseCausalLMOutput(loss, logits_BLV, backbone.state, backbone.hidden_states)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        state=None,
        attention_mask=None,
        is_first_iteration: bool | None = False,
        output_hidden_states: bool | None = None,
        **_,
    ):
        # A state that the caller gives has seen nothing of the prompt; later ones have seen all but the last token.
        if state is not None and not is_first_iteration:
            input_ids, attention_mask = input_ids[:, -1:], None
        inputs = {"input_ids": input_ids, "state": state, "attention_mask": attention_mask, "logits_to_keep": 1}
        return inputs | {"output_hidden_states": output_hidden_states}

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args, state=None, **keywords):
        """A state that the caller gives goes to all the beams or samples of its row, as the prompt does."""
        expand = super()._expand_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        input_ids, keywords = expand(expand_size, *args, **keywords)
        if state is not None:
            rows = torch.arange(len(state[0].channel_mix_BC), device=state[0].channel_mix_BC.device)
            keywords["state"] = self._reorder_cache(state, rows.repeat_interleave(expand_size))
        return input_ids, keywords

    def _reorder_cache(self, state: list[LayerState], beams: Tensor) -> list[LayerState]:
        """The states of the beams that beam search goes on with."""
        return [
            LayerState(
                TimeMixState(*(part[beams] for part in layer.time_mix)),
                layer.channel_mix_BC[beams],
                tuple(v_BC[beams] for v_BC in layer.membranes_BC),
            )
            for layer in state
        ]


AutoConfig.register(GooseConfig.model_type, GooseConfig)
AutoModel.register(GooseConfig, GooseModel)
AutoModelForCausalLM.register(GooseConfig, GooseForCausalLM)
# Where transformers' Trainer looks whether labels are to be shifted, which smoothing of labels needs to know.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GooseConfig.model_type] = GooseForCausalLM.__name__

__all__ = ["GooseCausalLMOutput", "GooseConfig", "GooseForCausalLM", "GooseModel", "GooseOutput", "LayerState"]
