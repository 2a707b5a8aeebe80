"""count against loops in float64 and the derivative of its formulas by hand; the forms against each other; tallies.

Shapes: N tokens, C channels.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asnn_goose.kernels.count import count
from asnn_goose.kernels.count.tally import on_and_off_levels, tally

N, C = 7, 37
FORMS = ["numba", "reference"]


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _theta(per_channel: bool) -> torch.Tensor:
    return _draw(C, seed=3).abs() + 0.5 if per_channel else torch.tensor(0.8)


def _by_hand(x_NC, theta_C, levels, per_token, offset, silence):
    """(s, gain, u) in float64, value by value."""
    s, gain, u = (np.zeros((len(x_NC), C)) for _ in range(3))
    for n in range(len(x_NC)):
        scale = max(sum(abs(x) for x in x_NC[n]) / C, 1e-6) if per_token else 1.0
        for c in range(C):
            gain[n, c] = theta_C[c] * scale
            u[n, c] = x_NC[n, c] / gain[n, c]
            k = math.floor(levels * min(abs(u[n, c]), 1.0) + offset)
            if abs(x_NC[n, c]) / scale >= silence:
                s[n, c] = math.copysign(k, u[n, c]) / levels
    return s, gain, u


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("levels", "offset", "silence"), [(1, 0.0, 0.0), (4, 0.0, 0.3), (40, 0.5, 0.0), (15, 0.25, 0.7)]
)
def test_values_and_gradients_are_those_of_the_formulas(form, per_token, per_channel, levels, offset, silence):
    x_NC, theta = _draw(N, C).requires_grad_(), _theta(per_channel).requires_grad_()
    g_NC, h_NC = _draw(N, C, seed=1), _draw(N, C, seed=2)
    s_NC, gain = count(
        x_NC, levels, threshold=theta, per_token=per_token, offset=offset,
        silence=torch.tensor(silence) if silence else None, backend=form,
    )  # fmt: skip
    theta_C = theta.detach().expand(C).double().numpy()
    s, gains, u = _by_hand(x_NC.detach().double().numpy(), theta_C, levels, per_token, offset, silence)
    assert 0.0 < (s != 0).mean() < 1.0
    # float32 decides a tie another way than float64 where u N + offset is whole up to its rounding: none of these is.
    np.testing.assert_allclose(s_NC.detach().numpy(), s, rtol=0, atol=1e-6)
    np.testing.assert_allclose(gain.detach().expand(N, C).numpy(), gains, rtol=1e-6)

    grad_x, grad_theta = torch.autograd.grad([s_NC, gain.expand(N, C)], [x_NC, theta], [g_NC, h_NC])
    within = g_NC.double().numpy() * (np.abs(u) <= 1.0)
    at_gain = h_NC.double().numpy() - within * u / gains
    scale_N1 = gains[:, :1] / theta_C[0]
    wanted = within / gains
    if per_token:
        wanted += np.sign(x_NC.detach().numpy()) * (at_gain * theta_C).sum(1, keepdims=True) / C
    at_theta_C = (at_gain * scale_N1).sum(0)
    # Sums of 37 and 7 * 37 terms of size 1 in float32.
    np.testing.assert_allclose(grad_x.numpy(), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        grad_theta.numpy(), at_theta_C if per_channel else at_theta_C.sum(), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1), (5, 3), (2, 3, 64), (9, 200), (0, 4)]),
    levels=st.sampled_from([1, 4, 31, 40, 121]),
    offset=st.sampled_from([0.0, 0.5]),
    silent=st.booleans(),
    special=st.sampled_from([0.0, -0.0, 1e-30, 1e30, math.nan, math.inf, -math.inf]),
)
def test_both_forms_agree(seed, shape, levels, offset, silent, special):
    results = []
    for form in FORMS:
        x = _draw(*shape, seed=seed)
        x[:1, :1] = special
        x[1:2] = 0.0  # a token without any current
        x.requires_grad_()
        theta = torch.tensor(0.7, requires_grad=True)
        silence = torch.tensor(0.2) if silent else None
        s, gain = count(x, levels, threshold=theta, offset=offset, silence=silence, backend=form)
        upstream = _draw(*shape, seed=seed + 1)
        results.append(
            (s.detach(), gain.detach(), *torch.autograd.grad([(s * upstream).sum() + gain.sum()], [x, theta]))
        )
    (native_s, *native), (reference_s, *reference) = results
    # The mean |x| of a token is summed in another order, so that a current at a tie may go to the next level.
    assert torch.equal(native_s.isnan(), reference_s.isnan())
    far = (native_s - reference_s).abs().nan_to_num() > 1e-6
    assert (
        int(far.sum()) <= 1
        and float((native_s - reference_s).abs().nan_to_num().max() if far.any() else 0) < 1.001 / levels
    )
    if not far.any():
        for mine, plain in zip(native, reference, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_no_neighbours_in_memory(form):
    wide = _draw(2, 5, 2 * C)
    x = wide[..., ::2].requires_grad_()
    theta = torch.tensor(1.0)
    s, _ = count(x, 4, threshold=theta, backend=form)
    (grad,) = torch.autograd.grad(s.sum(), x)
    plain = x.detach().clone().requires_grad_()
    same, _ = count(plain, 4, threshold=theta, backend="reference")
    assert torch.equal(s, same)
    torch.testing.assert_close(grad, torch.autograd.grad(same.sum(), plain)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_result_can_be_changed_in_place(form):
    x = _draw(N, C).requires_grad_()
    s, _ = count(x, 4, threshold=torch.tensor(1.0), per_token=False, backend=form)
    s[0] = 0.0
    s.mul_(3.0)
    (grad,) = torch.autograd.grad(s.sum(), x)
    wanted = 3.0 * (x.detach().abs() <= 1.0)
    wanted[0] = 0.0
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("shape", [(), (C,)])
@pytest.mark.parametrize(
    ("current", "theta"),
    [(torch.float32, torch.float64), (torch.float32, torch.bfloat16), (torch.float64, torch.float32),
     (torch.bfloat16, torch.float64)],
)  # fmt: skip
def test_the_current_alone_decides_the_dtype(current, theta, shape, per_token):
    threshold = torch.full(shape, 0.75, dtype=theta, requires_grad=True)
    x = _draw(N, C).to(current).requires_grad_()
    for form in FORMS[1:] if current == torch.float64 else FORMS:
        results = count(x, 4, threshold=threshold, per_token=per_token, silence=torch.tensor(0.1), backend=form)
        assert {result.dtype for result in results} == {torch.promote_types(current, torch.float32)}
        grads = torch.autograd.grad(sum(result.sum() for result in results), [x, threshold])  # pyright: ignore
        assert [grad.dtype for grad in grads] == [current, theta]


def test_one_thread_or_two_give_the_same_counts():
    threads, results = torch.get_num_threads(), []
    try:
        for some in (1, 2):
            torch.set_num_threads(some)
            x = _draw(N, C).requires_grad_()
            s, gain = count(x, 40, threshold=torch.tensor(2.0), offset=0.5)
            results.append((s.detach(), *torch.autograd.grad(s.sum() + gain.sum(), x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"levels": 0}, "levels must be a whole number of at least 1, not 0"),
        ({"levels": 2.5}, "levels must be a whole number of at least 1, not 2.5"),
        ({"threshold": torch.tensor(0.0)}, "threshold must be above 0 and finite, not 0.0"),
        ({"threshold": torch.tensor(math.nan)}, "threshold must be above 0 and finite, not nan"),
        ({"threshold": torch.ones(C).index_fill(0, torch.tensor(3), math.inf)}, "above 0 and finite, not inf"),
        ({"silence": torch.ones(C)}, r"silence must be one number for all channels, not of shape \(37,\)"),
        ({"current_xC": torch.zeros(2, 0)}, r"at least one channel, not shape \(2, 0\)"),
        ({"offset": 1.0}, r"offset must lie in \[0, 1\), not 1.0"),
        ({"threshold": torch.ones(2)}, r"one number or one per channel \(37\), not \(2,\)"),
        ({"backend": "triton"}, "count backend triton runs on cuda, not on cpu"),
        ({"backend": "snntorch"}, "count backend must be auto, numba, triton, reference, not 'snntorch'"),
        ({"current_xC": torch.zeros(C, dtype=torch.float64), "backend": "numba"}, "numba takes .*, not float64"),
        ({"current_xC": torch.tensor(1.0)}, "must have channels"),
    ],
)
def test_wrong_input_is_refused(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        count(**{"current_xC": torch.zeros(2, C), "levels": 4, "threshold": torch.tensor(1.0), **keys})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [1, 13, 40])
def test_tallies_are_those_of_a_loop(dtype, levels):
    k_NC = torch.randint(-levels, levels + 1, (2, 9, C), generator=torch.Generator().manual_seed(levels))
    spikes_K = torch.randint(0, 5, (levels + 1,), generator=torch.Generator().manual_seed(1))
    wanted = np.zeros((3, C), dtype=np.int64)
    for row in k_NC.reshape(-1, C).tolist():
        for c, k in enumerate(row):
            fired = int(spikes_K[abs(k)])
            wanted[:, c] += [fired, k != 0, fired == 4]
    np.testing.assert_array_equal(tally(k_NC.to(dtype) / levels, levels, spikes_K, 4).numpy(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tally_reads_nothing_beyond_its_table(dtype):
    s = torch.tensor([[math.nan, math.inf, -7.0, 0.5]], dtype=dtype)
    assert tally(s, 2, torch.tensor([0, 1, 3]), 3).tolist() == [[0, 3, 3, 1], [0, 1, 1, 1], [0, 1, 1, 0]]
    with pytest.raises(ValueError, match=r"spikes_K must have an entry for each .* to levels, 3, not \(2,\)"):
        tally(s, 2, torch.tensor([0, 1]), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_are_told_from_other_values(dtype):
    k = torch.arange(-13, 14, dtype=dtype) / 13
    off = torch.tensor([0.5, 1.5, -14 / 13, math.nan, 1 / 13 + 1e-4], dtype=dtype)
    assert on_and_off_levels(torch.cat([k, off]), 13) == (26, 5)
