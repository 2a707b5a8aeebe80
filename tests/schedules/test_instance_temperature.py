"""A temperature per window or token: where it starts, what moves it, and what it must leave alone.

Shapes: B windows, L positions, C channels of the features.
"""

import pytest
import torch
from torch import Tensor

from asnn_goose.losses import forward_kl
from asnn_goose.schedules import InstanceTemperature, LearnableTemperature, normalised_states

B, L, C = 3, 4, 10
MASK = torch.tensor([[True, True, False, False], [True, True, True, True], [True, False, False, False]])


def features(seed: int = 0) -> Tensor:
    return torch.randn(B, L, C, generator=torch.Generator().manual_seed(seed))


def spread(scope, seed: int = 0) -> InstanceTemperature:
    """With an output layer that is not 0 any more."""
    torch.manual_seed(seed)
    module = InstanceTemperature(2.0, 1.0, 5.0, C, scope)
    torch.nn.init.normal_(module.out.weight)
    return module


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_it_starts_at_init_everywhere(scope):
    adversarial, plain = InstanceTemperature(2.0, 1.0, 5.0, C, scope)(features(), MASK, 0.7)
    assert adversarial.shape == plain.shape == (B, L)
    # The logit of init, and its sigmoid, in float32.
    assert adversarial.flatten().tolist() == plain.flatten().tolist() == pytest.approx([2.0] * B * L, rel=1e-6)


def test_one_per_window_is_read_from_its_counted_tokens_alone():
    module = spread("sequence")
    x = features()
    _, plain = module(x, MASK)
    assert torch.equal(plain, plain[:, :1].expand(B, L)) and plain[:, 0].unique().numel() == B
    disturbed = x.masked_fill(~MASK[..., None], torch.nan)
    assert torch.equal(module(disturbed, MASK)[1], plain)
    # Of a window with one counted token it is that token's own.
    assert plain[2, 0].item() == pytest.approx(spread("token")(x, MASK)[1][2, 0].item(), rel=1e-6)


def test_one_per_token_knows_its_token_alone():
    module, x = spread("token"), features()
    before = module(x, MASK)[1]
    changed = x.clone()
    changed[1, 2] += 1.0
    differs = module(changed, MASK)[1] != before
    assert differs[1, 2] and differs.sum() == 1
    assert before.unique().numel() == B * L and (before > 1.0).all() and (before < 5.0).all()


@pytest.mark.parametrize("scope", ["sequence", "token"])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_adversary_turns_every_parameters_gradient(lam: float, scope):
    module = spread(scope)
    s, t = (torch.randn(B, L, 7, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    both = [forward_kl(s, t, MASK, T[..., None]) for T in module(features(), MASK, lam)]
    parameters = list(module.parameters())
    turned, plain = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in both)
    for one, other in zip(turned, plain, strict=True):
        assert other.abs().max() > 0
        # The factor -lambda before or after sums of float32.
        torch.testing.assert_close(one, -lam * other, rtol=1e-4, atol=1e-7)


def test_it_moves_like_the_global_one_where_all_instances_are_alike():
    """All features 0: only the output's constant has a gradient, and it is that of the raw scalar."""
    one, shared = InstanceTemperature(2.0, 1.0, 5.0, C, "token"), LearnableTemperature(2.0, 1.0, 5.0)
    torch.nn.init.zeros_(one.hidden.bias)
    s, t = (torch.randn(B, L, 7, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    forward_kl(s, t, MASK, one(torch.zeros(B, L, C), MASK, 0.8)[0][..., None]).backward()
    forward_kl(s, t, MASK, shared(0.8)[0]).backward()
    assert one.out.bias.grad is not None and shared.raw.grad is not None
    assert one.out.bias.grad.item() == pytest.approx(shared.raw.grad.item(), rel=1e-5)


def test_no_model_is_steered_through_its_temperature():
    student, teacher = (torch.randn(B, L, 4, requires_grad=True) for _ in range(2))
    x = normalised_states(student, teacher)
    assert not x.requires_grad and x.shape == (B, L, 8)
    halves = x.view(B, L, 2, 4)
    assert halves.mean(-1).abs().max() < 1e-6 and (halves.var(-1, correction=0) - 1).abs().max() < 1e-3
    live = features().requires_grad_()
    spread("token")(live, MASK, 1.0)[0].sum().backward()
    assert live.grad is None


def test_whole_numbers_are_taken():
    module = InstanceTemperature(2, 1, 5, C, "token")
    module.recent.fill_(2.75)
    assert module.current() == 2.75


def test_bad_input():
    with pytest.raises(ValueError, match="high must be finite, not inf"):
        InstanceTemperature(2.0, 1.0, float("inf"), C, "token")
    with pytest.raises(ValueError, match=r"init \(5.0\) must lie strictly between low \(1.0\) and high \(5.0\)"):
        InstanceTemperature(5.0, 1.0, 5.0, C, "token")
    with pytest.raises(ValueError, match="lambda must be at least 0"):
        spread("token")(features(), MASK, -0.1)
