"""Operations and energy per token, counted from shapes and measured spikes.

Teacher and student are counted the same way, but that the teacher's norms and gates are left out (in its favour).

An analog operand costs a multiply-accumulate per weight. A spike in {-1, 0, 1} costs one addition per weight it meets,
and nothing where it is 0: rate x T x weights additions. Energies are those of 45 nm hardware in float32 (Horowitz,
ISSCC 2014): 4.6 pJ a multiply-accumulate, 0.9 pJ an addition. Memory traffic is not part of them; it stands apart as
the bytes of weights and state that one token reads when it is generated alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from asnn_goose.evaluation.firing import SiteFiring
from asnn_goose.models import GooseConfig, GooseForCausalLM, Teacher

PICOJOULES = {"multiply_accumulate": 4.6, "addition": 0.9}


@dataclass(frozen=True)
class Operations:
    """Arithmetic of one kind, per token."""

    macs: float
    """Multiply-accumulates of the dense form."""
    spike_macs: float
    """Those among them whose operand is a spike."""
    additions: float
    """Additions that the spikes cause."""

    @property
    def operations(self) -> float:
        return self.macs - self.spike_macs + self.additions

    def joules(self, picojoules: Mapping[str, float]) -> float:
        analog = (self.macs - self.spike_macs) * picojoules["multiply_accumulate"]
        return (analog + self.additions * picojoules["addition"]) * 1e-12


def student_operations(student: GooseForCausalLM, sites: Sequence[SiteFiring]) -> dict[str, Operations]:
    """Kind -> operations per token of the student.

    mixer_matrices: receptance, key, value, output and both channel-mix matrices. low_rank_matrices: decay, in-context
    rate, value residual, gate. state_products: five D x D products per head (S a, the outer products with b and k, the
    decay, S r). norms_and_gates: elementwise products (:func:`elementwise_products`). embedding: the projection behind
    the table. head: head and the projection in front of it.
    """
    config: GooseConfig = student.config  # pyright: ignore[reportAssignmentType]
    C, layers, D = config.hidden_size, config.num_hidden_layers, config.head_size
    sizes = [site.channels * site.outputs for site in sites]
    spiking = [size * site.operand_fraction for size, site in zip(sizes, sites, strict=True)]
    additions = [s * site.rate * site.steps for s, site in zip(spiking, sites, strict=True)]
    low_rank = sum(p.numel() for name, p in student.named_parameters() if name.endswith((".down", ".up")))
    widen = 0 if student.model.widen is None else student.model.widen.weight.numel()
    narrow = 0 if student.narrow is None else student.narrow.weight.numel()

    def analog(macs: float) -> Operations:
        return Operations(float(macs), 0.0, 0.0)

    return {
        "mixer_matrices": Operations(float(sum(sizes)), sum(spiking), sum(additions)),
        "low_rank_matrices": analog(low_rank),
        "state_products": analog(layers * 5 * C * D),
        "norms_and_gates": analog(elementwise_products(config)),
        "embedding": analog(widen),
        "head": analog(narrow + student.lm_head.weight.numel()),
    }


def elementwise_products(config: GooseConfig) -> int:
    """Products of one number with another per token, divisions and squares too; additions, exponentials not counted."""
    C, F, layers = config.hidden_size, config.channel_mix_size, config.num_hidden_layers
    norm = 3  # square, division by the root, gain
    block = (
        2 * norm * C
        + 6 * C + C  # token shift of time mix and channel mix
        + _gains(config.neuron, 5 * C, 4 * C + F) + _gains(config.hidden_neuron, F, C)
        + C  # bound of log w
        + 4 * C  # kappa: xi, square, division by the length, in-context rate
        + 2 * C  # key rate
        + 3 * C  # bonus: r k rho, times v
        + norm * C + C  # group norm, gate
        + F  # relu^2
    )  # fmt: skip
    value_residuals = (layers - 1) * C
    return layers * block + value_residuals + norm * (config.embedding_size + C)


def _gains(neuron: Mapping[str, Any], inputs: int, outputs: int) -> int:
    """The current over its gain, the product times it, and a membrane that decays."""
    if neuron["kind"] == "dense":
        return 0
    leaks = neuron["kind"] != "quantised" and (neuron["decay"] < 1.0 or neuron["learn_decay"] != "fixed")
    return inputs + outputs + leaks * neuron["steps"] * inputs


def teacher_operations(teacher: Teacher, context: int) -> dict[str, Operations]:
    """Kind -> operations per token of the teacher; its norms and gates are left out.

    mixer_matrices: every matrix between embedding and head. attention: scores and sums over ``context`` tokens.
    """
    head = teacher.head_VE.numel()
    apart = _tables(teacher.model) | _head(teacher.model)
    matrices = sum(p.numel() for p in teacher.model.parameters() if p.ndim == 2 and id(p) not in apart)
    query_width, _ = _attention_widths(teacher)
    attention = teacher.num_layers * 2 * context * query_width
    return {
        "mixer_matrices": Operations(float(matrices), 0.0, 0.0),
        "attention": Operations(float(attention), 0.0, 0.0),
        "head": Operations(float(head), 0.0, 0.0),
    }


def joules_per_token(operations: Mapping[str, Operations]) -> float:
    """Sum over kinds with :data:`PICOJOULES`."""
    return sum(kind.joules(PICOJOULES) for kind in operations.values())


def student_bytes_per_token(student: GooseForCausalLM, bytes_per_weight: int = 2) -> float:
    """Weights read once (a tied embedding as head, another not) plus the recurrent state read and written, float32."""
    config: GooseConfig = student.config  # pyright: ignore[reportAssignmentType]
    weights = _weights_read(student)
    state = config.num_hidden_layers * (config.hidden_size * config.head_size + 2 * config.hidden_size)
    return float(weights * bytes_per_weight + 2 * state * 4)


def teacher_bytes_per_token(teacher: Teacher, context: int, bytes_per_weight: int = 2) -> float:
    """The same for the teacher, with the keys and values of ``context`` tokens as its state, read once."""
    _, key_width = _attention_widths(teacher)
    cache = 2 * teacher.num_layers * context * key_width
    return float((_weights_read(teacher.model) + cache) * bytes_per_weight)


def _tables(model: nn.Module) -> set[int]:
    """Identities of the weights of which a token reads one row."""
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}


def _head(model: PreTrainedModel) -> set[int]:
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    return {id(p) for p in head.parameters()}


def _weights_read(model: PreTrainedModel) -> int:
    """Weights that one token needs: all but the tables, of which only one tied to the head is read whole."""
    rows = _tables(model) - _head(model)
    return sum(p.numel() for p in model.parameters() if id(p) not in rows)


def _attention_widths(teacher: Teacher) -> tuple[int, int]:
    """Channels of all query heads, and of all key heads, of which grouped attention has fewer."""
    facts = vars(teacher.model.config)
    heads = teacher.model.config.num_attention_heads
    head_size = facts.get("head_dim") or teacher.hidden_size // heads
    return heads * head_size, (facts.get("num_key_value_heads") or heads) * head_size
