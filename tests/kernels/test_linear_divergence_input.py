"""What linear_divergence says to arguments that do not fit together: 6 rows, 5 and 4 channels, 11 tokens."""

import math
from typing import Any

import pytest
import torch

from asnn_goose.kernels.linear_divergence import linear_divergence
from asnn_goose.kernels.linear_divergence.tail import NODES

BACKENDS = ("reference", "tiled")
BOTH = {"ce": 0.3, "forward_kl": 0.7}
PARTS: dict[str, Any] = {
    "hidden_ND": torch.zeros(6, 5),
    "weight_VD": torch.zeros(11, 5),
    "teacher_hidden_NE": torch.zeros(6, 4),
    "teacher_weight_VE": torch.zeros(11, 4),
    "targets_N": torch.arange(6),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"reverse": 1.0}}, r"weights must name some of \('ce', 'forward_kl', .*\), not \['reverse'\]"),
        ({"weights": {}}, r"name some of .*, not \[\]"),
        ({"targets_N": None, "weights": BOTH}, "divergence ce needs targets_N"),
        ({"teacher_weight_VE": torch.zeros(12, 4)}, "heads of 11 and 12 tokens cannot be compared"),
        ({"teacher_hidden_NE": torch.zeros(7, 4)}, r"teacher hidden must be a matrix of 6 rows, .* not \(7, 4\)"),
        ({"hidden_ND": torch.zeros(2, 3, 5)}, r"hidden must be a matrix .* not \(2, 3, 5\)"),
        ({"targets_N": torch.zeros(5, dtype=torch.int64)}, r"one token id for each of 6 rows, not \(5,\)"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"one value for each of 6 rows, not \(5,\)"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0"),
        ({"temperature": math.nan}, "temperature must be above 0, not nan"),
        ({"temperature": math.inf}, "temperature must be finite, not inf"),
        ({"hidden_ND": torch.zeros(6, 4)}, r"hidden has 4 channels, and the head \(5,\)"),
        ({"teacher_hidden_NE": torch.zeros(6, 3)}, r"teacher hidden has 3 channels, and its head \(4,\)"),
        ({"targets_N": torch.zeros(6)}, r"one token id for each of 6 rows, not \(6,\) of torch.float32"),
        *(
            ({"weights": {name: 1.0}, "options": {name: given}}, message)
            for name, given, message in (
                ("tail_bucket_kl", {"k": 0}, "k must be at least 1, not 0"),
                ("tcs", {"k": -2}, "k must be at least 1, not -2"),
                ("jensen_shannon", {"beta": 1.0}, "beta must lie strictly between 0 and 1, not 1.0"),
                ("skew_kl", {"skew": 1.0}, r"skew must lie in \[0, 1\), not 1.0"),
                ("skew_kl", {"beta": 0.5}, "skew_kl takes skew and reverse, not beta"),
                ("forward_kl", {"foo": 1}, "forward_kl takes no options, not foo"),
            )
        ),
        ({"temperature": torch.ones(7)}, r"temperature must be one number, or one for each of 6 rows, not \(7,\)"),
        ({"temperature": torch.tensor([1.0, 1, -2, 1, 1, 1])}, "temperature must be above 0, not -2"),
    ],
)
def test_bad_input_is_told_in_one_sentence(changes: dict[str, Any], message: str, backend: str):
    arguments: dict[str, Any] = {**PARTS, "backend": backend, **changes}
    with pytest.raises(ValueError, match=message) as told:
        linear_divergence(**arguments)
    assert "\n" not in str(told.value)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="must be auto, native, triton, tiled, reference, not 'cuda'"):
        linear_divergence(**PARTS, backend="cuda")


