"""combine: the token mean over a whole optimiser step."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asnn_goose.losses import combine

WEIGHTS = {"ce": 0.3, "forward_kl": 0.7}


def test_weighted_sum_and_metrics_by_hand():
    sums = {"forward_kl": torch.tensor(12.0), "ce": torch.tensor(20.0)}
    total, metrics = combine(sums, WEIGHTS, 4.0)
    assert total.item() == pytest.approx(0.3 * 5 + 0.7 * 3)
    assert metrics == {"loss_ce_raw": 5.0, "loss_forward_kl_raw": 3.0}
    assert all(isinstance(value, float) for value in metrics.values())


def test_ragged_micro_batches_are_averaged_over_tokens_and_not_over_batches():
    """Per-token losses [1, 1] and [4] * 6: 3.25, where the mean of the means is 2.5."""
    batches = [torch.tensor([1.0, 1.0]), torch.tensor([4.0] * 6)]
    count = float(sum(len(batch) for batch in batches))
    parts = [combine({"ce": batch.sum()}, {"ce": 1.0}, count) for batch in batches]
    assert sum(total.item() for total, _ in parts) == 3.25
    assert sum(metrics["loss_ce_raw"] for _, metrics in parts) == 3.25


@given(cuts=st.lists(st.integers(0, 12), max_size=4), w_ce=st.floats(0, 3), w_kd=st.floats(0, 3))
def test_accumulation_does_not_change_the_gradient(cuts: list[int], w_ce: float, w_kd: float):
    values = torch.linspace(0.1, 2.0, 12, dtype=torch.float64)
    weights = {"ce": w_ce, "forward_kl": w_kd}

    def gradient(edges: list[int]) -> Tensor:
        x = values.clone().requires_grad_()
        for start, stop in itertools.pairwise(edges):
            piece = x[start:stop]
            combine({"ce": piece.sum(), "forward_kl": piece.square().sum()}, weights, 12.0)[0].backward()
        assert x.grad is not None
        return x.grad

    whole = gradient([0, 12])
    torch.testing.assert_close(whole, (w_ce + 2 * w_kd * values) / 12)
    torch.testing.assert_close(gradient([0, *sorted(cuts), 12]), whole)


@pytest.mark.parametrize("given_terms", [{"ce"}, {"ce", "forward_kl", "hidden"}, {"ce", "reverse_kl"}, set()])
def test_terms_that_are_not_the_configured_ones_are_refused(given_terms: set[str]):
    sums = {name: torch.tensor(1.0) for name in given_terms}
    with pytest.raises(KeyError, match=r"the step gave the loss terms .* but \['ce', 'forward_kl'\] are configured"):
        combine(sums, WEIGHTS, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_is_named(value: float):
    sums = {"ce": torch.tensor(1.0), "forward_kl": torch.tensor(value)}
    with pytest.raises(FloatingPointError, match=f"loss term forward_kl is {value}"):
        combine(sums, WEIGHTS, 1.0)
    # A weight of 0 does not hide it.
    with pytest.raises(FloatingPointError, match="forward_kl"):
        combine(sums, WEIGHTS | {"forward_kl": 0.0}, 1.0)


def test_a_step_without_tokens_gives_zero_with_a_graph():
    x = torch.ones(3, requires_grad=True)
    total, metrics = combine({"ce": x[:0].sum()}, {"ce": 1.0}, 0.0)
    total.backward()
    assert metrics == {"loss_ce_raw": 0.0}
    assert x.grad is not None and x.grad.tolist() == [0.0] * 3
