"""Operations against loops that do them one by one on a tiny student, and beside SpikingJelly's counter.

Shapes: B windows, L tokens of one, N tokens in all, T micro-steps, C channels, O outputs.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter
from torch import Tensor, nn

from asnn_goose.evaluation.energy import neuron_operations, student_operations
from asnn_goose.evaluation.firing import SiteFiring, measure_firing, projections
from asnn_goose.models import GooseForCausalLM
from asnn_goose.models.spiking import Neuron, SpikingLinear

C, F, T = 8, 12, 4


class _Batch:
    input_ids = torch.randint(20, (2, 3), generator=torch.Generator().manual_seed(0))


TOKENS = _Batch.input_ids.numel()

FORMS: dict[str, dict[str, Any]] = {
    "ternary": {},
    "one micro-step": {"steps": 1},
    "three micro-steps": {"steps": 3},
    "binary": {"kind": "binary"},
    "leaky": {"decay": 0.75},
    "learned leak": {"kind": "binary", "decay": 0.9, "learn_decay": "layer"},
    "hard reset": {"reset": "hard"},
    "offset": {"offset": 0.5},
    "amplitude in the matrix": {"scale": "none", "threshold": 0.7},
    "amplitude per channel in the matrix": {"scale": "none", "learn_threshold": "channel", "threshold": 0.7},
    "amplitude per channel and token": {"learn_threshold": "channel"},
    "counted at once": {"kind": "integer", "offset": 0.5},
    "radix": {"kind": "radix", "offset": 0.5, "steps": 3},
    "radix of base 3": {"kind": "radix", "base": 3, "steps": 3},
    "radix, amplitude in the matrix": {"kind": "radix", "scale": "none", "learn_threshold": "channel"},
    "whole numbers": {"kind": "quantised"},
    "dense": {"kind": "dense"},
}


def _student(make_student, neuron: dict[str, Any], **keys) -> GooseForCausalLM:
    # In float64, where the two forms of the product give the same spikes.
    both = {"steps": T, "threshold": 1.5, **neuron}
    shape = {"vocab_size": 20, "hidden_size": C, "head_size": 4, "channel_mix_size": F}
    return make_student(dtype=torch.float64, neuron=both, hidden_neuron=both, **shape, **keys)


@dataclass
class _Seen:
    """What went into and came out of one projection in the steps form."""

    linear: SpikingLinear
    x_NC: Tensor
    y_NO: np.ndarray


@torch.no_grad()
def _watched(student: GooseForCausalLM) -> list[_Seen]:
    seen: list[_Seen] = []

    def keep(module, inputs, output):
        seen.append(_Seen(module, inputs[0].flatten(0, -2), output.flatten(0, -2).numpy()))

    linears = [linear for _, _, linear in projections(student)]
    hooks = [linear.register_forward_hook(keep) for linear in linears]
    for linear in linears:
        linear.form = "steps"
    student.model(_Batch.input_ids)
    for linear, hook in zip(linears, hooks, strict=True):
        linear.form = "rate"
        hook.remove()
    assert [one.linear for one in seen] == linears
    return seen


@torch.no_grad()
def _operands(seen: _Seen) -> np.ndarray:
    """[T, N, C] of whole numbers: the spikes of each micro-step, or of a quantised neuron its counts as one step."""
    neuron = seen.linear.neuron
    if neuron.kind == "quantised":
        return (neuron(seen.x_NC)[0] * neuron.steps).round().to(torch.int64).numpy()[None]
    return neuron.spikes(seen.x_NC)[0].to(torch.int64).numpy()


@torch.no_grad()
def _one_by_one(seen: _Seen, unrolled: bool) -> Counter:
    """Does the product of each token with plain numbers, counts, and checks the result."""
    neuron, done = seen.linear.neuron, Counter()
    weight_OC = seen.linear.weight.numpy()
    if neuron.kind == "dense":
        for x_C, y_O in zip(seen.x_NC.numpy(), seen.y_NO, strict=True):
            for o, y in enumerate(y_O):
                total = 0.0
                for c, x in enumerate(x_C):
                    total += x * weight_OC[o, c]
                    done["macs"] += 1
                assert total == pytest.approx(y, rel=1e-9, abs=1e-12)
        return done
    operands_TNC = _operands(seen)
    theta_C = np.broadcast_to(neuron.threshold.numpy(), weight_OC.shape[1:])
    radix = neuron.kind == "radix"
    base = neuron.settings["base"]
    levels = sum(base**t for t in range(neuron.steps)) if radix else neuron.steps
    weight_OC = weight_OC * theta_C / levels  # made once: 1 / levels and theta are part of the matrix
    scale_N = np.ones(len(seen.x_NC))
    if neuron.settings["scale"] == "token":
        scale_N = np.abs(seen.x_NC.numpy()).mean(-1)
    counts_NC = operands_TNC.sum(0)
    if radix:
        counts_NC = np.tensordot(base ** np.arange(neuron.steps)[::-1], operands_TNC, 1)
    for n, scale in enumerate(scale_N):
        y_O = [0.0] * len(weight_OC)
        for c, k in enumerate(counts_NC[n]) if not unrolled else []:
            for o in range(len(y_O)) if k else []:
                y_O[o] += int(k) * weight_OC[o, c]
                done["macs"] += 1
        for t, spikes_NC in enumerate(operands_TNC if unrolled else []):
            for o in range(len(y_O)) if radix and t else []:
                so_far = y_O[o]
                for _ in range(base - 1):
                    y_O[o] += so_far
                    done["shifts"] += 1
            for c, k in enumerate(spikes_NC[n]):
                for o in range(len(y_O)):
                    for _ in range(abs(int(k))):
                        y_O[o] += weight_OC[o, c] if k > 0 else -weight_OC[o, c]
                        done["additions"] += 1
        for o in range(len(y_O)) if neuron.settings["scale"] == "token" else []:
            y_O[o] *= scale
            done["gains"] += 1
        np.testing.assert_allclose(y_O, seen.y_NO[n], rtol=1e-9, atol=1e-12)
    return done


@torch.no_grad()
def _membranes(neuron: Neuron, x_NC: Tensor) -> Counter:
    """Runs every membrane with plain numbers, counts, and checks the spikes; a gain of its own is the threshold."""
    settings, done = neuron.settings, Counter()
    spikes_TNC = neuron.spikes(x_NC)[0].numpy()
    theta_C = np.broadcast_to(neuron.threshold.numpy(), x_NC.shape[1:])
    leak, leaks = float(neuron.decay), settings["decay"] < 1.0
    for n, x_C in enumerate(x_NC.tolist()):
        scale = 1.0
        if settings["scale"] == "token":
            total = 0.0
            for x in x_C:
                total += abs(x)
                done["additions"] += 1
            scale = total / len(x_C)
        for c, x in enumerate(x_C):
            theta, v = float(theta_C[c]), 0.0
            if settings["scale"] == "token":
                x = x / scale
                done["multiplications"] += 1
            if neuron.kind == "radix":
                base = settings["base"]
                weights = [base**t for t in reversed(range(neuron.steps))]
                unit = theta / sum(weights)
                v = abs(x)
                if settings["offset"]:
                    v += settings["offset"] * unit
                    done["additions"] += 1
                for t, weight in enumerate(weights):
                    fires = v >= unit * weight if base == 2 else abs(v) >= unit * weight / 2
                    done["additions"] += 1
                    assert spikes_TNC[t, n, c] == (np.sign(x) * np.sign(v) if fires else 0.0)
                    if fires:
                        v -= np.sign(v) * unit * weight
                        done["additions"] += 1
                continue
            if settings["offset"]:
                x += np.sign(x) * settings["offset"] * theta / neuron.steps
                done["additions"] += 1
            for t in range(neuron.steps):
                if leaks:
                    v *= leak
                    done["multiplications"] += 1
                v += x
                fires = (v if neuron.kind == "binary" else abs(v)) >= theta
                done["additions"] += 2
                assert spikes_TNC[t, n, c] == (np.sign(v) if fires else 0.0)
                if fires and settings["reset"] == "soft":
                    v -= np.sign(v) * theta
                    done["additions"] += 1
                elif fires:
                    v = 0.0
    return done


def _measured(student: GooseForCausalLM) -> list[SiteFiring]:
    return measure_firing(student, student.model, [_Batch()])


@pytest.mark.parametrize(
    ("neuron", "keys"),
    [(neuron, {}) for neuron in FORMS.values()]
    + [({}, {"channel_mix": "gated"}), ({"kind": "binary"}, {"channel_mix": "gated", "time_mix": "converted"})],
    ids=[*FORMS, "gated", "converted"],
)
def test_the_matrices_operations_are_those_of_the_loops_to_the_last(make_student, neuron, keys):
    student = _student(make_student, neuron, **keys)
    sites, seen = _measured(student), _watched(student)
    dense = neuron.get("kind") == "dense"
    unrolled, multiplied, gains = Counter(), Counter(), 0
    for site, one in zip(sites, seen, strict=True):
        by_spike, by_count = _one_by_one(one, unrolled=True), _one_by_one(one, unrolled=False)
        assert site.tokens == TOKENS and site.additions == by_spike["additions"]
        assert site.active * site.outputs == (0 if dense else by_count["macs"])
        shifts = (site.steps - 1) * site.outputs * TOKENS if neuron.get("kind") == "radix" else 0
        assert by_spike["shifts"] == shifts * (neuron.get("base", 2) - 1)
        assert by_spike["gains"] == (site.gain_varies * site.outputs * TOKENS)
        unrolled, multiplied, gains = unrolled + by_spike, multiplied + by_count, gains + by_spike["gains"]
    operations = student_operations(student, sites)
    mixer = operations["mixer_matrices"]
    # One division of whole numbers each: equal, not close.
    assert mixer.spike_additions == unrolled["additions"] / TOKENS
    assert mixer.active_macs == (0 if dense else multiplied["macs"] / TOKENS)
    assert mixer.macs - mixer.spike_macs == unrolled["macs"] / TOKENS
    assert mixer.operations == (unrolled["additions"] + unrolled["macs"]) / TOKENS
    assert (unrolled["additions"] == 0) == dense
    divisions = TOKENS * sum(site.channels for site in sites if site.gain_varies)
    if not (dense or neuron.get("decay")):
        assert operations["neurons"].multiplications * TOKENS == gains + divisions


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("dense", "whole numbers")])
def test_the_membranes_operations_are_those_of_the_loops_to_the_last(make_student, name):
    student = _student(make_student, FORMS[name])
    for site, one in zip(_measured(student), _watched(student), strict=True):
        done, counted = _membranes(one.linear.neuron, one.x_NC), neuron_operations(one.linear, site)
        gains = site.outputs * TOKENS if site.gain_varies else 0
        if one.linear.neuron.kind == "radix":
            shifts = (one.linear.neuron.base - 1) * (site.steps - 1)  # checked with the products
            done["additions"] += shifts * site.outputs * TOKENS
        assert done["additions"] == pytest.approx(counted.additions * TOKENS, rel=1e-12)
        assert done["multiplications"] + gains == counted.multiplications * TOKENS


# SpikingJelly's counter


@torch.no_grad()
def _theirs(student: GooseForCausalLM) -> tuple[list[int], list[int]]:
    """(spike-driven additions, multiply-accumulates) of each projection by SpikingJelly, in the steps form."""
    additions, macs = SynOpCounter(), MACCounter()
    paths = {id(module): path for path, module in student.model.named_modules()}
    linears = [linear for _, _, linear in projections(student)]
    for linear in linears:
        linear.form = "steps"
    with DispatchCounterMode([additions, macs]):
        student.model(_Batch.input_ids)

    def of_projections(counter) -> list[int]:
        return [sum(counter.get_counts()[f"GooseModel.{paths[id(linear)]}"].values()) for linear in linears]

    for linear in linears:
        linear.form = "rate"
    return of_projections(additions), of_projections(macs)


def test_spikingjelly_counts_binary_spikes_as_we_do(make_student):
    student = _student(make_student, {"kind": "binary"})
    additions, macs = _theirs(student)
    assert additions == [site.additions for site in _measured(student)]
    assert sum(additions) > 0 and set(macs) == {0}


def test_spikingjelly_takes_ternary_spikes_for_dense_operands(make_student):
    """Its operand is a spike if the whole tensor lies in {0, 1}: one -1 makes all its products multiply-accumulates."""
    student = _student(make_student, {})
    sites = _measured(student)
    signed = [bool((_operands(one) < 0).any()) for one in _watched(student)]
    # Behind relu^2 no spike is negative, and there the two agree.
    assert signed == [site.site != "channel_value" for site in sites]
    additions, macs = _theirs(student)
    assert additions == [0 if negative else site.additions for site, negative in zip(sites, signed, strict=True)]
    # At every micro-step as many as a dense operand asks for: T times what one product of the mean would.
    dense = [T * TOKENS * site.channels * site.outputs for site in sites]
    assert macs == [count if negative else 0 for count, negative in zip(dense, signed, strict=True)]


@pytest.mark.parametrize("name", ["ternary", "three micro-steps", "leaky"])
def test_its_two_halves_of_ternary_spikes_are_our_additions(make_student, name):
    """s = [s > 0] - [s < 0], and of either half, which is binary, it counts the additions."""
    student = _student(make_student, FORMS[name])
    for site, one in zip(_measured(student), _watched(student), strict=True):
        plain = nn.Linear(site.channels, site.outputs, bias=False, dtype=torch.float64)
        spikes = torch.from_numpy(_operands(one)).double()
        counter = SynOpCounter()
        with torch.no_grad(), DispatchCounterMode([counter]):
            plain((spikes > 0).double())
            plain((spikes < 0).double())
        assert counter.get_total() == site.additions
