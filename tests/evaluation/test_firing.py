"""Firing statistics against counts made token by token from the spikes that the neurons emitted.

Shapes: B windows, L tokens, T micro-steps, C channels.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from asnn_goose.evaluation.firing import SITES, SiteFiring, measure_firing, pooled, projections, spike_raster
from asnn_goose.models import GooseForCausalLM
from asnn_goose.models.spiking import SpikingLinear

LAYERS, C, F = 2, 32, 40


@dataclass
class _Windows:
    input_ids: Tensor


def _batches() -> list[_Windows]:
    generator = torch.Generator().manual_seed(0)
    return [_Windows(torch.randint(50, shape, generator=generator)) for shape in ((3, 12), (2, 7))]


def _student(make_student, **keys) -> GooseForCausalLM:
    return make_student(channel_mix_size=F, **keys)


def _linear(student: GooseForCausalLM, layer: int, site: str) -> SpikingLinear:
    return next(linear for at, name, linear in projections(student) if (at, name) == (layer, site))


def _measured(student: GooseForCausalLM) -> tuple[list[SiteFiring], list[np.ndarray]]:
    """(statistics, mean spike [tokens, C] of every population as a hook saw it)."""
    seen: list[list[Tensor]] = [[] for _ in projections(student)]

    def keep(calls):
        return lambda _module, _inputs, output: calls.append(output[0].flatten(0, 1))

    for (_, _, linear), calls in zip(projections(student), seen, strict=True):
        linear.neuron.register_forward_hook(keep(calls))
    sites = measure_firing(student, student.model, _batches())
    return sites, [torch.cat(calls).detach().numpy() for calls in seen]


@pytest.mark.parametrize("steps", [1, 4, 13])
def test_statistics_are_those_of_the_spikes_counted_one_by_one(make_student, steps):
    neuron = {"steps": steps, "threshold": 2.0, "learn_decay": "layer", "decay": 0.9}
    student = _student(make_student, neuron=neuron, hidden_neuron={"kind": "binary", "steps": steps})
    with torch.no_grad():
        _linear(student, 1, "receptance").neuron.log_threshold.fill_(5.0)  # silent
        _linear(student, 2, "channel_key").weight[:3] = 0.0  # three hidden channels that never fire
        _linear(student, 2, "channel_value").neuron.log_threshold.fill_(-4.0)  # and others that nearly always do
    sites, spikes = _measured(student)
    assert len(sites) == LAYERS * 6
    for site, s in zip(sites, spikes, strict=True):
        assert s.shape == (3 * 12 + 2 * 7, site.channels)
        counts = np.abs(np.rint(s * steps))
        assert site.rate == pytest.approx(counts.sum() / (s.size * steps), abs=1e-12)
        assert site.zero_fraction == pytest.approx((counts == 0).mean(), abs=1e-12)
        assert site.dead_fraction == pytest.approx(np.mean([not column.any() for column in counts.T]), abs=1e-12)
        assert site.saturated_fraction == pytest.approx(
            np.mean([(column == steps).all() for column in counts.T]), abs=1e-12
        )
        assert site.operand_fraction == 1.0
        assert site.steps == steps
        exact = site.tokens, site.spikes, site.active, site.analog, site.additions
        assert exact == (len(s), counts.sum(), (counts > 0).sum(), 0, counts.sum() * site.outputs)
    assert (sites[0].rate, sites[0].zero_fraction, sites[0].dead_fraction) == (0.0, 1.0, 1.0)
    assert sites[-1].dead_fraction >= 3 / F
    assert any(0.0 < site.rate < 1.0 for site in sites)


def test_sites_come_in_the_order_of_the_forward_pass_with_their_shapes(make_student):
    student = _student(make_student, neuron={"learn_threshold": "channel", "decay": 0.75})
    sites = measure_firing(student, student.model, _batches())
    names = ["receptance", "key", "value", "output", "channel_key", "channel_value"]
    assert list(SITES.values()) == names
    assert [(site.layer, site.site) for site in sites] == [(layer, name) for layer in (1, 2) for name in names]
    shapes = [(C, C)] * 4 + [(C, F), (F, C)]
    assert [(site.channels, site.outputs) for site in sites] == shapes * 2
    for site, (_, _, linear) in zip(sites, projections(student), strict=True):
        assert site.threshold == pytest.approx(linear.neuron.log_threshold.exp().mean().item())
    assert [site.decay for site in sites] == [0.75, 0.75, 0.75, 0.75, 0.75, 1.0] * 2


@pytest.mark.parametrize("learn_decay", ["layer", "channel"])
def test_a_learned_decay_is_reported_as_it_has_become(make_student, learn_decay):
    student = _student(make_student, neuron={"learn_decay": learn_decay, "decay": 0.9})
    decay_logit = _linear(student, 2, "value").neuron.decay_logit
    assert decay_logit is not None
    with torch.no_grad():
        decay_logit.fill_(np.log(0.8 / 0.2))
    sites = {(site.layer, site.site): site for site in measure_firing(student, student.model, _batches())}
    # A float32 sigmoid.
    assert sites[2, "value"].decay == pytest.approx(0.8, rel=1e-6)


def test_another_projection_of_a_block_is_found_under_its_path(make_student):
    class Halves(torch.nn.Module):
        """Receptance of the sum of two products."""

        def __init__(self, neuron):
            super().__init__()
            self.left, self.right = SpikingLinear(C, C, neuron), SpikingLinear(C, C, neuron)

        def forward(self, x, membranes):
            return self.left(x, membranes) + self.right(x, membranes)

    student = _student(make_student)
    halves = Halves(student.config.neuron)
    for linear in (halves.left, halves.right):
        torch.nn.init.orthogonal_(linear.weight)
    student.model.blocks[1].get_submodule("time_mix").add_module("receptance", halves)
    sites = measure_firing(student, student.model, _batches())
    first = [site.site for site in sites if site.layer == 1]
    assert first == list(SITES.values())
    second = [site.site for site in sites if site.layer == 2]
    assert second == ["time_mix_receptance_left", "time_mix_receptance_right", *list(SITES.values())[1:]]


@pytest.mark.parametrize("learn_threshold", ["fixed", "layer", "channel"])
@pytest.mark.parametrize("scale", ["none", "token"])
def test_a_gain_varies_where_it_is_the_tokens(make_student, scale, learn_threshold):
    neuron = {"scale": scale, "learn_threshold": learn_threshold}
    student = _student(make_student, neuron=neuron, hidden_neuron=neuron)
    assert {site.gain_varies for site in measure_firing(student, student.model, _batches())} == {scale == "token"}


def test_always_firing_channels_are_saturated(make_student):
    student = _student(make_student, neuron={"scale": "none", "threshold": 1e-3})
    site = measure_firing(student, student.model, _batches())[4]
    assert site.saturated_fraction > 0.9 and site.dead_fraction == 0.0 and site.rate > 0.99


@pytest.mark.parametrize("steps", [1, 4])
def test_a_dense_student_has_no_spikes_for_operands(make_student, steps):
    dense = {"kind": "dense", "steps": steps}
    student = _student(make_student, neuron=dense, hidden_neuron=dense)
    for site in measure_firing(student, student.model, _batches()):
        # relu^2 gives zeros, which lie on every neuron's levels and are no spikes.
        assert site.operand_fraction < 0.01, site
        assert (site.rate, site.zero_fraction, site.saturated_fraction, site.steps) == (0.0, 1.0, 0.0, 1)
        assert (site.spikes, site.active, site.analog) == (0, 0, site.tokens * site.channels)
        assert site.tokens == 50 and not site.gain_varies


def test_a_dense_site_that_gives_nothing_but_zeros_has_no_spikes_either(make_student):
    dense = {"kind": "dense"}
    student = _student(make_student, neuron=dense, hidden_neuron=dense)
    torch.nn.init.zeros_(_linear(student, 1, "channel_key").weight)
    sites = {(site.layer, site.site): site for site in measure_firing(student, student.model, _batches())}
    assert sites[1, "channel_value"].operand_fraction == 0.0


def test_one_dense_site_among_spiking_ones_is_seen(make_student):
    student = _student(make_student, hidden_neuron={"kind": "dense"})
    fractions = {site.site: site.operand_fraction for site in measure_firing(student, student.model, _batches())}
    assert fractions.pop("channel_value") < 0.01
    assert set(fractions.values()) == {1.0}


def test_measuring_leaves_the_student_as_it_was(make_student):
    student = _student(make_student)
    ids = _batches()[0].input_ids
    with torch.no_grad():
        before = student(ids).logits
    first = measure_firing(student, student.model, _batches())
    assert measure_firing(student, student.model, _batches()) == first
    with torch.no_grad():
        assert torch.equal(student(ids).logits, before)
    assert all(not linear.neuron._forward_hooks for _, _, linear in projections(student))
    with pytest.raises(ZeroDivisionError):
        measure_firing(student, lambda ids: ids[1 // 0], _batches())
    assert all(not linear.neuron._forward_hooks for _, _, linear in projections(student))
    assert measure_firing(student, student.model, _batches()) == first


def test_the_steps_form_is_not_watched(make_student):
    student = _student(make_student)
    _linear(student, 2, "key").form = "steps"
    with pytest.raises(ValueError, match="rate form"):
        measure_firing(student, student.model, _batches())


def test_pooled_is_a_weighted_mean(make_student):
    sites = measure_firing(_student(make_student), _student(make_student).model, _batches()[:0])
    sites = [replace(site, rate=float(i)) for i, site in enumerate(sites)]
    weights = [site.channels for site in sites]
    expected = np.average(np.arange(len(sites)), weights=weights)
    assert pooled(sites, "rate", lambda site: site.channels) == pytest.approx(expected)


@pytest.mark.parametrize("site", ["key", "channel_key", "channel_value"])
def test_a_raster_shows_each_micro_step_of_one_population(make_student, site):
    student, ids = _student(make_student, neuron={"steps": 3}, hidden_neuron={"steps": 3}), _batches()[0].input_ids[:1]
    raster = spike_raster(student, ids, 2, site)
    seen: list[Tensor] = []
    linear = _linear(student, 2, site)
    hook = linear.neuron.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0][0]))
    with torch.no_grad():
        student(ids)
    hook.remove()
    assert raster.dtype == np.int8 and set(np.unique(raster)) <= {-1, 0, 1}
    assert raster.shape == (12 * 3, linear.neuron.channels)
    # Three rows per token, of which the mean is what the rate form emitted.
    by_token = raster.reshape(12, 3, -1)
    np.testing.assert_allclose(by_token.mean(1), seen[0].numpy(), rtol=1e-6)
    # Under constant current a soft reset spaces the spikes, so micro-steps differ.
    assert (by_token[:, 0] != by_token[:, 2]).any()
    assert not linear._forward_pre_hooks
