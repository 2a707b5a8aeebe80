"""Lessons of failed runs: that docs/lessons.md names tests that exist, and the proofs that have no other home.

Shapes: B windows, L tokens, V vocabulary.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from asnn_goose import losses
from asnn_goose.config.keys import flatten, keys
from asnn_goose.config.losses import ATTENTION_TERMS, Losses
from asnn_goose.config.schema import TrainConfig
from asnn_goose.data.loader import Batch
from asnn_goose.errors import UserError
from asnn_goose.evaluation.perplexity import compare
from asnn_goose.losses.alignment import Projector, channel_mse, normalised_mse
from asnn_goose.losses.relation import relation_kl
from asnn_goose.models import Teacher
from asnn_goose.models.tokenizer import require_same_vocabulary
from asnn_goose.train.objective import Distillation
from asnn_goose.train.optimisers import set_learning_rates
from asnn_goose.train.plan import schedules
from asnn_goose.train.setting import prepare
from asnn_goose.train.step import accumulate_gradients
from asnn_goose.train.teacher_targets import Targets

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "lessons.md"
LESSONS = 43
REFERENCE = re.compile(r"`([\w/]+\.py)::(\w+)`")


def lessons() -> dict[int, list[str]]:
    """Number -> cells (lesson, guard, test) of the table's rows."""
    rows: dict[int, list[str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        number, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if line.startswith("|") and number.isdigit():
            assert int(number) not in rows, f"lesson {number} stands twice"
            rows[int(number)] = cells
    return rows


@cache
def names_in(path: str) -> set[str]:
    """Functions, classes, methods and module constants of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    defined = (ast.FunctionDef, ast.ClassDef)
    found = {node.name for node in ast.walk(tree) if isinstance(node, defined)}
    return found | {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}


def test_every_lesson_has_its_row():
    rows = lessons()
    assert sorted(rows) == list(range(1, LESSONS + 1))
    assert all(len(cells) == 3 and all(cells) for cells in rows.values())


@pytest.mark.parametrize("number", range(1, LESSONS + 1))
def test_what_a_row_names_is_there(number: int):
    lesson, guard, test = lessons()[number]
    assert "`" not in lesson
    for path, name in REFERENCE.findall(guard):
        assert path.startswith("asnn_goose/") and name in names_in(path), f"{path}::{name}"
    for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", guard):
        assert any(known == key or known.startswith(f"{key}.") for known in keys()), key
    tests = REFERENCE.findall(test)
    for path, name in tests:
        assert path.startswith("tests/") and name.startswith("test_") and name in names_in(path), f"{path}::{name}"
    # A row names a test, or says that there is nothing to test.
    assert tests or "not part of this project" in guard


def test_the_proofs_below_are_in_the_table():
    rows = lessons()
    for name in names_in("tests/test_lessons.py"):
        if match := re.match(r"test_lesson_(\d+)_", name):
            assert f"`tests/test_lessons.py::{name}`" in rows[int(match[1])][2], name


DENSE = {"student__neuron__kind": "dense", "student__hidden_neuron__kind": "dense"}
KD = "distillation__losses__forward_kl"
T = "distillation__temperature"


@pytest.mark.parametrize(
    "options",
    [{}, {f"{KD}__ramp__start": 0.1}, {"distillation__balance__mode": "pcgrad"}, {f"{T}__lambda_max": 0.0}],
    ids=["plain", "with a ramp", "with a balance", "without an adversary"],
)
def test_lesson_1_the_anchor_waits_for_no_other_option(tiny_experiment, options):
    """T = 3, anchor 2, c = 0.1: a value of 0.1 and, with dT/draw = 1, a gradient of 0.2 while lambda is 0."""
    setting = prepare(tiny_experiment(**{f"{T}__init": 3.0, f"{T}__anchor": 2.0}, **options))
    metrics = accumulate_gradients(setting.context, [next(setting.windows)], 0)
    assert metrics["loss_anchor"] == pytest.approx(0.1, rel=1e-6)
    raw = setting.module.get_parameter("temperature.raw")
    assert raw.grad is not None and raw.grad.item() == pytest.approx(0.2, rel=1e-6)


def test_lesson_6_a_projector_takes_half_precision_outside_autocast():
    projector = Projector(6, 10)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(projector(x), projector(x.float())) and projector(x).dtype == torch.float32


def test_lesson_6_evaluation_gives_the_losses_of_training(tiny_experiment):
    """At T = 1, on one batch, at two moments of the schedule, and twice."""
    setting = prepare(tiny_experiment("v10", **{f"{T}__init": 1.0, f"{KD}__ramp__start": 0.0}, **DENSE))
    batch, module = next(setting.windows), setting.module
    states_BLE = setting.context.targets(batch).states_BLE
    assert states_BLE is not None
    trained = [accumulate_gradients(setting.context, [batch], step) for step in (0, 3)]
    module.eval()
    for _ in range(2):
        seen = compare(module.states, module.head_VC(), [states_BLE], setting.teacher.head_VE, [batch])
        for metrics in trained:
            # Two orders of float32 sums.
            assert metrics["loss_ce_raw"] == pytest.approx(seen.student_nll_W.sum() / seen.tokens, rel=1e-5)
            assert metrics["loss_forward_kl_raw"] == pytest.approx(seen.kl_to_teacher, rel=1e-5)


def test_lesson_7_what_trains_is_float32_and_moves(tiny_experiment):
    """A step of 2.5e-4 up from 1 is half of what float16 can show there."""
    assert torch.tensor(1.0, dtype=torch.float16) + 2.5e-4 == 1.0
    setting = prepare(tiny_experiment("v10", train__precision="bfloat16", train__lr=2.5e-4, train__warmup=0.0))
    assert {p.dtype for p in setting.module.parameters() if p.requires_grad} == {torch.float32}
    gain = setting.module.student.model.norm.get_parameter("weight")
    with torch.no_grad():
        gain.fill_(1.0)
    gain.grad = torch.full_like(gain, -1.0)
    set_learning_rates(setting.optimisers.student, setting.experiment.train, 0, 4)
    setting.optimisers.student.step()
    # AdamW's first step is its rate; float32 steps by 1.2e-7 there.
    assert gain.tolist() == pytest.approx([1.0 + 2.5e-4] * gain.numel(), abs=2e-7)


@pytest.mark.parametrize("key", ["teacher__projector", f"{KD}__projector", "distillation__teacher_projector"])
def test_lesson_8_no_projector_of_the_teachers_can_be_asked_for(tiny_experiment, key: str):
    with pytest.raises(UserError, match="no such key"):
        tiny_experiment(**{key: "linear"})


def test_lesson_9_without_the_student_nothing_lowers_the_divergence(tiny_experiment):
    """All else trains for three steps: the term with a projector falls, the divergence stays to the last bit.

    One student layer against a mixture of two of the teacher's, whose gate is on the teacher's side.
    """
    hidden = {"distillation": "hidden", "distillation__losses__hidden__aggregate": True, "student__layers": 1}
    setting = prepare(tiny_experiment("v10", **hidden))
    module, batch = setting.module, next(setting.windows)
    gates = [p for n, p in module.named_parameters() if "mixtures." in n]
    assert gates and not any(p.requires_grad for p in gates)
    rest = [p for n, p in module.named_parameters() if p.requires_grad and not n.startswith("student.")]
    assert rest and not {id(p) for p in rest} & {id(p) for p in setting.teacher.model.parameters()}
    optimiser, course = torch.optim.SGD(rest, lr=1.0), []
    for step in range(3):
        module.zero_grad(set_to_none=True)
        course.append(accumulate_gradients(setting.context, [batch], step))
        optimiser.step()
    kl, alignment = ([metrics[f"loss_{name}_raw"] for metrics in course] for name in ("forward_kl", "hidden"))
    assert kl[0] == kl[1] == kl[2] > 0
    assert alignment[0] > alignment[1] > alignment[2]


DIVERGENCES = {
    "forward_kl": {}, "reverse_kl": {}, "jensen_shannon": {}, "skew_kl": {}, "adaptive_kl": {}, "total_variation": {},
    "tail_bucket_kl": {"k": 3}, "tcs": {"k": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
def test_lesson_11_doubling_the_length_leaves_the_loss_unchanged(name: str):
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    loss, options = getattr(losses, name), DIVERGENCES[name]
    once = loss(s, t, temperature=2.0, **options).item()
    assert once > 0.01
    for times in ((1, 2, 1), (2, 1, 1)):
        repeated = loss(s.repeat(times), t.repeat(times), temperature=2.0, **options).item()
        # Two orders of float64 sums.
        assert repeated == pytest.approx(once, rel=1e-13)


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    words = [f"w{i}" for i in range(size)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", unk_token="w0")


def test_lesson_22_padding_rows_are_cut_and_other_vocabularies_refused():
    """50,304 rows for 50,257 tokens are the padding of one vocabulary; 49,152 tokens are another one."""
    shape = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(**shape, vocab_size=50_304, tie_word_embeddings=True)  # pyright: ignore[reportArgumentType]
    model = LlamaForCausalLM(config)
    teacher = Teacher("padded", model, tokenizer_of(50_257), "fingerprint")
    assert teacher.head_VE.shape[0] == teacher(torch.tensor([[5, 50_256]])).logits_BLV.shape[-1] == 50_257
    require_same_vocabulary(teacher.tokenizer, tokenizer_of(50_257))
    with pytest.raises(UserError, match=r"\(49152 tokens\) and the teacher's \(50257\) differ"):
        require_same_vocabulary(teacher.tokenizer, tokenizer_of(49_152))
    with pytest.raises(UserError, match="50304 output rows for the 50305 tokens"):
        Teacher("short", model, tokenizer_of(50_305), "fingerprint")


def test_lesson_23_the_size_of_the_states_does_not_count():
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 5, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    # The norm adds 1e-5 to a variance near 1, or to one near 1e4.
    assert normalised_mse(100 * s, 100 * t).item() == pytest.approx(normalised_mse(s, t).item(), rel=1e-4)


def test_lesson_23_the_size_of_one_channel_does_not_count():
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 5, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    wanted = ((s - t) ** 2)[mask] / (t[mask] ** 2).mean(0)
    assert channel_mse(s, t, mask).item() == pytest.approx(wanted.mean().item(), rel=1e-12)
    one = torch.ones(16, dtype=torch.float64)
    one[3] = 100.0
    assert channel_mse(one * s, one * t, mask).item() == pytest.approx(wanted.mean().item(), rel=1e-12)
    assert channel_mse(0 * t, t, mask).item() == pytest.approx(1.0, rel=1e-12)


def test_lesson_24_relations_do_not_count_heads_or_sequences():
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 6, 8, generator=draw) for _ in range(2))
    value = relation_kl(s, t, heads=2).item()
    assert value > 0.01 and relation_kl(t, t, heads=2).item() == 0.0
    # float32 sums in another order.
    assert relation_kl(s.repeat(1, 1, 2), t.repeat(1, 1, 2), heads=4).item() == pytest.approx(value, rel=1e-6)
    assert relation_kl(s.repeat(2, 1, 1), t.repeat(2, 1, 1), heads=2).item() == pytest.approx(value, rel=1e-6)


def test_lesson_24_a_relation_has_no_temperature_and_attention_no_term(tiny_experiment):
    with pytest.raises(UserError, match="no such key"):
        tiny_experiment(distillation="minilmv2", distillation__losses__qkv_relation__temperature=2.0)
    for name in ATTENTION_TERMS:
        with pytest.raises(ValueError, match="compares attention matrices, and an RWKV student has none"):
            Losses.model_validate({name: {"weight": 1.0}})


def test_lesson_29_schedules_count_updates(tiny_experiment):
    """24,914 micro-batches by sixteens are 1,557 updates, of which 155 warm up."""
    train = TrainConfig(scale="cpu", tokens=24_914 * 4 * 256, batch_size=4, accumulate=16, warmup=155 / 1557)
    assert train.total_steps(256) == 1557
    one, sixteen = (tiny_experiment(train__steps=100, train__accumulate=n) for n in (1, 16))
    assert all(schedules(one, step) == schedules(sixteen, step) for step in range(100))


class Copyist(Distillation):
    """A student of the copying task: every token is followed by the next of a fixed cycle, and it knows."""

    cycle: torch.Tensor

    def states(self, input_ids):
        return F.one_hot(self.cycle[input_ids], len(self.cycle)).float()

    def head_VC(self):
        return 40.0 * torch.eye(len(self.cycle))


def test_lesson_36_a_perfect_student_of_a_copying_teacher_costs_nothing(tiny_experiment, make_student):
    experiment = tiny_experiment("v10", **{f"{T}__init": 1.0})
    V, L = 50, 12
    student = Copyist(make_student(), experiment.distillation)
    student.cycle = (torch.arange(V) + 7) % V
    ids = torch.zeros(2, L, dtype=torch.long)
    ids[:, 0] = torch.tensor([3, 8])
    for i in range(1, L):
        ids[:, i] = student.cycle[ids[:, i - 1]]

    class Copying:
        head_VE = student.head_VC()

    def loss(states_BLE) -> dict[str, float]:
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
        targets = Targets(Copying, states_BLE)  # pyright: ignore[reportArgumentType]
        sums, *_ = student(batch.input_ids, batch.mask, targets, 0.0, 1.0, {"ce": 1.0, "forward_kl": 1.0})
        return {name: value.item() / (2 * (L - 1)) for name, value in sums.items()}

    said_BLE = student.states(ids)
    # A logit of 40 leaves 49 e^-40 for all the others.
    assert loss(said_BLE) == pytest.approx({"ce": 0.0, "forward_kl": 0.0}, abs=1e-12)
    shifted = loss(said_BLE.roll(1, 1))
    assert shifted["ce"] == pytest.approx(0.0, abs=1e-12) and shifted["forward_kl"] == pytest.approx(40.0, rel=1e-5)


def test_lesson_42_with_and_without_differ_in_the_technique_alone(tiny_experiment):
    """One seed: the same start, the same windows, and one setting that is not the same."""
    without, with_it = tiny_experiment("v10", seed=3), tiny_experiment("v11_1", seed=3)
    one, other = (flatten(experiment.model_dump(mode="json")) for experiment in (without, with_it))
    differing = {key for key in one if one[key] != other[key]}
    assert differing == {"version", "parent", "question", "change", "distillation.temperature.mode"}
    a, b = prepare(without), prepare(with_it)
    pairs = zip(a.module.student.parameters(), b.module.student.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert all(torch.equal(next(a.windows).input_ids, next(b.windows).input_ids) for _ in range(3))
