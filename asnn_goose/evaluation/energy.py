"""Operations, energy and memory traffic per token, of student, dense twin and the teacher of a language model by the
same rules.

An operation is done where its operand asks for one:

    analog operand       a multiply-accumulate per weight that it meets
    spike in {-1, 0, 1}  an addition (of a weight or its negative) per weight, and nothing where it is 0
    count k of spikes    unrolled into micro-steps an addition per spike and weight, the headline's way: |k| of them,
                         or as many as k has digits other than 0 where micro-steps weigh 2^t or 3^t; or, as a
                         small whole number, one multiply-accumulate per weight where k is not 0 (``unrolled=False``)
    gain of a neuron     a multiplication per output if it differs from token to token; else the matrix holds it

Behind the matrices every product of one number with another is a multiplication, divisions and squares too. Additions
are counted where spikes or neurons make them (a comparison is one, a subtraction); other additions, exponentials and
roots are left out on both sides. Additions that the spikes cause are whole numbers of the evaluated text (firing.py)
over its tokens.

Energies are those of 45 nm hardware at 0.9 V (Horowitz, ISSCC 2014, figure 1.1.9); fp32 makes the headline. Memory
traffic is no part of them: it stands apart, as the bytes that one token moves when it is generated alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from asnn_goose.config.schema import SPIKING
from asnn_goose.evaluation.firing import SiteFiring, projections
from asnn_goose.models import GooseConfig, GooseForCausalLM, GooseForSequenceClassification, Teacher
from asnn_goose.models.spiking import SpikingLinear
from asnn_goose.models.time_mix import LowRank

NORM = 3
"""Multiplications per channel of an RMS or layer norm: square, division by the root, gain."""
FUSED = {"silu": 1, "gelu": 1, "native_layer_norm": NORM, "_fused_rms_norm": NORM}
"""Multiplications per channel in what torch does at once: x times a function of x counts 1."""
DRAM_PICOJOULES_PER_BYTE = (1300 / 8, 2600 / 8)
"""Least and most: the same figure's 1.3 to 2.6 nJ per access of 64 bits."""


@dataclass(frozen=True)
class Picojoules:
    """Energy of one operation in some number format."""

    multiplication: float
    addition: float

    @property
    def multiply_accumulate(self) -> float:
        return self.multiplication + self.addition


PICOJOULES = {
    "fp32": Picojoules(3.7, 0.9),
    "fp16": Picojoules(1.1, 0.4),
    "int8": Picojoules(0.2, 0.03),
    "int8_in_int32": Picojoules(0.2, 0.1),
}
"""By number format. int8 adds in 8 bits, as is customary; a sum over channels does not fit there, so that int8_in_int32
multiplies in 8 bits and adds in 32."""
FP32 = PICOJOULES["fp32"]


@dataclass(frozen=True)
class Operations:
    """Arithmetic of one kind, per token."""

    macs: float = 0.0
    """Multiply-accumulates of the dense form."""
    spike_macs: float = 0.0
    """Those among them whose operand is a spike, or none."""
    active_macs: float = 0.0
    """Those among the spike_macs whose operand is not 0."""
    spike_additions: float = 0.0
    """What the spike_macs come to, micro-step by micro-step."""
    additions: float = 0.0
    """Of the neurons: scales, currents, comparisons, resets."""
    multiplications: float = 0.0
    """Outside matrix products."""

    @property
    def operations(self) -> float:
        return self.macs - self.spike_macs + self.spike_additions + self.additions + self.multiplications

    def joules(self, picojoules: Picojoules = FP32, *, unrolled: bool = True) -> float:
        """Energy: ``unrolled`` adds a count of spikes one by one, else it is multiplied with the weight."""
        macs = self.macs - self.spike_macs + (0.0 if unrolled else self.active_macs)
        additions = self.additions + (self.spike_additions if unrolled else 0.0)
        price = macs * picojoules.multiply_accumulate + additions * picojoules.addition
        return (price + self.multiplications * picojoules.multiplication) * 1e-12


def joules_per_token(
    operations: Mapping[str, Operations], picojoules: Picojoules = FP32, *, unrolled: bool = True
) -> float:
    """Sum of :meth:`Operations.joules` over kinds."""
    return sum(kind.joules(picojoules, unrolled=unrolled) for kind in operations.values())


def student_operations(student: GooseForCausalLM, sites: Sequence[SiteFiring]) -> dict[str, Operations]:
    """Kind -> operations per token of the student: :func:`body_operations`, and of head and the projection in front.

    Raises:
        ValueError: firing was measured on no text.
    """
    head = Operations(macs=float(_matrix(student.narrow) + _matrix(student.lm_head)))
    return body_operations(student, sites) | {"head": head}


