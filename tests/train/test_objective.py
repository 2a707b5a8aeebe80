"""Every term of every objective file, as the step computes it, against the term's own function on whole tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from asnn_goose import losses
from asnn_goose.config.load import CONFIGS
from asnn_goose.config.losses import BIASED, Losses
from asnn_goose.data.loader import Batch
from asnn_goose.errors import UserError
from asnn_goose.losses import alignment, relation
from asnn_goose.losses.dual_head import dual_head
from asnn_goose.losses.feature_dynamics import feature_dynamics, raw_dynamics_cka
from asnn_goose.train.objective import OPTIONS
from asnn_goose.train.setting import Setting
from asnn_goose.train.step import accumulate_gradients

TINY = {
    "fdd": {"fdd_trajectory__layers": 2, "fdd_derivative__layers": 2},
    "raw_dynamics": {"raw_dynamics__layers": 2},
    "rkd": {"rkd_distance__segment": 4, "rkd_angle__segment": 4},
    "contrastive": {"contrastive__segment": 4},
    "minilm": {"value_relation__heads": 4},
    "minilmv2": {"qkv_relation__heads": 4},
    "bitdistill": {"qkv_relation__heads": 4, "qkv_relation__layer": 1, "qkv_relation__block": 4},
}
"""What a file's numbers become for models of two layers and windows of 16."""
FILES = sorted(path.stem for path in (CONFIGS / "distillation").glob("*.yaml"))
TEMPERATURE = 1.5


@dataclass
class ByHand:
    """Both models' insides at the positions that predict, from whole passes of transformers' own models."""

    setting: Setting
    batch: Batch

    @property
    def module(self) -> Any:
        return self.setting.module

    @property
    def mask(self) -> Tensor:
        return self.batch.mask[:, 1:]

    @property
    def text_mask(self) -> Tensor:
        """Without each window's first token."""
        return self.mask & (torch.arange(self.mask.shape[1]) > 0)

    @cached_property
    def _student(self) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
        student, seen = self.setting.module.student, {}
        mix: Any = student.model.blocks[-1].get_submodule("time_mix")
        for name, module in {"query": mix.receptance, "key": mix.key, "value": mix.value}.items():
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out[:, :-1]}))
        out = student(self.batch.input_ids, output_hidden_states=True)
        return out.logits[:, :-1], tuple(x[:, :-1] for x in out.hidden_states), seen

    @cached_property
    def _teacher(self) -> tuple[Tensor, dict[int, Tensor], dict[Any, Tensor]]:
        model: Any = self.setting.teacher.model
        layers: dict[int, Tensor] = {}
        seen: dict[Any, Tensor] = {}
        for number, block in enumerate(model.model.layers, 1):
            block.register_forward_hook(
                lambda _m, _i, out, number=number: layers.update({number: (out[0] if isinstance(out, tuple) else out)})
            )
            for name in ("query", "key", "value"):
                projection = getattr(block.self_attn, f"{name[0]}_proj")
                projection.register_forward_hook(
                    lambda _m, _i, out, key=(number, name): seen.update({key: out[:, :-1]})
                )
        with torch.no_grad():
            logits = model(self.batch.input_ids).logits[:, :-1, : self.setting.teacher.vocab_size]
        return logits, {number: x[:, :-1] for number, x in layers.items()}, seen

    student_logits = property(lambda self: self._student[0])
    student_layers = property(lambda self: self._student[1])
    student_projections = property(lambda self: self._student[2])
    teacher_logits = property(lambda self: self._teacher[0])
    teacher_layers = property(lambda self: self._teacher[1])

    def teacher_projections(self, layer: int) -> dict[str, Tensor]:
        return {name: self._teacher[2][layer, name] for name in ("query", "key", "value")}

    def rows(self, states: Tensor, segment: int) -> Tensor:
        """Means over segments of the text's tokens, by plain loops."""
        means = []
        for window, mask in zip(states, self.text_mask, strict=True):
            for start in range(0, len(mask), segment):
                kept = window[start : start + segment][mask[start : start + segment]]
                if len(kept):
                    means.append(kept.mean(0))
        return torch.stack(means)

    def read_out(self, side: str) -> Callable[[Tensor], Tensor]:
        module = self.module
        if side == "teacher":
            teacher: Any = self.setting.teacher
            return lambda x: teacher.model.model.norm(x) @ teacher.head_weight_VE.T
        return lambda x: module.student.model.norm(x) @ module.student.lm_head.weight.T


