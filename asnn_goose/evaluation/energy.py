"""Operations and energy per token, counted from shapes and measured spikes; teacher and student the same way.

An analog operand costs a multiply-accumulate per weight. A spike in {-1, 0, 1} costs one addition per weight it meets,
and nothing where it is 0: rate x T x weights additions. Energies are those of 45 nm hardware in float32 (Horowitz,
ISSCC 2014): 4.6 pJ a multiply-accumulate, 0.9 pJ an addition. Memory traffic is not part of them; it stands apart as
the bytes of weights and state that one token reads when it is generated alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    decay, S r). norms_and_gates: elementwise products. embedding: the projection behind the table. head: head and the
    projection in front of it.
    """
    config: GooseConfig = student.config  # pyright: ignore[reportAssignmentType]
    C, layers, D = config.hidden_size, config.num_hidden_layers, config.head_size
    sizes = [site.channels * site.outputs for site in sites]
    spiking = [size * site.operand_fraction for size, site in zip(sizes, sites, strict=True)]
    additions = [s * site.rate * site.steps for s, site in zip(spiking, sites, strict=True)]
    low_rank = sum(p.numel() for name, p in student.named_parameters() if name.endswith((".down", ".up")))
    elementwise = layers * (
        2 * 2 * C  # two norms: square and gain
        + 6 * C + C  # token shift of time mix and channel mix
        + 2 * (4 * C) + 2 * config.channel_mix_size  # scale of the six neurons' inputs, in and out; relu^2
        + 3 * C + 3 * C  # kappa and its norm, key rate; value residual, bonus
        + 2 * C + C  # group norm, gate
    )  # fmt: skip
    widen = 0 if student.model.widen is None else student.model.widen.weight.numel()
    narrow = 0 if student.narrow is None else student.narrow.weight.numel()

    def analog(macs: float) -> Operations:
        return Operations(float(macs), 0.0, 0.0)

    return {
        "mixer_matrices": Operations(float(sum(sizes)), sum(spiking), sum(additions)),
        "low_rank_matrices": analog(low_rank),
        "state_products": analog(layers * 5 * C * D),
        "norms_and_gates": analog(elementwise),
        "embedding": analog(widen),
        "head": analog(narrow + student.lm_head.weight.numel()),
    }


def teacher_operations(teacher: Teacher, context: int) -> dict[str, Operations]:
    """The same for the teacher: every matrix once, and attention over ``context`` earlier tokens on average."""
    tables = {id(m.weight) for m in (teacher.model.get_input_embeddings(), teacher.model.get_output_embeddings()) if m}
    matrices = sum(p.numel() for p in teacher.model.parameters() if p.ndim == 2 and id(p) not in tables)
    head = teacher.head_VE.numel()
    attention = teacher.num_layers * 2 * context * teacher.hidden_size
    return {
        "mixer_matrices": Operations(float(matrices), 0.0, 0.0),
        "attention": Operations(float(attention), 0.0, 0.0),
        "head": Operations(float(head), 0.0, 0.0),
    }


def joules_per_token(operations: Mapping[str, Operations]) -> float:
    """Sum over kinds with :data:`PICOJOULES`."""
    return sum(kind.joules(PICOJOULES) for kind in operations.values())


def student_bytes_per_token(student: GooseForCausalLM, bytes_per_weight: int = 2) -> float:
    """Weights read once (the tied embedding once, as head) plus the recurrent state read and written, float32."""
    config: GooseConfig = student.config  # pyright: ignore[reportAssignmentType]
    weights = sum(p.numel() for p in student.parameters())
    state = config.num_hidden_layers * (config.hidden_size * config.head_size + 2 * config.hidden_size)
    return float(weights * bytes_per_weight + 2 * state * 4)


def teacher_bytes_per_token(teacher: Teacher, context: int, bytes_per_weight: int = 2) -> float:
    """Weights read once plus the keys and values of ``context`` tokens; grouped heads store fewer."""
    config = teacher.model.config
    heads = config.num_attention_heads
    kv_heads = vars(config).get("num_key_value_heads") or heads
    cache = 2 * teacher.num_layers * context * teacher.hidden_size * kv_heads / heads
    return float(sum(p.numel() for p in teacher.model.parameters()) * bytes_per_weight + cache * bytes_per_weight)
