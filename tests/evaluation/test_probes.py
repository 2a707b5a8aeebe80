"""Probes, similarity and binned information on matrices: numpy's least squares, planted maps and planted joint
distributions, invariances, and what the controls are by chance.

Shapes: N tokens, C input channels, Q targets, D compared channels, S signs, K bins.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asnn_goose.evaluation import probes
from asnn_goose.evaluation.probes import (
    PENALTIES,
    Design,
    Probe,
    Split,
    accuracy,
    binned_information,
    chance_information,
    controlled_cka,
    joint_counts,
    probe_classes,
    probe_states,
    r_squared,
)
from asnn_goose.losses import linear_cka

seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ternary(*shape: int, seed: int) -> Tensor:
    """Mean spikes of four micro-steps."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 4.0


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def lstsq_ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """(W, b): least squares on the centred rows below which sqrt(p mean(e)) I stands, with targets 0."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    stiff = penalty * np.trace((x - x_mean).T @ (x - x_mean)) / x.shape[1]
    rows = np.concatenate([x - x_mean, np.sqrt(stiff) * np.eye(x.shape[1])])
    weight = np.linalg.lstsq(rows, np.concatenate([y - y_mean, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    return weight, y_mean - x_mean @ weight


@pytest.mark.parametrize("penalty", [1e-6, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize(("N", "C", "Q"), [(40, 5, 3), (12, 20, 2)])
def test_ridge_is_numpys_least_squares(N: int, C: int, Q: int, penalty: float):
    x, y = normal(N, C, seed=1) + 5.0, normal(N, Q, seed=2) - 3.0
    y[:, 0] += x[:, 0]
    (linear,) = Design(x).maps(y, [penalty])
    weight, bias = lstsq_ridge(x.numpy(), y.numpy(), penalty)
    # The normal equations square a condition number of at most 1e6 in float64.
    np.testing.assert_allclose(linear.weight_CQ.numpy(), weight, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(linear.bias_Q.numpy(), bias, rtol=1e-8, atol=1e-8)
    assert linear.penalty == penalty


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16])
def test_blocks_and_narrow_dtypes_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Counts are exact in each of these dtypes, so sums in float64 are, up to their order."""
    x, y = 4 * ternary(50, 6, seed=3), 4 * ternary(50, 2, seed=4)
    (whole,) = Design(x.double()).maps(y.double(), [0.1])
    monkeypatch.setattr(probes, "ROWS", 7)
    (found,) = Design(x.to(dtype)).maps(y.to(dtype), [0.1])
    torch.testing.assert_close(found.weight_CQ, whole.weight_CQ, rtol=1e-10, atol=1e-12)
    assert r_squared(found, x.to(dtype), y.to(dtype)) == pytest.approx(r_squared(whole, x, y), rel=1e-10)
    assert accuracy(found, x.to(dtype), y.argmax(-1)) == accuracy(whole, x, y.argmax(-1))