def of_logits(function: Callable, name: str, m: ByHand, term) -> Tensor:
    options = {option: getattr(term, option) for option in OPTIONS.get(name, ())}
    return function(m.student_logits, m.teacher_logits, mask=m.mask, temperature=TEMPERATURE, **options)


def ce(m: ByHand, term) -> Tensor:
    return losses.cross_entropy(m.student_logits, m.batch.input_ids[:, 1:], m.mask)


def hidden(m: ByHand, term) -> Tensor:
    measure = {"mse": alignment.mse, "normalised_mse": alignment.normalised_mse}
    measure |= {"pkd": alignment.pkd, "cosine": alignment.cosine}
    pairs = {"uniform": [(1, 1), (2, 2)], "tinybert": [(1, 1), (2, 2)], "pkd_skip": [(1, 1)], "last": [(2, 2)]}
    mask = m.text_mask if term.skip_first else m.mask
    values = []
    for ours, theirs in pairs[term.layers]:
        state = m.student_layers[ours]
        if term.projector != "none":
            state = m.module.features.projectors[str(ours)](state)
        values.append(measure[term.measure](state, m.teacher_layers[theirs], mask))
    return torch.stack(values).mean()


def cka(m: ByHand, term) -> Tensor:
    pairs = [(m.student_layers[i][m.text_mask], m.teacher_layers[i][m.text_mask]) for i in (1, 2)]
    return torch.stack([1 - losses.linear_cka(x, y, term.debiased) for x, y in pairs]).mean()


def dynamics(m: ByHand, term, index: int) -> Tensor:
    ours, theirs = ([layers[1], layers[2]] for layers in (m.student_layers, m.teacher_layers))
    return feature_dynamics(ours, theirs, m.read_out("student"), m.read_out("teacher"), m.mask)[index]


def raw_dynamics(m: ByHand, term) -> Tensor:
    ours, theirs = ([layers[1], layers[2]] for layers in (m.student_layers, m.teacher_layers))
    return raw_dynamics_cka(ours, theirs, m.mask)


def pooled(m: ByHand, term, function: Callable) -> Tensor:
    return function(m.rows(m.student_layers[2], term.segment), m.rows(m.teacher_layers[2], term.segment))


def contrastive(m: ByHand, term) -> Tensor:
    projector = m.module.features.projectors["contrastive"]
    ours, theirs = m.rows(m.student_layers[2], term.segment), m.rows(m.teacher_layers[2], term.segment)
    return relation.info_nce(projector(ours), theirs, term.sharpness)


def related(m: ByHand, term, names: tuple[str, ...]) -> Tensor:
    _, theirs = m.teacher_logits, m.teacher_projections(term.layer or 2)
    _, ours = m.student_logits, m.student_projections
    values = [relation.relation_kl(ours[n], theirs[n], term.heads, m.mask, term.block) for n in names]
    return torch.stack(values).sum()


def auxiliary(m: ByHand, term) -> Tensor:
    last = m.module.states(m.batch.input_ids)[:, :-1]
    head = m.module.auxiliary_head.weight
    return dual_head(last @ head.T, m.teacher_logits, m.mask, term.tau, term.centred)


ORACLES: dict[str, Callable[[ByHand, Any], Tensor]] = {
    name: partial(of_logits, getattr(losses, name), name)
    for name in (
        "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "adaptive_kl", "total_variation", "tail_bucket_kl",
        "tcs",
    )
} | {
    "ce": ce,
    "dual_head": auxiliary,
    "hidden": hidden,
    "cka": cka,
    "fdd_trajectory": partial(dynamics, index=0),
    "fdd_derivative": partial(dynamics, index=1),
    "raw_dynamics": raw_dynamics,
    "rkd_distance": partial(pooled, function=relation.rkd_distance),
    "rkd_angle": partial(pooled, function=relation.rkd_angle),
    "contrastive": contrastive,
    "value_relation": partial(related, names=("value",)),
    "qkv_relation": partial(related, names=("query", "key", "value")),
}  # fmt: skip
"""Term -> its token mean; random_sampling draws, lad mixes layers, and pocl's stages set T and weights: they have tests
of their own."""


def objective(moved, file: str, **changes) -> Setting:
    flags = {f"distillation__losses__{key}": value for key, value in TINY.get(file, {}).items()}
    fixed = {"distillation__temperature__init": TEMPERATURE, "distillation__targets": "online"}
    return moved("v10", distillation=file, **(flags | fixed | changes))