@pytest.mark.parametrize("wrong", [-100, 11])
def test_a_token_outside_the_vocabulary_is_refused_where_its_row_counts(wrong: int):
    targets = torch.tensor([0, 1, wrong, 2, 3, 4])
    arguments: dict[str, Any] = {**PARTS, "targets_N": targets, "weights": {"ce": 1.0}}
    message = f"targets_N holds the token {wrong}, outside a vocabulary of 11: mask its row"
    with pytest.raises(ValueError, match=message):
        linear_divergence(**arguments)
    sums, count = linear_divergence(**arguments, mask=torch.arange(6) != 2)
    assert count == 5 and sums["ce"].item() == pytest.approx(5 * math.log(11))
    stored = (targets[:, None], torch.zeros(6, 1), torch.zeros(6, len(NODES)))
    with pytest.raises(ValueError, match=f"teacher_topk holds the token {wrong}, outside a vocabulary of 11"):
        linear_divergence(torch.zeros(6, 5), torch.zeros(11, 5), teacher_topk=stored, weights={"tail_bucket_kl": 1.0})


STORED: dict[str, Any] = {
    **{name: value for name, value in PARTS.items() if not name.startswith("teacher")},
    "teacher_topk": (torch.arange(18).view(6, 3) % 11, torch.full((6, 3), -2.0), torch.full((6, len(NODES)), -1.0)),
    "weights": {"tail_bucket_kl": 1.0},
}


def changed(place: int, part: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The stored teacher with ids (0), log-probabilities (1) or tail (2) of another kind."""
    stored = list(STORED["teacher_topk"])
    stored[place] = part
    return tuple(stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_hidden_NE": torch.zeros(6, 4)}, "as teacher_hidden_NE with teacher_weight_VE, or as teacher_topk"),
        ({"teacher_weight_VE": torch.zeros(11, 4)}, "give the teacher either as"),
        ({"teacher_topk": None}, "give the teacher either as"),
        ({"teacher_topk": None, "teacher_hidden_NE": torch.zeros(6, 4)}, "give the teacher either as"),
        (
            {"weights": {"tail_bucket_kl": 1.0, "forward_kl": 1.0, "tcs": 1.0}},
            "teacher_topk serves ce and tail_bucket_kl, not forward_kl, tcs",
        ),
        ({"options": {"tail_bucket_kl": {"k": 4}}}, "tail_bucket_kl.k is 4, but teacher_topk holds 3 tokens per row"),
        ({"teacher_topk": changed(0, torch.zeros(6, 3))}, r"int64 ids .* \(6, K\), not torch.float32 \(6, 3\)"),
        ({"teacher_topk": changed(1, torch.zeros(6, 2))}, r"of one shape .* not torch.int64 \(6, 3\) and \(6, 2\)"),
        ({"teacher_topk": changed(2, torch.zeros(6, 2))}, r"at the 7 nodes for each of 6 rows, not \(6, 2\)"),
        ({"temperature": 5.01}, "serves temperatures from 1 to 5, not 5.01"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unfitting_stored_teacher_is_told_in_one_sentence(changes: dict[str, Any], message: str, backend: str):
    with pytest.raises(ValueError, match=message) as told:
        linear_divergence(**{**STORED, "backend": backend, **changes})
    assert "\n" not in str(told.value)


def test_a_stored_teacher_takes_its_own_k():
    linear_divergence(**STORED, options={"tail_bucket_kl": {"k": 3}})


def test_the_native_form_refuses_float64():
    wide = {name: x.double() if name.startswith(("hidden", "weight", "teacher")) else x for name, x in PARTS.items()}
    with pytest.raises(ValueError, match="backend native takes bfloat16, float16, float32, not float64"):
        linear_divergence(**wide, backend="native")


def test_the_native_form_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"backend native knows ce and forward_kl, not \['reverse_kl'\]"):
        linear_divergence(**PARTS, weights={"reverse_kl": 1.0}, backend="native")
    with pytest.raises(ValueError, match="backend triton runs on cuda, not on cpu"):
        linear_divergence(**PARTS, backend="triton")
    with pytest.raises(ValueError, match=r"options name \['tcs'\], which have no weight"):
        linear_divergence(**PARTS, options={"tcs": {"k": 3}})
