"""Operations against what torch really multiplied for one token, and against hand-made counts of known shapes."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from asnn_goose.evaluation.energy import (
    PICOJOULES,
    Operations,
    elementwise_products,
    joules_per_token,
    student_bytes_per_token,
    student_operations,
    teacher_bytes_per_token,
    teacher_operations,
)
from asnn_goose.evaluation.firing import SiteFiring, measure_firing, projections
from asnn_goose.models import GooseConfig, GooseForCausalLM

LAYERS, C, D, F, V = 2, 32, 16, 40, 50
FACTORISED = {"embedding_size": 24, "channel_mix_size": F}


class _Batch:
    input_ids = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(0))


class _Multiplications(TorchDispatchMode):
    """Multiply-accumulates of matrix products by the shape of their matrix, and products of numbers with numbers."""

    def __init__(self):
        super().__init__()
        self.matrices, self.batched, self.elementwise, self.states = Counter(), 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            matrix = args[-1]
            self.matrices[tuple(matrix.shape)] += out.shape[0] * matrix.numel()
        elif name == "bmm":
            self.batched += out.numel() * args[0].shape[-1]
        elif name == "native_layer_norm":
            self.elementwise += 2 * out[0].numel()  # square, division; its gain is a product of its own here
        elif name == "linalg_vector_norm":
            self.elementwise += args[0].numel()
        elif name in ("mul", "div", "pow", "lerp") and out.numel() == C * D:
            self.states += out.numel()
        elif name in ("mul", "div", "pow", "lerp") and out.numel() > D:  # a token's scale is one number, not counted
            self.elementwise += out.numel()
        return out


@torch.no_grad()
def _multiplied(student: GooseForCausalLM) -> _Multiplications:
    """For one token behind another."""
    state = student(_Batch.input_ids[:1, :1]).state
    with _Multiplications() as counted:
        student(_Batch.input_ids[:1, 1:2], state=state)
    return counted


def _sites(student: GooseForCausalLM) -> list[SiteFiring]:
    return measure_firing(student, student.model, [_Batch()])


# The student


@pytest.mark.parametrize("keys", [{}, FACTORISED], ids=["square", "factorised"])
def test_every_matrix_product_of_a_token_is_counted_in_its_kind(make_student, keys):
    student = make_student(**keys)
    operations, counted = student_operations(student, _sites(student)), _multiplied(student)
    E, hidden = (24, F) if keys else (C, 4 * C)
    mixer = LAYERS * (4 * C * C + 2 * C * hidden)
    assert operations["mixer_matrices"].macs == mixer
    assert operations["head"].macs == E * V + (C * E if keys else 0)
    assert operations["embedding"].macs == (E * C if keys else 0)
    matrices = ("mixer_matrices", "low_rank_matrices", "embedding", "head")
    assert sum(operations[kind].macs for kind in matrices) == sum(counted.matrices.values())
    # 8 channels each way: the rank of every low-rank product at this width but the gate's of 8 too.
    ranks = [p.shape[0] for name, p in student.named_parameters() if name.endswith(".down")]
    assert operations["low_rank_matrices"].macs == 2 * C * sum(ranks) and len(ranks) == 4 * LAYERS - 1
    # S a and S r are matrix products; the decay and two outer products are not.
    assert counted.batched == LAYERS * 2 * C * D and counted.states == LAYERS * 3 * C * D
    assert operations["state_products"].macs == counted.batched + counted.states


@pytest.mark.parametrize("keys", [{}, FACTORISED], ids=["square", "factorised"])
@pytest.mark.parametrize("kind", ["ternary", "dense"])
def test_every_product_of_two_numbers_is_counted(make_student, keys, kind):
    student = make_student(neuron={"kind": kind}, hidden_neuron={"kind": kind}, **keys)
    operations = student_operations(student, _sites(student))
    assert operations["norms_and_gates"].macs == _multiplied(student).elementwise


def test_a_membrane_that_decays_is_multiplied_at_each_micro_step():
    def count(**neuron) -> int:
        return elementwise_products(GooseConfig(hidden_size=C, head_size=D, num_hidden_layers=1, neuron=neuron))

    plain = count(steps=4)
    assert count(steps=4, decay=0.9) - plain == 4 * 5 * C
    assert count(steps=2, decay=0.5, learn_decay="layer") - plain == 2 * 5 * C
    assert count(steps=4, kind="quantised", decay=0.9) == plain


@pytest.mark.parametrize("steps", [1, 4])
def test_additions_are_those_that_the_spikes_cause(make_student, steps):
    neuron = {"steps": steps, "threshold": 2.0}
    student = make_student(neuron=neuron, hidden_neuron={**neuron, "kind": "binary"}, **FACTORISED)
    additions = []

    def count(outputs):
        # Each spike of each micro-step adds one column of the matrix.
        return lambda _module, _inputs, s: additions.append((s[0].abs() * steps).round().sum().item() * outputs)

    for _, _, linear in projections(student):
        linear.neuron.register_forward_hook(count(linear.weight.shape[0]))
    operations = student_operations(student, _sites(student))
    mixer = operations["mixer_matrices"]
    tokens = _Batch.input_ids.numel()
    assert mixer.additions == pytest.approx(sum(additions) / tokens, rel=1e-12)
    assert mixer.spike_macs == mixer.macs and mixer.operations == mixer.additions
    assert all(kind.spike_macs == kind.additions == 0 for name, kind in operations.items() if name != "mixer_matrices")


def test_a_dense_student_saves_nothing(make_student):
    dense = {"kind": "dense"}
    student = make_student(neuron=dense, hidden_neuron=dense)
    mixer = student_operations(student, _sites(student))["mixer_matrices"]
    assert mixer.spike_macs < 0.01 * mixer.macs and mixer.additions == 0.0
    assert mixer.operations == pytest.approx(mixer.macs, rel=0.01)


def test_joules_are_operations_times_their_price():
    assert PICOJOULES == {"multiply_accumulate": 4.6, "addition": 0.9}
    kinds = {"a": Operations(1000.0, 600.0, 50.0), "b": Operations(10.0, 0.0, 0.0)}
    assert kinds["a"].operations == 450.0
    # 400 multiply-accumulates and 50 additions: 1840 + 45 picojoules.
    assert kinds["a"].joules(PICOJOULES) == pytest.approx(1885e-12)
    assert joules_per_token(kinds) == pytest.approx(1885e-12 + 46e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_each_weight_once_and_its_state_twice(make_student, tied):
    student = make_student(tie_word_embeddings=tied, **FACTORISED)
    weights = sum(p.numel() for name, p in student.named_parameters() if tied or name != "model.embeddings.weight")
    assert ("lm_head.weight" in dict(student.named_parameters())) != tied
    output = student(_Batch.input_ids[:1])
    numbers = sum(t.numel() for layer in output.state for t in (*layer.time_mix, layer.channel_mix_BC))
    assert student_bytes_per_token(student) == 2 * weights + 2 * 4 * numbers
    assert student_bytes_per_token(student, bytes_per_weight=1) == weights + 2 * 4 * numbers


# The teacher


@pytest.mark.parametrize("tied", [True, False])
def test_a_teacher_with_grouped_heads_by_hand(make_teacher, tied):
    teacher = make_teacher(num_key_value_heads=2, tie_word_embeddings=tied)
    width, hidden, layers, vocabulary, kv = 32, 48, 2, 257, 16
    # Query and output; key and value of two heads of eight; gate, up, down.
    layer = 2 * width * width + 2 * width * kv + 3 * width * hidden
    operations = teacher_operations(teacher, context=100)
    assert {kind: entry.macs for kind, entry in operations.items()} == {
        "mixer_matrices": layers * layer,
        "attention": layers * 2 * 100 * width,
        "head": vocabulary * width,
    }
    assert all(entry.operations == entry.macs for entry in operations.values())
    # The table of 264 rows is read as the head or, untied, one row of it; norms: two per layer and the last.
    weights = layers * layer + 264 * width + (2 * layers + 1) * width
    assert teacher_bytes_per_token(teacher, context=100) == 2 * (weights + 2 * layers * 100 * kv)


def test_a_teachers_products_are_the_ones_torch_makes(make_teacher):
    teacher = make_teacher(num_key_value_heads=2)
    with _Multiplications() as counted:
        teacher(torch.zeros(1, 1, dtype=torch.int64))
    operations = teacher_operations(teacher, context=1)
    # Its own head has the rows that pad the vocabulary.
    padding = (264 - 257) * 32
    matrices = operations["mixer_matrices"].macs + operations["head"].macs + padding
    assert sum(counted.matrices.values()) == matrices


def test_heads_may_be_wider_than_the_stream(make_teacher):
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    teacher = make_teacher(Qwen3ForCausalLM(config))
    assert teacher_operations(teacher, context=10)["attention"].macs == 2 * 2 * 10 * 4 * 16
    longer, shorter = (teacher_bytes_per_token(teacher, context) for context in (11, 10))
    assert longer - shorter == 2 * (2 * 2 * 2 * 16)  # a key and a value, two layers, two heads of 16, two bytes


def test_a_table_of_positions_is_no_matrix(make_teacher):
    teacher = make_teacher(GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_positions=64)))
    operations = teacher_operations(teacher, context=10)
    # Query, key and value in one; output; two of the MLP, four times as wide.
    assert operations["mixer_matrices"].macs == 2 * (3 * 32 * 32 + 32 * 32 + 2 * 4 * 32 * 32)
    positions = 64 * 32
    weights = sum(p.numel() for p in teacher.model.parameters()) - positions
    assert teacher_bytes_per_token(teacher, context=0) == 2 * weights
