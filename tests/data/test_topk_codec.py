"""The codec of the k best tokens, against float64 arithmetic on the full logits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asnn_goose.data.topk_codec import decode, encode, row_bytes
from asnn_goose.kernels.linear_divergence.tail import NODES, log_tail

V, ROWS = 3000, 48
TEMPERATURES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0)


def _noise(scale: float, seed: int) -> Tensor:
    return scale * torch.randn(ROWS, V, generator=torch.Generator().manual_seed(seed))


def _shuffled(ranked_V: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([ranked_V[torch.randperm(V, generator=generator)] for _ in range(ROWS)])


def _cliff(*above: float) -> Tensor:
    """Some tokens over a bulk of standard deviation 2: the first by 4 to 16 nats, the others by so much less."""
    logits = _noise(2.0, 1)
    top_N1 = logits.amax(-1, keepdim=True) + torch.linspace(4, 16, ROWS)[:, None]
    logits[:, 100 : 100 + len(above)] = top_N1 - torch.tensor(above)
    return logits


ZIPF = torch.arange(1, V + 1).float().log()
TEACHERS = {
    "zipf": _shuffled(-ZIPF) + _noise(0.3, 2),
    "steep zipf": _shuffled(-2 * ZIPF),
    "normal": _noise(3.0, 3),
    "peaked": _cliff(0.0),
    "two peaks": _cliff(0.0, 0.3),
    "five peaks": _cliff(0.0, 0.1, 0.5, 2.0, 4.0),
    "nearly flat": _noise(0.05, 4),
    "flat": torch.zeros(ROWS, V),
}


def _exact(logits_NV: Tensor, ids_NK: Tensor, T: float = 1.0) -> tuple[Tensor, Tensor]:
    """log-probabilities [N, K] and the log mass of the tail [N] at T, in float64."""
    log_p_NV = (logits_NV.double() / T).log_softmax(-1)
    return log_p_NV.gather(-1, ids_NK), log_p_NV.scatter(-1, ids_NK, -math.inf).logsumexp(-1)


def _bucket_kl(log_p: tuple[Tensor, Tensor], log_q: tuple[Tensor, Tensor]) -> Tensor:
    """KL [N] between two distributions over K tokens and a bucket."""
    p_NK, q_NK = (torch.cat([head_NK, tail_N[:, None]], -1).double() for head_NK, tail_N in (log_p, log_q))
    return torch.where(p_NK.exp() > 0, p_NK.exp() * (p_NK - q_NK), 0.0).sum(-1)


def _tempered(log_p_NK: Tensor, log_tail_NJ: Tensor, T: float) -> tuple[Tensor, Tensor]:
    head_NK, tail_N = log_p_NK.double() / T, log_tail(log_tail_NJ.double(), T)
    log_z_N = torch.logaddexp(head_NK.logsumexp(-1), tail_N)
    return head_NK - log_z_N[:, None], tail_N - log_z_N


def test_a_row_takes_at_most_125_bytes_for_37_tokens_of_the_default_vocabulary():
    assert row_bytes(49_152, 37) == 125
    assert encode(torch.zeros(1, 49_152), 37).shape == (1, 125)
    assert row_bytes(151_936, 37) == 125 + 2 * 37


@pytest.mark.parametrize("k", [1, 2, 37, 256])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_what_is_read_is_close_to_the_teacher(teacher, k):
    logits_NV = TEACHERS[teacher]
    ids_NK, log_p_NK, log_tail_NJ = decode(encode(logits_NV, k), V, k)
    assert ids_NK.dtype == torch.int64 and log_p_NK.dtype == log_tail_NJ.dtype == torch.float32
    ours = log_p_NK, log_tail_NJ[:, 0]
    assert _bucket_kl(_exact(logits_NV, ids_NK), ours).max() <= 1e-5
    kept_NK = logits_NV.gather(-1, ids_NK)
    assert torch.equal(kept_NK, logits_NV.topk(k, -1).values)  # equal logits may stand in another order
    assert (log_p_NK.diff(dim=-1) <= 0).all()
    # Float32 sums of at most 257 terms.
    assert torch.allclose(log_p_NK.exp().sum(-1) + log_tail_NJ[:, 0].exp(), torch.ones(ROWS), atol=1e-5)


@pytest.mark.parametrize("student", ["near", "far"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_divergence_from_the_store_is_the_divergence_from_the_logits(teacher, student):
    """A mean over tokens, as a loss is. far: a KL of 0.4 to 1.9 nats at T = 1."""
    logits_NV, k = TEACHERS[teacher], 37
    student_NV = logits_NV + _noise({"near": 0.3, "far": 2.0}[student], 5)
    ids_NK, log_p_NK, log_tail_NJ = decode(encode(logits_NV, k), V, k)
    for T in TEMPERATURES:
        log_q = _exact(student_NV, ids_NK, T)
        exact_N = _bucket_kl(_exact(logits_NV, ids_NK, T), log_q)
        stored_N = _bucket_kl(_tempered(log_p_NK, log_tail_NJ, T), log_q)
        assert (exact_N - stored_N).mean().abs() <= 1e-3, T
        # 48 rows; of a single one: eight-bit steps of 0.0087 nats and more, against log-ratios of several nats.
        assert (exact_N - stored_N).abs().max() <= 5e-3, T


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_tails_partition_is_read_to_half_a_step(teacher):
    logits_NV = TEACHERS[teacher]
    ids_NK, _, log_tail_NJ = decode(encode(logits_NV, 37), V, 37)
    log_p_NV = logits_NV.double().log_softmax(-1).scatter(-1, ids_NK, -math.inf)
    exact_NJ = torch.stack([(u * log_p_NV).logsumexp(-1) for u in NODES], -1)
    # The mass: steps of 2 sqrt(128 |L|) / 65535; the others 2^-12; float32 logits of up to 40 add about 1e-5.
    mass_step_N = 2 * (128 * exact_NJ[:, 0].abs()).sqrt() / 65535
    assert ((log_tail_NJ[:, 0] - exact_NJ[:, 0]).abs() <= 0.5 * mass_step_N + 2e-5).all()
    torch.testing.assert_close(log_tail_NJ[:, 1:].double(), exact_NJ[:, 1:], rtol=0, atol=0.5 * 2**-12 + 2e-5)


@pytest.mark.parametrize("k", [7, 8, 100])
def test_an_empty_tail_has_no_mass_at_any_temperature(k):
    logits_NV = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    logits_NV[:, 3] = -math.inf  # seven tokens are allowed
    ids_NK, log_p_NK, log_tail_NJ = decode(encode(logits_NV, k), 8, k)
    assert ids_NK.shape == (5, min(k, 8))
    assert log_tail_NJ.isfinite().all()
    for T in (*TEMPERATURES, 1.1, 4.9):
        assert (log_tail(log_tail_NJ, T) < -25).all()
    exact = logits_NV.double().log_softmax(-1).gather(-1, ids_NK)
    torch.testing.assert_close(log_p_NK[:, :7].double(), exact[:, :7], rtol=0, atol=0.02)
    if k > 7:
        assert (log_p_NK[:, 7:].exp() < 1e-7).all()


def test_a_large_vocabulary_keeps_its_ids():
    logits_NV = torch.zeros(2, 70_000)
    logits_NV[0, 69_999], logits_NV[1, 65_536] = 9.0, 8.0
    ids_NK, log_p_NK, _ = decode(encode(logits_NV, 1), 70_000, 1)
    assert ids_NK.tolist() == [[69_999], [65_536]]
    expected = torch.tensor([[9.0], [8.0]]) - torch.log(69_999 + torch.tensor([[9.0], [8.0]]).exp())
    torch.testing.assert_close(log_p_NK, expected, rtol=0, atol=2e-3)


def test_the_last_id_of_two_bytes_is_kept():
    logits_NV = torch.zeros(1, 65_536)
    logits_NV[0, 65_535] = 9.0
    assert decode(encode(logits_NV, 3), 65_536, 3)[0][0, 0] == 65_535


def test_an_error_after_a_cliff_does_not_reach_the_tokens_behind_it():
    # The third gap is 10 nats, where a step is a nat; what follows it closely is within a small step all the same.
    log_p_K = -torch.tensor([0.0, 0.2, 10.2, 10.25, 10.3, 10.35, 10.4])
    for shift in np.linspace(0, 1.2, 13):
        logits_NV = (log_p_K - shift * (torch.arange(7) > 1)).repeat(1, 1)
        ids_NK, log_p_NK, _ = decode(encode(logits_NV, 7), 7, 7)
        error_K = (log_p_NK - logits_NV.log_softmax(-1).gather(-1, ids_NK)).abs()[0]
        assert error_K[2] < 1.2 and (error_K[3:] < 0.1).all() and (error_K[:2] < 1e-3).all()


@settings(max_examples=60)
@given(
    V=st.integers(1, 60),
    k=st.integers(1, 70),
    scale=st.floats(0, 6),
    banned=st.floats(0, 0.8),
    seed=st.integers(0, 2**31),
)
def test_any_distribution_comes_back_in_order_and_whole(V, k, scale, banned, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = scale * torch.randn(6, V, generator=generator)
    out = torch.rand(6, V, generator=generator) < banned
    out[:, 0] = False
    logits_NV[out] = -math.inf
    K = min(k, V)
    rows_NB = encode(logits_NV, k)
    assert rows_NB.shape == (6, row_bytes(V, k)) and rows_NB.dtype == torch.uint8
    ids_NK, log_p_NK, log_tail_NJ = decode(rows_NB, V, k)
    assert torch.equal(logits_NV.gather(-1, ids_NK), logits_NV.topk(K, -1).values)
    assert all(len(set(row)) == K for row in ids_NK.tolist())
    assert (log_p_NK.diff(dim=-1) <= 0).all()
    total_N = log_p_NK.double().exp().sum(-1) + log_tail_NJ[:, 0].double().exp()
    torch.testing.assert_close(total_N, torch.ones(6).double(), rtol=0, atol=1e-5)
    assert _bucket_kl(_exact(logits_NV, ids_NK), (log_p_NK, log_tail_NJ[:, 0])).max() <= 3e-5
    assert (log_tail_NJ.diff(dim=-1) >= 0).all()  # p^u falls with u


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_distribution_is_refused(bad):
    logits_NV = torch.zeros(3, 9)
    logits_NV[1, 4] = bad
    with pytest.raises(ValueError, match="no distribution"):
        encode(logits_NV, 2)
    with pytest.raises(ValueError, match="no distribution"):
        encode(torch.full((1, 9), -math.inf), 2)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_no_rows_are_no_rows(k):
    rows = encode(torch.zeros(0, 9), k)
    assert rows.shape == (0, row_bytes(9, k)) and decode(rows, 9, k)[0].shape == (0, k)


def test_k_below_one_and_rows_of_another_k_are_refused():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        encode(torch.zeros(1, 9), 0)
    with pytest.raises(ValueError, match=r"rows of \d+ bytes are not those of k = 3 and 9 tokens"):
        decode(encode(torch.zeros(1, 9), 2), 9, 3)