def body_operations(
    student: GooseForCausalLM | GooseForSequenceClassification, sites: Sequence[SiteFiring]
) -> dict[str, Operations]:
    """Kind -> operations of all blocks per token that they read.

    mixer_matrices: every matrix behind a neuron. neurons: scales, membranes and gains (:func:`neuron_operations`).
    low_rank_matrices: decay, in-context rate, value residual, gate. state_products: five D x D products per head (S a,
    the outer products with b and k, the decay, S r). norms_and_gates: :func:`elementwise_products`. embedding: the
    projection behind the table.

    Args:
        student: the model.
        sites: what :func:`firing.measure_firing` saw in each of its neurons.

    Raises:
        ValueError: firing was measured on no text.
    """
    tokens = sites[0].tokens
    if tokens == 0:
        raise ValueError("firing was measured on no tokens: give measure_firing at least one batch")
    config: GooseConfig = student.config  # pyright: ignore[reportAssignmentType]
    C, layers, D = config.hidden_size, config.num_hidden_layers, config.head_size
    neurons = [neuron_operations(linear, s) for (_, _, linear), s in zip(projections(student), sites, strict=True)]
    return {
        "mixer_matrices": Operations(
            macs=float(sum(s.channels * s.outputs for s in sites)),
            spike_macs=sum((tokens * s.channels - s.analog) * s.outputs for s in sites) / tokens,
            active_macs=sum(s.active * s.outputs for s in sites) / tokens,
            spike_additions=sum(s.additions for s in sites) / tokens,
        ),
        "neurons": Operations(
            additions=sum(n.additions for n in neurons), multiplications=sum(n.multiplications for n in neurons)
        ),
        "low_rank_matrices": Operations(macs=float(_low_rank_weights(student))),
        "state_products": Operations(macs=float(layers * 5 * C * D)),
        "norms_and_gates": Operations(multiplications=float(elementwise_products(config))),
        "embedding": Operations(macs=float(_matrix(student.model.widen))),
    }


def neuron_operations(linear: SpikingLinear, site: SiteFiring) -> Operations:
    """Operations per token of one population, besides the matrix.

    With a gain that differs from token to token: C additions for the mean |x|, C divisions of the current, and one
    multiplication per output. At each of T micro-steps a membrane adds its current and compares, and it decays where it
    leaks; an offset is one addition, and a soft reset one per spike. A radix neuron is charged once, and what its
    spikes have added up to is doubled or tripled between micro-steps, one or two additions per output. The rounding of
    a quantised neuron is not counted.
    """
    settings, C, steps = linear.neuron.settings, site.channels, site.steps
    additions, multiplications = (C, C + site.outputs) if site.gain_varies else (0, 0)
    if linear.neuron.kind in SPIKING:
        leaks = settings["decay"] < 1.0 or settings["learn_decay"] != "fixed"
        multiplications += steps * C if leaks else 0
        radix = linear.neuron.kind == "radix"
        charges = (steps - 1) * (settings["base"] - 1) * site.outputs if radix else steps * C
        additions += steps * C + charges + (C if settings["offset"] else 0)
        additions += site.spikes / site.tokens if settings["reset"] == "soft" else 0
    return Operations(additions=float(additions), multiplications=float(multiplications))


def elementwise_products(config: GooseConfig) -> int:
    """Multiplications per token outside matrices, neurons and state."""
    C, F, layers = config.hidden_size, config.channel_mix_size, config.num_hidden_layers
    converted, gated = config.time_mix == "converted", config.channel_mix == "gated"
    block = (
        2 * NORM * C
        + 6 * C + C  # token shift of time mix and channel mix
        + C  # bound of log w
        + 4 * C  # kappa: xi, square, division by the length, in-context rate
        + 2 * C  # key rate
        + 3 * C  # bonus: r k rho, times v
        + C  # gate
        + (4 * C if converted else NORM * C)  # unit length of r and k: square, division; or group norm
        + (2 * F if gated else F)  # silu: x sigmoid(x), times up; or relu^2
    )  # fmt: skip
    value_residuals = 0 if converted else (layers - 1) * C
    embedding_norm = NORM * config.embedding_size if config.embedding_norm else 0
    return layers * block + value_residuals + embedding_norm + NORM * C


