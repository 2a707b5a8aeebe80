"""What linear_divergence says to arguments that do not fit together: 6 rows, 5 and 4 channels, 11 tokens."""

import math
from typing import Any

import pytest
import torch

from asnn_goose.kernels.linear_divergence import linear_divergence

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
        ({"teacher_hidden_NE": torch.zeros(7, 4)}, r"hidden \(6, 5\) and teacher hidden \(7, 4\) .* same rows"),
        ({"hidden_ND": torch.zeros(2, 3, 5)}, r"hidden \(2, 3, 5\) and .* must be matrices"),
        ({"targets_N": torch.zeros(5, dtype=torch.int64)}, r"one token id for each of 6 rows, not \(5,\)"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"one bool for each of 6 rows, not \(5,\) of torch.bool"),
        ({"mask": torch.ones(6, dtype=torch.int64)}, r"one bool for each of 6 rows, not \(6,\) of torch.int64"),
        ({"temperature": 0.0}, "temperature must be one number above 0, not 0.0"),
        ({"temperature": math.nan}, "temperature must be one number above 0, not nan"),
        ({"temperature": torch.ones(6)}, "temperature must be one number above 0"),
    ],
)
def test_bad_input_is_told_in_one_sentence(changes: dict[str, Any], message: str, backend: str):
    arguments: dict[str, Any] = {**PARTS, "backend": backend, **changes}
    with pytest.raises(ValueError, match=message) as told:
        linear_divergence(**arguments)
    assert "\n" not in str(told.value)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="must be auto, native, tiled, reference, not 'triton'"):
        linear_divergence(**PARTS, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_outside_the_vocabulary_is_refused(backend: str):
    for wrong in (-100, 11):
        arguments: dict[str, Any] = {**PARTS, "targets_N": torch.tensor([0, 1, wrong, 2, 3, 4]), "weights": {"ce": 1.0}}
        with pytest.raises(RuntimeError, match=f"index {wrong} is out of bounds"):
            linear_divergence(**arguments, backend=backend)


def test_the_native_form_refuses_float64():
    wide = {name: x.double() if name.startswith(("hidden", "weight", "teacher")) else x for name, x in PARTS.items()}
    with pytest.raises(ValueError, match="backend native takes bfloat16, float16, float32, not float64"):
        linear_divergence(**wide, backend="native")


def test_the_native_form_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"backend native knows ce and forward_kl, not \['reverse_kl'\]"):
        linear_divergence(**PARTS, weights={"reverse_kl": 1.0}, backend="native")
    with pytest.raises(ValueError, match=r"options name \['tcs'\], which have no weight"):
        linear_divergence(**PARTS, options={"tcs": {"k": 3}})
