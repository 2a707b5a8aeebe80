"""measure_information on tiny models beside matrices gathered one window at a time by other means.

Shapes: B windows, L positions, N measured tokens, C channels, E teacher channels, V vocabulary.
"""

from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from asnn_goose.evaluation.firing import SITES, projections
from asnn_goose.evaluation.information import Information, measure_information
from asnn_goose.evaluation.probes import Split, controlled_cka, probe_classes, probe_states
from asnn_goose.losses import linear_cka
from asnn_goose.models import GooseForCausalLM, Teacher

LENGTHS = (12, 9, 12, 12, 5, 12, 7, 12, 2, 12, 12, 12)
"""Tokens of the windows; the others of 12 are padding."""


@dataclass
class _Windows:
    input_ids: Tensor
    mask: Tensor


def batches(padding: int = 0, lengths: tuple[int, ...] = LENGTHS, size: int = 5) -> list[_Windows]:
    ids = torch.randint(50, (len(lengths), 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    ids = torch.where(mask, ids, padding)
    return [_Windows(*parts) for parts in zip(ids.split(size), mask.split(size), strict=True)]


def windows(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """The text of each window, [1, length]."""
    ids = torch.cat([batch.input_ids for batch in batches(lengths=lengths)])
    return [row[None, :length] for row, length in zip(ids, lengths, strict=True)]


@torch.no_grad()
def gathered(student: GooseForCausalLM, teacher: Teacher, layer: int, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean spikes [N, C], the teacher's states at that layer [N, E], first choices [N]), a window at a time.

    Spikes by their micro-steps from what goes into the projection, states by transformers' own list, choices by its
    logits.
    """
    linear = next(module for at, name, module in projections(student) if (at, name) == (layer, site))
    inputs: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    states, first = [], []
    for ids in windows():
        student(ids)
        output = teacher.model(ids, output_hidden_states=True)
        states.append(output.hidden_states[layer][0, 1:])
        first.append(output.logits[0, 1:, : teacher.vocab_size].argmax(-1))
    hook.remove()
    spikes = [linear.neuron.spikes(x)[0].mean(0)[0, 1:] for x in inputs]
    return torch.cat(spikes), torch.cat(states), torch.cat(first)


@pytest.fixture
def student(make_student) -> GooseForCausalLM:
    return make_student(hidden_neuron={"kind": "binary"})


@pytest.fixture
def teacher(make_teacher) -> Teacher:
    # Three layers, so that the states of the layer compared are not yet behind the final norm.
    return make_teacher(num_hidden_layers=3)


# Of 12 windows 3 are held out, and of the 9 others the penalty is chosen on 2; each has a token less than its length.
SPLIT = Split(sum(LENGTHS[:7]) - 7, sum(LENGTHS[7:9]) - 2, sum(LENGTHS[9:]) - 3)


@pytest.mark.parametrize("site", ["channel_key", "value", "channel_value"])
def test_every_number_is_that_of_the_matrices_gathered_by_hand(student, teacher, site: str):
    found = measure_information(student, teacher, batches(), sites=(site,), classes=8, seed=5)
    assert [(s.layer, s.site, s.teacher_layer) for s in found.sites] == [(1, site, 2), (2, site, 3)]
    order = SPLIT.permutation(5)
    spikes, _, first = gathered(student, teacher, 1, site)
    _, states, _ = gathered(student, teacher, 2, site)
    assert (found.windows, found.tokens, found.held_out_tokens) == (12, len(first), SPLIT.held_out)
    one = found.sites[0]
    # The forms of the models' passes differ by rounding in float32: batched or not, steps or their mean.
    cka = [linear_cka(spikes.double(), y.double(), debiased=True).item() for y in (states, states[order])]
    assert [one.cka.value, one.cka.shuffled] == pytest.approx(cka, abs=1e-5)
    r2 = probe_states(spikes, states, SPLIT, seed=5)
    assert [one.states_r2.value, one.states_r2.shuffled] == pytest.approx([r2.value, r2.shuffled], abs=1e-4)

    ranks = {token: i for i, (token, _) in enumerate(most_common(first[: SPLIT.fitted], 8))}
    covered = torch.tensor([int(token) in ranks for token in first])
    labels = torch.tensor([ranks[int(token)] for token in first[covered]])
    held_out = covered[SPLIT.fitted :]
    assert found.classes == len(ranks) == 8
    assert found.coverage == pytest.approx(held_out.double().mean().item())
    assert found.majority == pytest.approx((labels[-int(held_out.sum()) :] == 0).double().mean().item())
    accuracy = probe_classes(spikes[covered], labels, 8, SPLIT.kept(covered), seed=5)
    assert one.top1_accuracy == accuracy


def most_common(first: Tensor, k: int) -> list[tuple[int, int]]:
    """(token, count), the smaller token first where counts are equal."""
    return sorted(Counter(first.tolist()).items(), key=lambda item: (-item[1], item[0]))[:k]


def test_binned_bits_are_those_of_histograms(student, teacher):
    found = measure_information(student, teacher, batches()).sites[1]
    spikes, _, _ = gathered(student, teacher, 2, "channel_key")
    states = torch.cat([teacher(ids, (3,)).hidden[3][0, 1:] for ids in windows()])
    order = SPLIT.permutation(0)
    for rows, told in ((np.arange(len(order)), found.binned_bits.value), (order.numpy(), found.binned_bits.shuffled)):
        bits = []
        for d in range(8):
            state, sign = states[rows, d].double().numpy(), np.sign(spikes[:, d].numpy())
            edges = np.linspace(state.min(), state.max(), 33)
            joint = np.histogram2d(sign, state, bins=(np.array([-1.5, -0.5, 0.5, 1.5]), edges))[0] / len(state)
            apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
            bits.append((joint[joint > 0] * np.log2(joint[joint > 0] / apart[joint > 0])).sum())
        # A state at an edge may fall to either side; at 1e-16 of the range none does.
        assert told == pytest.approx(np.mean(bits), abs=1e-9)
    # Few tokens and many bins: the bias is most of the number.
    assert 0.0 < found.binned_bias_bits < 2 * 31 / (2 * len(order) * np.log(2)) + 1e-12


def emptied(student: GooseForCausalLM, teacher: Teacher) -> None:
    """Blocks that add nothing: the teacher's states, and what the student's first neurons see, are the token's."""
    for block in student.model.blocks:
        for path in ("time_mix.output.weight", "channel_mix.value.weight", "channel_mix.mix_C"):
            block.get_parameter(path).detach().zero_()
    for layer in range(1, teacher.num_layers + 1):
        for path in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            teacher.block(layer).get_parameter(path).zero_()


def test_the_token_is_read_from_its_spikes_and_from_no_other_ones(student, teacher):
    """16 tokens in 32 channels: any function of the token is linear in their spikes."""
    emptied(student, teacher)
    text = batches(lengths=(12,) * 40)
    for batch in text:
        batch.input_ids %= 16
    found = measure_information(student, teacher, text)
    for site in found.sites:
        assert site.top1_accuracy.value == 1.0 == found.coverage
        # The least penalty is 1e-6 of the mean eigenvalue: a direction of a thirtieth of it loses (3e-5)^2.
        assert site.states_r2.value == pytest.approx(1.0, abs=1e-9)
        # By chance, over 330 fitted and 110 held-out tokens: binomial; 15 directions with a spread of
        # 2 sqrt(1 / 330 / 110) = 0.010; sqrt(2) / 440. Five standard deviations each.
        assert site.top1_accuracy.shuffled < found.majority + 5 * np.sqrt(found.majority / 110)
        assert -15 / (330 - 16) - 0.05 < site.states_r2.shuffled < 0.05
        assert site.cka.value > 0.3 > 5 * np.sqrt(2) / 440 > abs(site.cka.shuffled)
        assert site.binned_bits.value > site.binned_bits.shuffled + 0.05

    for _, site, linear in projections(student):
        if site == "channel_key":
            linear.neuron.log_threshold.detach().fill_(9.0)
    for site in measure_information(student, teacher, text).sites:
        assert site.top1_accuracy.value == found.majority
        # The fitted tokens' mean instead of the held-out ones' costs 1 / 330 + 1 / 110 of the variance on average.
        assert -0.05 < site.states_r2.value <= 0.0
        assert (site.cka.value, site.cka.shuffled) == (0.0, 0.0)
        assert site.binned_bits.value == pytest.approx(0.0, abs=1e-12) and site.binned_bias_bits == 0.0


def test_padding_and_whole_batches_do_not_count(student, teacher):
    found = measure_information(student, teacher, batches())
    assert measure_information(student, teacher, batches(padding=17)) == found
    # Products of other shapes round otherwise.
    close(measure_information(student, teacher, batches(size=1)), found)


def close(found: Information, expected: Information) -> None:
    assert replace(found, sites=()) == replace(expected, sites=())
    for one, other in zip(found.sites, expected.sites, strict=True):
        for field in fields(one):
            ours, theirs = (getattr(site, field.name) for site in (one, other))
            pairs = (vars(ours), vars(theirs)) if hasattr(ours, "shuffled") else (ours, theirs)
            assert pairs[0] == pytest.approx(pairs[1], abs=1e-4), field.name


@pytest.mark.parametrize(("tokens", "windows_read"), [(10**6, 12), (119, 12), (118, 11), (62, 6), (61, 5), (50, 5)])
def test_the_budget_takes_whole_windows_in_their_order(student, teacher, tokens: int, windows_read: int):
    read: list[int] = []

    def states(ids: Tensor) -> Tensor:
        read.extend(len(row) for row in ids)
        return student.model(ids).last_hidden_state

    found = measure_information(student, teacher, batches(), states=states, tokens=tokens)
    assert sum(LENGTHS) == 119 and sum(LENGTHS[:6]) == 62
    assert found.windows == len(read) == windows_read
    assert found.tokens == sum(LENGTHS[:windows_read]) - windows_read


def test_a_later_shorter_window_is_not_taken_in_the_place_of_one_that_does_not_fit(student, teacher):
    lengths = (12, 12, 12, 12, 12, 12, 3, 3)
    assert measure_information(student, teacher, batches(lengths=lengths), tokens=63).windows == 5


def test_all_sites_come_in_the_order_of_the_projections_and_alone_give_the_same(student, teacher):
    names = tuple(SITES.values())
    found = measure_information(student, teacher, batches(), sites=names)
    assert [(site.layer, site.site) for site in found.sites] == [(layer, name) for layer in (1, 2) for name in names]
    alone = measure_information(student, teacher, batches(), sites=("output",))
    assert alone.sites == tuple(site for site in found.sites if site.site == "output")


@pytest.mark.parametrize("blocks", [(2,), (1,)])
def test_blocks_chosen_alone_give_the_same(student, teacher, blocks: tuple[int, ...]):
    found = measure_information(student, teacher, batches())
    alone = measure_information(student, teacher, batches(), blocks=blocks)
    assert alone == replace(found, sites=tuple(site for site in found.sites if site.layer in blocks))
    assert len(alone.sites) == 1


def test_measuring_leaves_the_models_as_they_were(student, teacher):
    ids = batches()[0].input_ids
    with torch.no_grad():
        before = student(ids).logits
    first = measure_information(student, teacher, batches())
    assert measure_information(student, teacher, batches()) == first
    with pytest.raises(ZeroDivisionError):
        measure_information(student, teacher, batches(), states=lambda ids: ids[1 // 0])
    with torch.no_grad():
        assert torch.equal(student(ids).logits, before)
    hooked = [module for model in (student, teacher.model) for module in model.modules() if module._forward_hooks]
    assert hooked == []


def test_a_dense_twin_is_measured_by_its_currents(make_student, teacher):
    student = make_student(neuron={"kind": "dense"})
    linear = next(module for layer, site, module in projections(student) if (layer, site) == (1, "channel_key"))
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    found = measure_information(student, teacher, batches()).sites[0]
    hook.remove()
    keep = [batch.mask & (torch.arange(12) > 0) for batch in batches()]
    x = torch.cat([x[k] for x, k in zip(seen, keep, strict=True)])
    states = torch.cat([teacher(b.input_ids, (2,)).hidden[2][k] for b, k in zip(batches(), keep, strict=True)])
    assert found.cka == controlled_cka(x, states, SPLIT.permutation(0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokens": 40}, "at least 4 windows, not 3"),
        ({"tokens": 0}, "at least 4 windows, not 0"),
        ({"sites": ("channel_key", "gate")}, "has no site 'gate': choose from .*channel_key, channel_value"),
        ({"blocks": (1, 3)}, "has no block 3: choose from 1 to 2"),
        ({"strategy": "pkd_last"}, "strategy 'pkd_last' does not map every block of the student: use uniform"),
        ({"strategy": "tinybert"}, "needs 3 teacher layers to be divisible by 2"),
    ],
)
def test_bad_input_is_told_in_one_sentence(student, teacher, keys: dict, message: str):
    with pytest.raises(ValueError, match=message):
        measure_information(student, teacher, batches(), **keys)


def test_the_steps_form_is_not_read(student, teacher):
    next(linear for _, site, linear in projections(student) if site == "key").form = "steps"
    assert measure_information(student, teacher, batches()).sites
    with pytest.raises(ValueError, match="rate form"):
        measure_information(student, teacher, batches(), sites=("key",))