def teacher_operations(teacher: Teacher, context: int) -> dict[str, Operations]:
    """Kind -> operations per token of the teacher.

    mixer_matrices: every matrix between embedding and head. attention: scores and sums over ``context`` tokens, and the
    softmax's divisions; 1 / sqrt(D) is part of the query matrix. norms_and_gates: norms, activations, gates, rotary
    products and whatever else torch multiplies for one token. embedding: a row is read, and nothing computed.
    """
    query_width, _ = _attention_widths(teacher)
    divisions = teacher.num_layers * context * teacher.model.config.num_attention_heads
    return {
        "mixer_matrices": Operations(macs=float(_mixer_weights(teacher.model))),
        "attention": Operations(
            macs=float(teacher.num_layers * 2 * context * query_width), multiplications=float(divisions)
        ),
        "norms_and_gates": Operations(multiplications=float(_watched_products(teacher))),
        "embedding": Operations(),
        "head": Operations(macs=float(teacher.head_VE.numel())),
    }


@torch.no_grad()
def _watched_products(teacher: Teacher) -> int:
    with _Products() as products:
        teacher.states(torch.zeros(1, 1, dtype=torch.int64, device=teacher.model.device))
    return products.count


class _Products(TorchDispatchMode):
    """Counts what torch multiplies within it, matrix products and softmax apart."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in FUSED:
            self.count += FUSED[name] * args[0].numel()
        elif name == "pow" and not isinstance(args[1], torch.Tensor) and args[1] >= 1:
            self.count += (round(args[1]) - 1) * out.numel()
        elif name in ("mul", "div", "lerp", "addcmul") and out.is_floating_point():
            self.count += out.numel()
        return out


def student_traffic(student: GooseForCausalLM, bytes_per_weight: int = 2) -> dict[str, float]:
    """Kind (as in :func:`student_operations`) -> bytes per token, one token at a time, without a batch or a cache.

    Each weight is read once, whether its operand is 0 or not, and of a table one row; the recurrent state, float32, is
    read and written.
    """
    config: GooseConfig = student.config  # pyright: ignore[reportAssignmentType]
    linears = [linear for _, _, linear in projections(student)]
    weights = {
        "mixer_matrices": sum(_weights(linear) - _weights(linear.neuron) for linear in linears),
        "neurons": sum(_weights(linear.neuron) for linear in linears),
        "low_rank_matrices": _low_rank_weights(student),
        "embedding": _rows(student) + _weights(student.model.widen),
        "head": _weights(student.narrow) + _weights(student.lm_head),
    }
    weights["norms_and_gates"] = _weights_read(student) - sum(weights.values())
    state = config.num_hidden_layers * (config.hidden_size * config.head_size + 2 * config.hidden_size)
    state += sum(linear.neuron.channels for linear in linears if linear.neuron.along_tokens)
    traffic = {name: float(count * bytes_per_weight) for name, count in weights.items()}
    return traffic | {"state_products": float(2 * state * 4)}


def teacher_traffic(teacher: Teacher, context: int, bytes_per_weight: int = 2) -> dict[str, float]:
    """The same for the teacher; attention reads the keys and values of ``context`` tokens."""
    _, key_width = _attention_widths(teacher)
    numbers = {
        "mixer_matrices": _mixer_weights(teacher.model),
        "embedding": _rows(teacher.model),
        "head": _weights(teacher.model.get_output_embeddings()),
    }
    numbers["norms_and_gates"] = _weights_read(teacher.model) - sum(numbers.values())
    numbers["attention"] = 2 * teacher.num_layers * context * key_width
    return {name: float(count * bytes_per_weight) for name, count in numbers.items()}


def _matrix(linear: nn.Linear | None) -> int:
    return 0 if linear is None else linear.weight.numel()


def _weights(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _low_rank_weights(student: nn.Module) -> int:
    return sum(m.down.numel() + m.up.numel() for m in student.modules() if isinstance(m, LowRank))


def _tables(model: nn.Module) -> set[int]:
    """Identities of the weights of which a token reads one row."""
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}


def _rows(model: nn.Module) -> int:
    """Numbers in one row of each table."""
    return sum(m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding))


def _head(model: PreTrainedModel) -> set[int]:
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    return {id(p) for p in head.parameters()}


def _mixer_weights(model: PreTrainedModel) -> int:
    """Numbers in matrices that are neither a table nor the head."""
    apart = _tables(model) | _head(model)
    return sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in apart)


def _weights_read(model: PreTrainedModel) -> int:
    """Numbers that one token reads: all but the tables, of which only one tied to the head is read whole, and a row."""
    rows = _tables(model) - _head(model)
    return _rows(model) + sum(p.numel() for p in model.parameters() if id(p) not in rows)


def _attention_widths(teacher: Teacher) -> tuple[int, int]:
    """Channels of all query heads, and of all key heads, of which grouped attention has fewer."""
    facts = vars(teacher.model.config)
    heads = teacher.model.config.num_attention_heads
    head_size = facts.get("head_dim") or teacher.hidden_size // heads
    return heads * head_size, (facts.get("num_key_value_heads") or heads) * head_size