@pytest.mark.parametrize(
    ("file", "options"),
    [(file, {}) for file in FILES if file not in ("random_sampling", "lad", "pocl")]
    + [("cka", {"cka__debiased": False}), ("contrastive", {"contrastive__sharpness": 0.5})],
)
def test_a_file_s_terms_are_the_token_means_of_their_functions(moved, ragged, file: str, options: dict):
    flags = {f"distillation__losses__{key}": value for key, value in options.items()}
    setting = objective(moved, file, distillation__balance__mode="none", **flags)
    batch = ragged(setting)
    found = accumulate_gradients(setting.context, [batch], 0)
    terms = setting.experiment.distillation.losses.present()
    assert terms.keys() == yaml.safe_load((CONFIGS / "distillation" / f"{file}.yaml").read_text())["losses"].keys()
    for name, term in terms.items():
        expected = ORACLES[name](ByHand(setting, batch), term).item()
        # float32 products and sums in another order.
        assert found[f"loss_{name}_raw"] == pytest.approx(expected, rel=2e-4, abs=1e-6), name
        assert found[f"loss_{name}_weighted"] == pytest.approx(term.weight * found[f"loss_{name}_raw"], rel=1e-12)


@pytest.mark.parametrize("name", Losses.model_fields)
def test_a_term_alone_moves_the_student(moved, ragged, name: str):
    """With a gradient that reaches the first block, so that no term is cut off from the student."""
    (file,) = [f for f in FILES if name in _losses_of(f)][:1]
    others = {f"distillation__losses__{other}__weight": 0.0 for other in _losses_of(file) if other != name}
    weight = {f"distillation__losses__{name}__weight": 1.0}
    setting = objective(moved, file, **(others | weight), distillation__balance__mode="none")
    setting.module.zero_grad(set_to_none=True)
    accumulate_gradients(setting.context, [ragged(setting)], 0)
    first = setting.module.student.model.blocks[0].get_submodule("time_mix.receptance").get_parameter("weight")
    assert first.grad is not None and 1e-9 < first.grad.norm().item() < 1e6


def _losses_of(file: str) -> dict:
    return yaml.safe_load((CONFIGS / "distillation" / f"{file}.yaml").read_text())["losses"]


@pytest.mark.parametrize("file", ["hidden", "fdd", "minilmv2", "kd"])
def test_ragged_micro_batches_add_up_to_one_batch(moved, ragged, file: str):
    """Terms that are means over tokens; windows do not meet in them."""
    setting = objective(moved, file)
    batch = ragged(setting)
    whole = accumulate_gradients(setting.context, [batch], 0)
    parts = [Batch(batch.input_ids[rows], batch.mask[rows]) for rows in ([0, 2], [1], [3])]
    split = accumulate_gradients(setting.context, parts, 0)
    losses_ = [key for key in whole if key.startswith("loss_")]
    if file == "hidden":
        # The first tokens are no part of the mean, and a short window has a larger share of them.
        losses_ = [key for key in losses_ if "hidden" not in key and key != "loss_total"]
    assert [split[key] for key in losses_] == pytest.approx([whole[key] for key in losses_], rel=1e-4)


def test_random_sampling_has_the_expectation_of_the_full_cross_entropy(moved, ragged):
    setting = objective(moved, "random_sampling")
    batch = ragged(setting)
    m = ByHand(setting, batch)
    p, log_q = m.teacher_logits.softmax(-1), m.student_logits.log_softmax(-1)
    expected = -(p * log_q).sum(-1)[m.mask].mean().item()
    steps = (accumulate_gradients(setting.context, [batch], 0) for _ in range(60))
    draws = torch.tensor([metrics["loss_random_sampling_raw"] for metrics in steps])
    # Five standard errors of the mean of the draws.
    assert abs(draws.mean().item() - expected) < 5 * draws.std().item() / 60**0.5
    assert draws.std() > 0


def test_random_sampling_by_a_high_power_draws_the_teachers_best_token_alone(moved, ragged):
    """Its draws carry p each, over their number: what is left of the sum is -p log q of that token."""
    setting = objective(moved, "random_sampling", distillation__losses__random_sampling__power=1e6)
    batch = ragged(setting)
    m = ByHand(setting, batch)
    p, best = m.teacher_logits.softmax(-1).max(-1)
    log_q = m.student_logits.log_softmax(-1).gather(-1, best[..., None]).squeeze(-1)
    found = accumulate_gradients(setting.context, [batch], 0)["loss_random_sampling_raw"]
    # float32 products and sums in another order.
    assert found == pytest.approx(-(p * log_q)[m.mask].mean().item(), rel=2e-4)


