"""Operations against what torch really multiplied for one token, and against hand-made counts of known shapes."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from asnn_goose.evaluation.energy import (
    DRAM_PICOJOULES_PER_BYTE,
    FP32,
    PICOJOULES,
    Operations,
    joules_per_token,
    student_operations,
    student_traffic,
    teacher_operations,
    teacher_traffic,
)
from asnn_goose.evaluation.firing import SiteFiring, measure_firing, projections
from asnn_goose.models import GooseForCausalLM

LAYERS, C, D, F, V = 2, 32, 16, 40, 50
FACTORISED = {"embedding_size": 24, "channel_mix_size": F}
CONVERTED = {"time_mix": "converted", "channel_mix": "gated", "channel_mix_size": F, "embedding_norm": False}
LIVING_ON = {"neuron": {"membrane": "sequence"}, "hidden_neuron": {"membrane": "sequence"}}
SHAPES = {"square": {}, "factorised": FACTORISED, "converted": CONVERTED, "layer norms": {"norm": "layer"}}


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
            # Square, division, gain; the group norm's gain is a product of its own.
            self.elementwise += (2 if args[2] is None else 3) * out[0].numel()
        elif name == "silu":
            self.elementwise += out.numel()
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


@pytest.mark.parametrize("keys", SHAPES.values(), ids=SHAPES)
def test_every_matrix_product_of_a_token_is_counted_in_its_kind(make_student, keys):
    student = make_student(**keys)
    operations, counted = student_operations(student, _sites(student)), _multiplied(student)
    E, hidden = keys.get("embedding_size", C), keys.get("channel_mix_size", 4 * C)
    # A gated channel mix has a third matrix.
    mixer = LAYERS * (4 * C * C + (3 if keys is CONVERTED else 2) * C * hidden)
    assert operations["mixer_matrices"].macs == mixer
    assert operations["head"].macs == E * V + (C * E if E != C else 0)
    assert operations["embedding"].macs == (E * C if E != C else 0)
    matrices = ("mixer_matrices", "low_rank_matrices", "embedding", "head")
    assert sum(operations[kind].macs for kind in matrices) == sum(counted.matrices.values())
    # 8 channels each way: the rank of every low-rank product at this width but the gate's of 8 too.
    ranks = [p.shape[0] for name, p in student.named_parameters() if name.endswith(".down")]
    assert operations["low_rank_matrices"].macs == 2 * C * sum(ranks)
    assert len(ranks) == (3 * LAYERS if keys is CONVERTED else 4 * LAYERS - 1)
    # S a and S r are matrix products; the decay and two outer products are not.
    assert counted.batched == LAYERS * 2 * C * D and counted.states == LAYERS * 3 * C * D
    assert operations["state_products"].macs == counted.batched + counted.states


@pytest.mark.parametrize("keys", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["ternary", "dense"])
def test_every_product_of_two_numbers_is_counted(make_student, keys, kind):
    student = make_student(neuron={"kind": kind}, hidden_neuron={"kind": kind}, **keys)
    operations = student_operations(student, _sites(student))
    neurons = operations["neurons"].multiplications
    assert (neurons == 0) == (kind == "dense")
    assert operations["norms_and_gates"].multiplications + neurons == _multiplied(student).elementwise


def test_only_the_mixers_matrices_take_spikes(make_student):
    student = make_student(hidden_neuron={"kind": "binary"}, **FACTORISED)
    operations = student_operations(student, _sites(student))
    mixer = operations.pop("mixer_matrices")
    assert mixer.spike_macs == mixer.macs and mixer.operations == mixer.spike_additions > 0
    assert 0 < mixer.active_macs < mixer.macs
    assert all(kind.spike_macs == kind.spike_additions == kind.active_macs == 0 for kind in operations.values())


def test_a_dense_student_saves_nothing(make_student):
    dense = {"kind": "dense"}
    operations = student_operations(student := make_student(neuron=dense, hidden_neuron=dense), _sites(student))
    mixer = operations["mixer_matrices"]
    assert mixer == Operations(macs=LAYERS * 12 * C * C) and mixer.operations == mixer.macs
    assert operations["neurons"] == Operations()


def test_one_dense_site_among_spiking_ones_is_multiplied(make_student):
    student = make_student(hidden_neuron={"kind": "dense"})
    mixer = student_operations(student, _sites(student))["mixer_matrices"]
    assert mixer.macs - mixer.spike_macs == LAYERS * 4 * C * C


def test_an_operand_off_the_levels_costs_a_multiply_accumulate(make_student):
    student = make_student()
    tokens = _Batch.input_ids.numel()

    def strays(_module, _inputs, output):
        s, gain = output
        s = s.clone()
        s[..., :3] = 0.3
        return s, gain

    hook = next(projections(student))[2].neuron.register_forward_hook(strays)
    sites = _sites(student)
    hook.remove()
    assert sites[0].analog == 3 * tokens and {site.analog for site in sites[1:]} == {0}
    mixer = student_operations(student, sites)["mixer_matrices"]
    assert mixer.macs - mixer.spike_macs == 3 * C


def test_firing_on_no_text_is_refused(make_student):
    student = make_student()
    with pytest.raises(ValueError, match="no tokens: give measure_firing at least one batch"):
        student_operations(student, measure_firing(student, student.model, []))


# Energy


def test_prices_are_those_of_45_nanometres():
    """Figure 1.1.9 of Horowitz (ISSCC 2014), as multiplication and addition."""
    pairs = {name: (price.multiplication, price.addition) for name, price in PICOJOULES.items()}
    assert pairs == {"fp32": (3.7, 0.9), "fp16": (1.1, 0.4), "int8": (0.2, 0.03), "int8_in_int32": (0.2, 0.1)}
    macs = {name: price.multiply_accumulate for name, price in PICOJOULES.items()}
    assert macs == pytest.approx({"fp32": 4.6, "fp16": 1.5, "int8": 0.23, "int8_in_int32": 0.3})
    assert PICOJOULES["fp32"] is FP32
    assert DRAM_PICOJOULES_PER_BYTE == (162.5, 325.0)


@pytest.mark.parametrize(
    ("name", "unrolled", "picojoules"),
    [
        # 400 analog multiply-accumulates; 50 additions of spikes, or 30 counts multiplied; 7 additions; 20 products.
        ("fp32", True, 400 * 4.6 + 57 * 0.9 + 20 * 3.7),
        ("fp32", False, 430 * 4.6 + 7 * 0.9 + 20 * 3.7),
        ("fp16", True, 400 * 1.5 + 57 * 0.4 + 20 * 1.1),
        ("int8", True, 400 * 0.23 + 57 * 0.03 + 20 * 0.2),
        ("int8", False, 430 * 0.23 + 7 * 0.03 + 20 * 0.2),
    ],
)
def test_joules_are_operations_times_their_price(name, unrolled, picojoules):
    done = Operations(
        macs=1000.0, spike_macs=600.0, active_macs=30.0, spike_additions=50.0, additions=7.0, multiplications=20.0
    )
    assert done.operations == 477.0
    price = PICOJOULES[name]
    assert done.joules(price, unrolled=unrolled) == pytest.approx(picojoules * 1e-12, rel=1e-12)
    kinds = {"a": done, "b": Operations(macs=10.0)}
    both = picojoules + 10 * price.multiply_accumulate
    assert joules_per_token(kinds, price, unrolled=unrolled) == pytest.approx(both * 1e-12, rel=1e-12)
    assert joules_per_token(kinds) == joules_per_token(kinds, FP32, unrolled=True)


# Memory traffic


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", [FACTORISED, CONVERTED, LIVING_ON], ids=["factorised", "converted", "membranes"])
def test_a_token_reads_each_weight_once_and_its_state_twice(make_student, keys, tied):
    student = make_student(tie_word_embeddings=tied, **keys)
    weights = sum(p.numel() for name, p in student.named_parameters() if tied or name != "model.embeddings.weight")
    weights += keys.get("embedding_size", C)  # one row of the table
    assert ("lm_head.weight" in dict(student.named_parameters())) != tied
    output = student(_Batch.input_ids[:1])
    numbers = sum(
        t.numel() for layer in output.state for t in (*layer.time_mix, layer.channel_mix_BC, *layer.membranes_BC)
    )
    traffic = student_traffic(student)
    assert sum(traffic.values()) == 2 * weights + 2 * 4 * numbers
    assert traffic["state_products"] == 2 * 4 * numbers
    assert sum(student_traffic(student, bytes_per_weight=1).values()) == weights + 2 * 4 * numbers
    # A weight for each multiply-accumulate; the projection behind the table has a bias.
    operations = student_operations(student, _sites(student))
    for kind in ("mixer_matrices", "low_rank_matrices", "head"):
        assert traffic[kind] == 2 * operations[kind].macs
    row, bias = keys.get("embedding_size", C), C if student.model.widen is not None else 0
    assert traffic["embedding"] == 2 * (operations["embedding"].macs + row + bias)
    assert traffic["neurons"] == 2 * LAYERS * 6  # a threshold each
    assert traffic.keys() == operations.keys()


# The teacher


@pytest.mark.parametrize("tied", [True, False])
def test_a_teacher_with_grouped_heads_by_hand(make_teacher, tied):
    teacher = make_teacher(num_key_value_heads=2, tie_word_embeddings=tied)
    width, hidden, layers, vocabulary, heads, head_size, kv = 32, 48, 2, 257, 4, 8, 16
    # Query and output; key and value of two heads of eight; gate, up, down.
    layer = 2 * width * width + 2 * width * kv + 3 * width * hidden
    operations = teacher_operations(teacher, context=100)
    assert {kind: entry.macs for kind, entry in operations.items() if entry.macs} == {
        "mixer_matrices": layers * layer,
        "attention": layers * 2 * 100 * width,
        "head": vocabulary * width,
    }
    assert operations["attention"].multiplications == layers * heads * 100
    norms = (2 * layers + 1) * 3 * width
    gates = layers * 2 * hidden  # x sigmoid(x), times up
    # Query and key times cosine and sine; once for all layers the angles, and cosines and sines times a factor.
    rotary = layers * 2 * (width + kv) + head_size // 2 + 2 * head_size
    assert operations["norms_and_gates"] == Operations(multiplications=norms + gates + rotary)
    assert all(entry.operations == entry.macs + entry.multiplications for entry in operations.values())
    # The table of 264 rows is read as the head, and one row of it; norms: two per layer and the last.
    traffic = teacher_traffic(teacher, context=100)
    assert traffic == {
        "mixer_matrices": 2 * layers * layer,
        "attention": 2 * 2 * layers * 100 * kv,
        "norms_and_gates": 2 * (2 * layers + 1) * width,
        "embedding": 2 * width,
        "head": 2 * 264 * width,
    }
    assert traffic.keys() == operations.keys()


def test_a_teachers_matrix_products_are_the_ones_torch_makes(make_teacher):
    teacher = make_teacher(num_key_value_heads=2)
    with _Multiplications() as counted:
        teacher(torch.zeros(1, 1, dtype=torch.int64))
    operations = teacher_operations(teacher, context=1)
    # Its own head has the rows that pad the vocabulary.
    padding = (264 - 257) * 32
    matrices = operations["mixer_matrices"].macs + operations["head"].macs + padding
    assert sum(counted.matrices.values()) == matrices


def test_heads_may_be_wider_than_the_stream_and_have_norms(make_teacher):
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
    operations = teacher_operations(teacher, context=10)
    assert operations["attention"] == Operations(macs=2 * 2 * 10 * 4 * 16, multiplications=2 * 4 * 10)
    query, key = 4 * 16, 2 * 16
    norms = 3 * (5 * 32 + 2 * (query + key))  # of the stream, and of query and key
    assert operations["norms_and_gates"].multiplications == norms + 2 * 2 * 48 + 2 * 2 * (query + key) + 8 + 2 * 16
    longer, shorter = (teacher_traffic(teacher, context)["attention"] for context in (11, 10))
    assert longer - shorter == 2 * (2 * 2 * 2 * 16)  # a key and a value, two layers, two heads of 16, two bytes


def test_a_table_of_positions_is_no_matrix(make_teacher):
    teacher = make_teacher(GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_positions=64)))
    operations = teacher_operations(teacher, context=10)
    # Query, key and value in one; output; two of the MLP, four times as wide.
    assert operations["mixer_matrices"].macs == 2 * (3 * 32 * 32 + 32 * 32 + 2 * 4 * 32 * 32)
    # Five norms; 0.5 x (1 + tanh(c (x + c' x^3))) has six products per hidden channel.
    assert operations["norms_and_gates"].multiplications == 3 * 5 * 32 + 2 * 6 * 4 * 32
    positions = 64 * 32
    weights = sum(p.numel() for p in teacher.model.parameters()) - positions
    rows = 2 * 32  # of the tokens' table, which is the head too, and of the positions'
    traffic = teacher_traffic(teacher, context=0)
    assert sum(traffic.values()) == 2 * (weights + rows) and traffic["embedding"] == 2 * rows
