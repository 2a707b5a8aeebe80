"""GooseConfig: everything that fixes a student's shape and neurons, saved with its weights."""

from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedConfig

from asnn_goose.config.keys import explain
from asnn_goose.config.schema import NeuronConfig


class GooseConfig(PreTrainedConfig):
    """Configuration of a spiking RWKV-7 model.

    Args:
        vocab_size: V, rows of embedding and head.
        embedding_size: E, channels of embedding and head; None: hidden_size. Another one is joined by two projections.
        embedding_projection: whether a linear map stands between embedding and blocks; needed where the widths differ.
        hidden_size: C, channels of the residual stream; a multiple of head_size.
        num_hidden_layers: blocks.
        head_size: D, channels of a head of the recurrence.
        channel_mix_size: hidden channels of the channel mix; None: four times hidden_size.
        time_mix: goose, as published, or converted, which can take a softmax attention's matrices (models/time_mix.py).
        channel_mix: relu2, as published, or gated, a transformer's gated MLP (models/channel_mix.py).
        embedding_norm: whether the embedding is normalised before the blocks; a transformer's is not.
        norm: rms or layer, in front of each mixer and of the head.
        norm_eps: epsilon of these norms.
        neuron: fields of NeuronConfig for the neurons in front of receptance, key, value, output and channel-mix key.
        hidden_neuron: the same for the neurons behind relu^2 or the gate.
        wkv_backend, wkv_chunk: form of the recurrence, and tokens per chunk of the chunked one.
    """

    model_type = "asnn_goose"
    keys_to_ignore_at_inference = ["state", "pooled", "exit_logits"]  # noqa: RUF012  (transformers reads a class attribute)

    def __init__(
        self,
        vocab_size: int = 49152,
        embedding_size: int | None = None,
        embedding_projection: bool = False,
        hidden_size: int = 576,
        num_hidden_layers: int = 6,
        head_size: int = 64,
        channel_mix_size: int | None = None,
        time_mix: str = "goose",
        channel_mix: str = "relu2",
        embedding_norm: bool = True,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        neuron: dict[str, Any] | None = None,
        hidden_neuron: dict[str, Any] | None = None,
        wkv_backend: str = "auto",
        wkv_chunk: int = 32,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size or hidden_size
        self.embedding_projection = embedding_projection or self.embedding_size != hidden_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.head_size = head_size
        self.channel_mix_size = channel_mix_size or 4 * hidden_size
        self.time_mix, self.channel_mix, self.embedding_norm = time_mix, channel_mix, embedding_norm
        self.norm, self.norm_eps = norm, norm_eps
        self.neuron, self.hidden_neuron = neuron or {}, hidden_neuron or {}
        self.wkv_backend, self.wkv_chunk = wkv_backend, wkv_chunk
        self.tie_word_embeddings = tie_word_embeddings
        self.check()
        super().__init__(**kwargs)

    def check(self) -> None:
        """Refuse what no model can be built from, and give both neurons every field, so that a saved model has them.

        A model asks again, since ``from_pretrained`` writes what a caller overrides over the attributes.

        Raises:
            ValueError: in a sentence, as of what is given at the start.
        """
        sizes = ("vocab_size", "hidden_size", "embedding_size", "num_hidden_layers", "head_size", "channel_mix_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % self.head_size:
            raise ValueError(f"head_size ({self.head_size}) must divide hidden_size ({self.hidden_size})")
        if self.time_mix not in ("goose", "converted") or self.channel_mix not in ("relu2", "gated"):
            raise ValueError(
                f"time_mix must be goose or converted, not {self.time_mix!r}, and channel_mix relu2 or gated, not "
                f"{self.channel_mix!r}"
            )
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm must be rms or layer, not {self.norm!r}")
        for name in ("neuron", "hidden_neuron"):
            setattr(self, name, _neuron(name, getattr(self, name)))


def _neuron(name: str, fields: dict[str, Any] | None) -> dict[str, Any]:
    """Every field of a NeuronConfig."""
    try:
        return NeuronConfig.model_validate(fields or {}).model_dump()
    except ValidationError as error:
        raise ValueError(str(explain(error, lambda _: name, NeuronConfig))) from error
