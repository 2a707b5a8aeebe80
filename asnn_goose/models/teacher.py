"""The teacher: any frozen causal language model of transformers, by asset, folder or hub id.

Shape suffixes: B windows, L tokens, V vocabulary (without padding rows), E teacher width.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asnn_goose.config.hardware import native_bfloat16
from asnn_goose.errors import UserError
from asnn_goose.models.pretrained import (
    block_list,
    capturing,
    local_folder,
    model_fingerprint,
    read_causal_lm,
    refuse_train_mode,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class TeacherOutput:
    """What one pass gives, in the teacher's dtype and without gradient."""

    logits_BLV: Tensor
    hidden: dict[int, Tensor]
    """[B, L, E] by layer: 0 is the input of the first block, n the output of block n, before the final norm."""


class Teacher:
    """A frozen causal language model in eval mode, with its tokenizer."""

    def __init__(self, name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", fingerprint: str):
        self.name = name
        self.fingerprint = fingerprint
        """Hexadecimal; what :func:`asnn_goose.models.pretrained.model_fingerprint` says."""
        self.tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        """Up to the tokenizer's highest id; rows that pad the model's head beyond it are sliced off everywhere."""
        self.model = model.requires_grad_(False).eval()
        self._stack, self._blocks = _blocks(name, model)
        rows = self._embedding("output").shape[0]
        if rows < self.vocab_size:
            raise UserError(
                f"teacher {name!r} has {rows} output rows for the {self.vocab_size} tokens of its tokenizer: use the "
                "tokenizer that it was trained with"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and logits."""
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        """E, channels of the residual stream."""
        return self.model.config.get_text_config().hidden_size

    @property
    def longest(self) -> float:
        """Tokens that it was made to read at once; infinite where its configuration sets no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    def block(self, layer: int) -> nn.Module:
        """The block of that layer, counted from 1."""
        return self._blocks[layer - 1]

    # Not inference_mode: its tensors cannot be saved for a backward pass, and the learned temperature multiplies these.
    @torch.no_grad()
    def __call__(self, input_ids: Tensor, hidden_layers: tuple[int, ...] = ()) -> TeacherOutput:
        """Logits, and the residual stream at ``hidden_layers``.

        Args:
            input_ids: int64 [B, L]. Padding stands on the right, where causal attention keeps it from the text.
            hidden_layers: layers counted from 1; 0 asks for the embedding output.

        Raises:
            UserError: a layer that the teacher has not got.
        """
        with self._capturing(hidden_layers) as hidden:
            logits = self.model(input_ids, use_cache=False).logits
        return TeacherOutput(logits[..., : self.vocab_size], hidden)

    @torch.no_grad()
    def states(self, input_ids: Tensor) -> Tensor:
        """The last states [B, L, E], behind the final norm: logits_BLV = states @ head_VE.T, without making them."""
        refuse_train_mode(self.name, self.model)
        return self._stack(input_ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def states_and_layers(self, input_ids: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, dict[int, Tensor]]:
        """:meth:`states` and the residual stream at ``layers`` (as in :class:`TeacherOutput`), in one pass."""
        with self._capturing(layers) as hidden:
            last_BLE = self.states(input_ids)
        return last_BLE, hidden

    @torch.no_grad()
    def read_out(self, hidden_NE: Tensor) -> Tensor:
        """Logits [N, V] that a block's output would have, were it the last block's: head(final_norm(hidden))."""
        return F.linear(self.final_norm(hidden_NE.to(self.dtype)), self.head_VE)

    @cached_property
    def head_VE(self) -> Tensor:
        """Output projection in the teacher's dtype, without padding rows: logits_BLV = states_BLE @ head_VE.T.

        Raises:
            UserError: the head has a bias, or the logits are scaled or capped afterwards.
        """
        weight = self._embedding("output")
        ids_BL = torch.arange(4, device=weight.device)[None] % self.vocab_size
        with torch.no_grad():
            product_BLV = F.linear(self.states(ids_BL), weight)[..., : self.vocab_size]
        # The same product in the same dtype; the tolerance is two steps of bfloat16.
        if not torch.allclose(product_BLV.float(), self(ids_BL).logits_BLV.float(), rtol=2**-7, atol=1e-4):
            raise UserError(
                f"teacher {self.name!r} ({type(self.model).__name__}) has no plain head (its logits get a bias, a scale"
                " or a cap), and the losses start from its last states: choose a teacher with one"
            )
        return weight[: self.vocab_size].to(self.dtype)

    @contextmanager
    def _capturing(self, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
        """Within it a pass fills the mapping with the residual stream at each of the layers."""
        refuse_train_mode(self.name, self.model)
        for layer in layers:
            if not 0 <= layer <= self.num_layers:
                raise UserError(
                    f"teacher {self.name!r} has no layer {layer}: choose 0 (embedding) to {self.num_layers}"
                )
        with capturing(self._blocks, layers) as hidden:
            yield hidden

    @property
    def embedding_weight_VE(self) -> Tensor:
        """Input embedding, a float32 copy."""
        return self._embedding("input")[: self.vocab_size].float().clone()

    @property
    def head_weight_VE(self) -> Tensor:
        """:attr:`head_VE` as a float32 copy."""
        return self.head_VE.to(torch.float32, copy=True)

    @property
    def final_norm_kind(self) -> Literal["rms", "layer"]:
        """rms: w x / sqrt(mean(x^2) + eps). layer: the same of x - mean(x), plus a bias.

        Raises:
            UserError: the norm computes something else with its weight, as Gemma's 1 + w does.
        """
        norm = copy.deepcopy(self.final_norm).float()
        weight_E, eps = self.final_norm_weight_E, self.final_norm_eps
        x_E = torch.linspace(-1.0, 3.0, self.hidden_size, device=weight_E.device)
        scaled_by: dict[Literal["rms", "layer"], Tensor] = {
            "rms": F.rms_norm(x_E, x_E.shape, weight_E, eps),
            "layer": F.layer_norm(x_E, x_E.shape, weight_E, self.final_norm_bias_E, eps),
        }
        with torch.no_grad():
            found = norm(x_E)
        for kind, expected in scaled_by.items():
            if torch.allclose(found, expected, rtol=1e-4, atol=1e-5):  # float32, another order of summation
                return kind
        raise self._missing("a final norm that is a plain RMS or layer norm")

    @property
    def final_norm_weight_E(self) -> Tensor:
        """Gain of the final norm, a float32 copy."""
        return self.final_norm.get_parameter("weight").float().clone()

    @property
    def final_norm_bias_E(self) -> Tensor | None:
        """Bias of the final norm, a float32 copy; None where it has none, as an RMS norm."""
        bias = dict(self.final_norm.named_parameters()).get("bias")
        return None if bias is None else bias.float().clone()

    @property
    def final_norm_eps(self) -> float:
        """What the final norm adds to the mean square."""
        facts = vars(self.final_norm)
        for name in ("variance_epsilon", "eps"):
            if name in facts:
                return facts[name]
        raise self._missing("a final norm with an epsilon")

    def _embedding(self, side: Literal["input", "output"]) -> Tensor:
        module = self.model.get_input_embeddings() if side == "input" else self.model.get_output_embeddings()
        if module is None:
            raise self._missing(f"an {side} embedding")
        return module.weight  # pyright: ignore[reportReturnType]

    @property
    def final_norm(self) -> nn.Module:
        """What stands between the last block and the head."""
        for name, module in self._stack.named_children():
            if name in FINAL_NORM_NAMES and "weight" in dict(module.named_parameters()):
                return module
        raise self._missing("a final norm")

    def _missing(self, part: str) -> UserError:
        return UserError(
            f"teacher {self.name!r} ({type(self.model).__name__}) has no such part as {part}, which student.init needs:"
            " set student.init to none"
        )


def load_teacher(name_or_path: str, dtype: str = "auto", device: str = "cpu") -> Teacher:
    """The teacher of that name: an asset, else a folder with a saved model, else a model id of the hub.

    Args:
        name_or_path: what ``teacher.name`` says.
        dtype: "bfloat16", "float32", or "auto": bfloat16 where ``device`` multiplies it faster.
        device: as ``torch.device`` takes it.

    Raises:
        UserError: no such model here and no way to the hub; not a whole causal language model; a broken torchvision.
    """
    if dtype == "auto":
        dtype = "bfloat16" if native_bfloat16(device) else "float32"
    if dtype not in DTYPES:
        raise UserError(f"teacher.dtype is {dtype!r}: choose auto, {' or '.join(DTYPES)}")
    source = str(local_folder(name_or_path) or name_or_path)
    model, tokenizer = read_causal_lm(name_or_path, source, DTYPES[dtype])
    fingerprint = model_fingerprint(name_or_path, source)
    nn.Module.to(model, device)
    teacher = Teacher(name_or_path, model, tokenizer, fingerprint)
    _require_causal(teacher)
    return teacher


def _require_causal(teacher: Teacher) -> None:
    """Refuse an encoder such as BERT, which transformers also loads as a causal language model, reading ahead."""
    ids_BL = torch.arange(8, device=teacher.model.device).remainder(teacher.vocab_size).repeat(2, 1)
    ids_BL[1, -1] = 0
    logits_BLV = teacher(ids_BL).logits_BLV.float()
    # Rows of one product in one dtype; the tolerance is two steps of bfloat16.
    if not torch.allclose(logits_BLV[0, :-1], logits_BLV[1, :-1], rtol=2**-7, atol=1e-3):
        raise UserError(
            f"teacher.name {teacher.name!r} is no causal language model (its logits depend on later tokens): choose a "
            "decoder"
        )


def _blocks(name: str, model: "PreTrainedModel") -> tuple[nn.Module, nn.ModuleList]:
    found = block_list(model)
    if found is None:
        raise UserError(
            f"teacher {name!r} ({type(model).__name__}) has no list of blocks: use a decoder-only transformer"
        )
    return found