def test_autocast_does_not_narrow_the_products():
    x, y, split = ternary(90, 8, seed=5), normal(90, 3, seed=6).float(), Split(50, 20, 20)
    expected = probe_states(x, y, split), controlled_cka(x, y, split.permutation(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert (probe_states(x, y, split), controlled_cka(x, y, split.permutation(0))) == expected


def test_r_squared_weighs_each_target_by_its_variance():
    x, y = normal(30, 4, seed=7), normal(30, 3, seed=8) * torch.tensor([1.0, 3.0, 0.2]) + 7.0
    y += x[:, :1]
    (linear,) = Design(x).maps(y, [1e-3])
    rest = (y - linear(x)).numpy()
    each = 1.0 - (rest**2).mean(0) / y.numpy().var(0)
    assert r_squared(linear, x, y) == pytest.approx(np.average(each, weights=y.numpy().var(0)), rel=1e-12)


def test_targets_that_do_not_vary_have_no_r_squared():
    (linear,) = Design(normal(5, 2, seed=0)).maps(normal(5, 3, seed=1), [1.0])
    with pytest.raises(ValueError, match=r"R\^2 of 2 tokens with the same targets is not defined"):
        r_squared(linear, normal(2, 2, seed=2), torch.ones(2, 3))


def test_a_planted_map_is_read_and_a_shuffled_one_is_not():
    N, C, split = 1200, 20, Split(600, 300, 300)
    x, shift = ternary(N, C, seed=9), normal(1, 30, seed=10)
    y = x.double() @ normal(C, 30, seed=11) + shift
    found = probe_states(x, y, split)
    # The least penalty, 1e-6, shrinks the fit by about as much, of which R^2 sees the square.
    assert found.value == pytest.approx(1.0, abs=1e-10)
    # Between the expectation without a penalty and 0. A fit to chance holds C / 900 of the variance; its product with
    # 300 held-out tokens in 20 directions spreads by 2 sqrt(C / 900 / 300 / 20) = 0.004, five times which are allowed.
    assert -C / (900 - C - 1) - 0.02 < found.shuffled < 0.02


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_r_squared_of_a_noisy_map_is_the_share_of_the_signal(noise: float):
    x = normal(6000, 10, seed=12)
    y = x @ rotation(10, seed=13) + noise * normal(6000, 10, seed=14)
    # Signal 1 and noise^2 per target; the sampling error over 10 targets of 2,000 tokens is below 1 %.
    assert probe_states(x, y, Split(3000, 1000, 2000)).value == pytest.approx(1 / (1 + noise**2), abs=0.02)


def test_separable_classes_are_told_apart_and_shuffled_ones_are_not():
    classes, N, split = 6, 1800, Split(900, 300, 600)
    labels = torch.randint(classes, (N,), generator=torch.Generator().manual_seed(15))
    x = normal(classes, 12, seed=16)[labels] + 0.05 * normal(N, 12, seed=17)
    found = probe_classes(x, labels, classes, split)
    assert found.value == 1.0
    # A guess among equal classes over 600 tokens: binomial, four standard deviations.
    assert abs(found.shuffled - 1 / classes) < 4 * math.sqrt(5 / 36 / 600)


def test_silent_inputs_give_the_majority_and_no_variance():
    labels = torch.tensor([0, 0, 0, 1, 2] * 40)
    split, silent = Split(100, 50, 50), torch.zeros(200, 7)
    assert probe_classes(silent, labels, 3, split).value == 0.6
    y = normal(200, 4, seed=18)
    y_held = y[150:]
    expected = 1.0 - (y_held - y[:150].mean(0)).square().sum() / (y_held - y_held.mean(0)).square().sum()
    assert probe_states(silent, y, split).value == pytest.approx(expected.item(), rel=1e-12)


def test_the_penalty_is_the_best_on_the_choice_part_and_the_map_is_fitted_on_both():
    split = Split(25, 30, 20)
    x, noise = normal(75, 15, seed=19), normal(75, 2, seed=20)
    y = x[:, :2] + noise
    fitted = x.numpy()[:55], y.numpy()[:55]

    def error(penalty: float) -> float:
        weight, bias = lstsq_ridge(fitted[0][:25], fitted[1][:25], penalty)
        return float(((fitted[0][25:] @ weight + bias - fitted[1][25:]) ** 2).sum())

    best = min(PENALTIES, key=error)
    assert best not in (PENALTIES[0], PENALTIES[-1])
    # What is held out is not even read.
    x[55:], y[55:] = math.nan, math.nan
    linear = Probe(x, split).learn(y)
    assert linear.penalty == best
    np.testing.assert_allclose(linear.weight_CQ.numpy(), lstsq_ridge(*fitted, best)[0], rtol=1e-9, atol=1e-12)


@settings(max_examples=25)
@given(seed=seeds, factor=st.floats(1e-3, 1e3))
def test_probes_do_not_feel_scale_offset_or_rotation(seed: int, factor: float):
    split, C, Q = Split(30, 15, 15), 6, 4
    x, y = normal(60, C, seed=seed), normal(60, Q, seed=seed + 1)
    y[:, :3] += 2.0 * x[:, :3]
    labels = y.argmax(-1)
    moved = factor * (x @ rotation(C, seed=seed + 2) + normal(1, C, seed=seed + 3))
    # Float64 sums in another order; only a tie of two penalties to about 12 digits could swap them.
    value = probe_states(x, y, split).value
    assert probe_states(moved, y, split).value == pytest.approx(value, abs=1e-6)
    turned = factor * (y @ rotation(Q, seed=seed + 4)) + normal(1, Q, seed=seed + 5)
    assert probe_states(x, turned, split).value == pytest.approx(value, abs=1e-6)
    renamed = torch.randperm(Q, generator=torch.Generator().manual_seed(seed))[labels]
    found = probe_classes(x, labels, Q, split)
    assert probe_classes(moved, renamed, Q, split) == found


@given(sizes=st.tuples(*[st.integers(1, 30)] * 3), seed=seeds)
def test_the_control_exchanges_tokens_within_the_fitted_and_the_held_out_part(sizes: tuple[int, int, int], seed: int):
    split = Split(*sizes)
    order = split.permutation(seed)
    assert sorted(order[: split.fitted].tolist()) == list(range(split.fitted))
    assert sorted(order[split.fitted :].tolist()) == list(range(split.fitted, sum(sizes)))
    assert torch.equal(order, split.permutation(seed))


def test_a_split_of_some_tokens_keeps_their_parts():
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    assert Split(3, 2, 3).kept(mask) == Split(2, 1, 3)
    with pytest.raises(ValueError, match=r"every part of Split\(fit=2, choice=0, held_out=3\) needs a token"):
        Split(3, 2, 3).kept(mask & (torch.arange(8) != 3))


def planted(counts_DSK: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes and states with exactly these joint counts, bin k at k + 0.5 of a range pinned to [0, K]."""
    columns = []
    for counts_SK in counts_DSK:
        sign, bin_ = np.indices(counts_SK.shape).reshape(2, -1)
        times = counts_SK.flatten().numpy()
        columns.append((np.repeat(sign - 1, times) / 4.0, np.repeat(bin_ + 0.5, times)))
    spikes, states = (torch.tensor(np.stack(side, 1)) for side in zip(*columns, strict=True))
    return spikes, states


def bits(counts_SK: np.ndarray) -> float:
    """sum p log2(p / (p_s p_k)) over the cells that occur."""
    p = counts_SK / counts_SK.sum()
    apart = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p[p > 0] * np.log2(p[p > 0] / apart[p > 0])).sum())


@given(st.lists(st.integers(0, 20), min_size=12, max_size=12).filter(lambda cells: sum(cells) > 0))
def test_binned_information_of_a_planted_joint_distribution(cells: list[int]):
    counts = torch.tensor(cells).view(1, 3, 4)
    found = binned_information(counts)
    assert found == pytest.approx(bits(counts[0].numpy()), abs=1e-12)
    for axis in (0, 1):
        p = counts[0].sum(axis).numpy() / sum(cells)
        assert -1e-12 <= found <= -(p[p > 0] * np.log2(p[p > 0])).sum() + 1e-12
    assert chance_information(counts) == pytest.approx(
        np.prod([max(0, int((counts[0].sum(axis) > 0).sum()) - 1) for axis in (0, 1)]) / (2 * sum(cells) * np.log(2))
    )


def test_counts_are_those_that_were_planted():
    generator = torch.Generator().manual_seed(21)
    wanted = torch.randint(1, 9, (2, 3, 8), generator=generator)
    # Both channels have as many tokens, and both ends of the range occur.
    wanted[1] = wanted[0].flip(0)
    spikes, states = planted(wanted)
    states[0], states[-1] = 0.0, 8.0
    assert torch.equal(joint_counts(spikes, states, bins=8, channels=2), wanted)
    assert torch.equal(joint_counts(torch.cat([spikes] * 2, 1), states, bins=8, channels=5), wanted)
    assert torch.equal(joint_counts(spikes, states, bins=8, channels=1), wanted[:1])


def test_a_sign_that_is_the_state_has_all_three_thirds_and_a_still_state_none():
    sign = torch.tensor([-1.0, 0.0, 1.0]).repeat(100)[:, None]
    assert binned_information(joint_counts(sign, 100.0 + 5.0 * sign)) == pytest.approx(math.log2(3.0), rel=1e-12)
    still = joint_counts(sign, torch.full_like(sign, 3.0))
    assert binned_information(still) == pytest.approx(0.0, abs=1e-12)
    assert chance_information(still) == 0.0


def test_binned_information_by_chance_is_its_first_order_bias():
    N, repeats = 4096, 40
    found, told = [], []
    for seed in range(repeats):
        states = torch.rand(N, 8, generator=torch.Generator().manual_seed(seed))
        spikes = torch.randint(-1, 2, (N, 8), generator=torch.Generator().manual_seed(1000 + seed)) / 4.0
        counts = joint_counts(spikes, states)
        found.append(binned_information(counts))
        told.append(chance_information(counts))
    assert told == pytest.approx([2 * 31 / (2 * N * math.log(2))] * repeats)
    # 2 N ln 2 I is chi-squared with 62 degrees: four standard deviations of a mean of 320, and 2 % for the next order.
    assert np.mean(found) == pytest.approx(told[0], rel=4 * math.sqrt(2 / 62 / (8 * repeats)) + 0.02)


@settings(max_examples=30)
@given(seed=seeds, exponent=st.integers(-10, 10), spike_scale=st.floats(1e-3, 1e3))
def test_bins_follow_the_range_and_signs_the_sign(seed: int, exponent: int, spike_scale: float):
    spikes, states = ternary(80, 3, seed=seed), normal(80, 3, seed=seed + 1)
    # A power of 2 moves no state across the edge of a bin.
    assert torch.equal(joint_counts(spikes * spike_scale, states * 2.0**exponent), joint_counts(spikes, states))


def test_a_rotation_hides_from_bins_what_similarity_and_probes_see():
    x = ternary(3000, 8, seed=22)
    y, order = x.double() @ rotation(8, seed=23), Split(1500, 500, 1000).permutation(0)
    aligned, turned = (binned_information(joint_counts(x, states)) for states in (x, y))
    assert turned < 0.5 * aligned
    assert controlled_cka(x, y, order).value == pytest.approx(1.0, abs=1e-12)
    assert probe_states(x, y, Split(1500, 500, 1000)).value == pytest.approx(1.0, abs=1e-10)


def test_cka_is_that_of_all_rows_where_one_minibatch_holds_them():
    x, y = ternary(300, 10, seed=24), normal(300, 6, seed=25)
    y[:, :4] += 2.0 * x[:, :4]
    order = Split(150, 50, 100).permutation(3)
    found = controlled_cka(x, y, order)
    assert found.value == pytest.approx(linear_cka(x.double(), y, debiased=True).item(), rel=1e-12)
    assert found.shuffled == pytest.approx(linear_cka(x.double(), y[order], debiased=True).item(), rel=1e-9)


def test_cka_in_minibatches_is_nearly_that_of_all_rows_and_chance_is_near_0():
    n, k = 5000, 5
    x, y = ternary(n, 10, seed=26), normal(n, 6, seed=27)
    y[:, :4] += 2.0 * x[:, :4]
    # In the text's order the minibatches would be five topics, each with an offset of its own.
    y[:, 0] += 3.0 * torch.arange(n).div(1000, rounding_mode="floor")
    order = Split(2500, 1000, 1500).permutation(0)
    whole = linear_cka(x.double(), y, debiased=True).item()
    found = controlled_cka(x, y, order)
    assert found.value == pytest.approx(whole, rel=0.02)
    topics = linear_cka(x[:1000].double(), y[:1000], debiased=True).item()
    assert abs(topics - whole) > 0.2 * whole
    # Standard deviation sqrt(2 k) / n under independence.
    assert abs(found.shuffled) < 4 * math.sqrt(2 * k) / n