def test_an_auxiliary_head_starts_as_a_copy_of_the_students(moved):
    module: Any = objective(moved, "dual_head").module
    own, auxiliary = module.student.lm_head.weight, module.auxiliary_head.weight
    assert torch.equal(auxiliary, own) and auxiliary.data_ptr() != own.data_ptr() and auxiliary.requires_grad


@pytest.mark.parametrize("name", ["fdd_trajectory", "fdd_derivative"])
def test_what_the_layers_predict_trains_no_row_of_the_head(moved, ragged, name: str):
    """The head is the table too, where tokens that were read have a gradient, and the others none."""
    others = {f"distillation__losses__{other}__weight": 0.0 for other in _losses_of("fdd") if other != name}
    setting = objective(moved, "fdd", **others, train__embeddings="trained")
    batch = ragged(setting)
    setting.module.zero_grad(set_to_none=True)
    accumulate_gradients(setting.context, [batch], 0)
    head_VC = setting.module.student.lm_head.weight
    read_V = torch.zeros(len(head_VC), dtype=torch.bool).index_fill(0, batch.input_ids.flatten(), True)
    assert head_VC.grad is not None and 0 < read_V.sum() < len(read_V)
    assert head_VC.grad[read_V].any() and not head_VC.grad[~read_V].any()


def test_aggregated_layers_are_halved_into_one_another(moved, ragged):
    setting = objective(
        moved, "lad", student__layers=1, distillation__losses__hidden__projector="none",
        distillation__losses__hidden__measure="mse",
    )  # fmt: skip
    batch = ragged(setting)
    m = ByHand(setting, batch)
    _ = m.teacher_logits
    target = 0.5 * (m.teacher_layers[1] + m.teacher_layers[2])
    expected = (m.student_layers[1] - target)[m.text_mask].square().mean().item()
    found = accumulate_gradients(setting.context, [batch], 0)["loss_hidden_raw"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert not any(p.requires_grad for p in m.module.features.mixtures.parameters())


def test_projectors_train_and_are_no_part_of_the_student(moved):
    setting = objective(moved, "hidden")
    groups = {group["name"]: group for group in setting.optimisers.student.param_groups}
    assert setting.module.features is not None
    projectors = {id(p) for p in setting.module.features.projectors.parameters()}
    assert {id(p) for p in groups["projectors"]["params"]} == projectors
    assert not any("projector" in name for name, _ in setting.module.student.named_parameters())


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("hidden", {"hidden__layers": "tinybert", "student": 3}, r"losses\.hidden\.layers: layer map tinybert needs 2"),
        ("hidden", {"hidden__layers": "pkd_last", "student": 3}, r"losses\.hidden\.layers: .*at least as many"),
        ("pkd", {"student": 1}, r"losses\.hidden\.layers: pkd_skip compares nothing of a student of one layer"),
        ("fdd", {"fdd_trajectory__layers": 3}, r"losses\.fdd_trajectory\.layers must be at least 1, and at most 2"),
        ("minilmv2", {"qkv_relation__layer": 3}, "a relation needs a layer up to 2, the teacher's last, not 3"),
        (
            "minilmv2",
            {"value_relation__weight": 1, "value_relation__heads": 4, "value_relation__layer": 1},
            "must relate one teacher layer",
        ),
    ],
)
def test_what_the_models_have_not_got_is_one_sentence(moved, file: str, changes: dict, sentence: str):
    layers = {"student__layers": changes.pop("student")} if "student" in changes else {}
    flags = {f"distillation__losses__{key}": value for key, value in changes.items()}
    with pytest.raises(UserError, match=sentence):
        objective(moved, file, **layers, **flags)


def test_biased_terms_are_known_by_their_own_names():
    assert BIASED.keys() <= Losses.model_fields.keys()


def test_the_triple_loss_of_distilbert_weighs_5_2_1(tiny_experiment):
    """Components 0.1 (KL), 0.3 (CE), 0.52 (cosine) make 1.62."""
    terms = tiny_experiment("v10", distillation="distilbert").distillation.losses.present()
    values = {"forward_kl": 0.1, "ce": 0.3, "hidden": 0.52}
    assert sum(terms[name].weight * value for name, value in values.items()) == pytest.approx(1.62)
    assert terms.keys() == values.keys()
