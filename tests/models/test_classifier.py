"""The classifier against its blocks run one direction at a time, and against padding.

Shapes: B texts, L tokens, C channels, V classes.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from asnn_goose.losses.classification import self_distillation
from asnn_goose.models import GooseClassifierConfig, GooseForSequenceClassification
from asnn_goose.models.spiking import Neuron

READINGS = ("bidirectional", "last")
LABELS = {0: "earn", 1: "ship", 2: "grain"}
SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "head_size": 16,
    "id2label": LABELS,
    "label2id": {name: index for index, name in LABELS.items()},
}


def make_classifier(dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """A classifier of three layers of which no part is at its start, in eval mode: keywords are the configuration's."""
    torch.manual_seed(0)
    model = GooseForSequenceClassification(GooseClassifierConfig(**{**SHAPE, **keys}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.nn.Module.to(model, dtype)
    return model.eval()


def _ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def _ragged(lengths: list[int], before: int, after: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """(texts, input_ids, mask): each text behind ``before`` padded places, and followed by ``after`` or more."""
    texts = [_ids(length, seed=length) for length in lengths]
    longest = max(lengths) + after
    rows = [F.pad(text, (before, longest - len(text)), value=17) for text in texts]
    masks = [F.pad(torch.ones_like(text), (before, longest - len(text))) for text in texts]
    return texts, torch.stack(rows), torch.stack(masks)


# What is computed


@torch.no_grad()
def _one_way(model: GooseForSequenceClassification, h_LC: Tensor, layer: int, v_first: Tensor | None):
    out_BLC, _, v_first = model.model.blocks[layer](h_LC[None], None, None, v_first)
    return out_BLC[0], v_first


@torch.no_grad()
def test_both_readings_are_those_of_the_blocks_alone():
    model, ids_L = make_classifier(dtype=torch.float64), _ids(11)
    h_LC = model.model.embedding_norm(model.model.embeddings(ids_L))
    v_forward = v_backward = None
    hidden = [h_LC]
    for layer in range(3):
        forward_LC, v_forward = _one_way(model, h_LC, layer, v_forward)
        backward_LC, v_backward = _one_way(model, torch.flip(h_LC, (0,)), layer, v_backward)
        share_C = model.both_ways[layer].forward_share_C
        h_LC = share_C * forward_LC + (1.0 - share_C) * torch.flip(backward_LC, (0,))
        hidden.append(h_LC)
    expected_V = model.classifiers[-1](model.model.norm(h_LC).mean(0))
    output = model(ids_L[None], output_hidden_states=True)
    torch.testing.assert_close(output.logits[0], expected_V, rtol=0, atol=1e-10)
    for found_BLC, expected_LC in zip(output.hidden_states, hidden, strict=True):
        torch.testing.assert_close(found_BLC[0], expected_LC, rtol=0, atol=1e-10)
    assert len(output.hidden_states) == 4


@torch.no_grad()
def test_the_last_reading_is_a_language_models_last_state():
    model, ids_BL = make_classifier(dtype=torch.float64, reading="last"), _ids(3, 11)
    backbone = model.model(ids_BL, output_hidden_states=True)
    output = model(ids_BL, output_hidden_states=True)
    expected_BV = model.classifiers[-1](backbone.last_hidden_state[:, -1])
    torch.testing.assert_close(output.logits, expected_BV, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, backbone.hidden_states, strict=True))


@pytest.mark.parametrize("reading", READINGS)
@torch.no_grad()
def test_which_tokens_a_state_has_seen(reading):
    model, ids_BL = make_classifier(dtype=torch.float64, reading=reading), _ids(1, 12)
    before = model(ids_BL, output_hidden_states=True).hidden_states[-1]
    changed = ids_BL.clone()
    changed[0, 6] += 1
    after = model(changed, output_hidden_states=True).hidden_states[-1]
    moved_L = ~torch.isclose(before, after, rtol=0, atol=1e-12).all(-1)[0]
    assert moved_L.tolist() == ([True] * 12 if reading == "bidirectional" else [False] * 6 + [True] * 6)


@torch.no_grad()
def test_a_reversed_text_is_another_text_unless_all_channels_share_alike():
    model, ids_BL = make_classifier(dtype=torch.float64), _ids(2, 12)
    assert not torch.isclose(model(ids_BL).logits, model(ids_BL.flip(1)).logits, atol=1e-3).any()
    for mixed in model.both_ways:
        mixed.forward_share_C.fill_(0.5)
    torch.testing.assert_close(model(ids_BL).logits, model(ids_BL.flip(1)).logits, rtol=0, atol=1e-10)


# Padding and batches


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 5), (4, 0), (3, 2)], ids=["right", "more", "left", "both"])
@torch.no_grad()
def test_padding_changes_nothing(reading, before, after):
    model = make_classifier(dtype=torch.float64, reading=reading, exits=[2], norm="layer")
    texts, ids_BL, mask_BL = _ragged([9, 5, 7, 1], before, after)
    labels_B = torch.tensor([0, 2, 1, 1])
    padded = model(ids_BL, mask_BL, labels_B, output_hidden_states=True)
    alone = [
        model(text[None], labels=label[None], output_hidden_states=True)
        for text, label in zip(texts, labels_B, strict=True)
    ]
    for name in ("logits", "exit_logits", "pooled"):
        expected = torch.cat([getattr(one, name) for one in alone])
        # Rows of one product may sum in another order; float64.
        torch.testing.assert_close(getattr(padded, name), expected, rtol=0, atol=1e-9)
    # The loss is float32.
    assert padded.loss.item() == pytest.approx(sum(one.loss.item() for one in alone) / 4, abs=1e-6)
    for layer, hidden_BLC in enumerate(padded.hidden_states):
        for row, one in enumerate(alone):
            text_LC = hidden_BLC[row][mask_BL[row].bool()]
            torch.testing.assert_close(text_LC, one.hidden_states[layer][0], rtol=0, atol=1e-9)
    # It does matter that the padding is masked.
    assert not torch.allclose(model(ids_BL).logits, padded.logits, atol=1e-3)


@pytest.mark.parametrize("reading", READINGS)
@torch.no_grad()
def test_padded_and_unpadded_batches_agree_to_float32_rounding(reading):
    """Given equal spikes: a current within a rounding of a threshold could flip one, and here none does."""
    model, ids_BL = make_classifier(reading=reading), _ids(6, 10)
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Neuron):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    plain, fired = model(ids_BL), list(seen)
    seen.clear()
    padded = model(F.pad(ids_BL, (0, 7), value=17), F.pad(torch.ones_like(ids_BL), (0, 7)))
    for padded_BLC, plain_BLC in zip(seen, fired, strict=True):
        # What is read backwards stands in the second half of the batch, its padding first.
        text_BLC = torch.cat([padded_BLC[:6, :10], padded_BLC[6:, 7:]])
        assert torch.equal(text_BLC, plain_BLC) and plain_BLC.any()
    # Sums of at most 128 products of numbers around 1, in another order.
    torch.testing.assert_close(padded.logits, plain.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.pooled, plain.pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reading", READINGS)
@torch.no_grad()
def test_nothing_leaks_between_batches_or_within_one(reading):
    model = make_classifier(dtype=torch.float64, reading=reading)
    _, ids_BL, mask_BL = _ragged([9, 5, 7, 2], 0, 0)
    labels_B = torch.tensor([0, 2, 1, 1])
    first = model(ids_BL, mask_BL, labels_B)
    model(_ids(4, 30, seed=1))
    assert torch.equal(model(ids_BL, mask_BL, labels_B).loss, first.loss)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(ids_BL[order], mask_BL[order], labels_B[order])
    torch.testing.assert_close(shuffled.logits, first.logits[order], rtol=0, atol=1e-12)
    assert shuffled.loss.item() == pytest.approx(first.loss.item(), abs=1e-6)


# Exits


@pytest.mark.parametrize("reading", READINGS)
@torch.no_grad()
def test_each_exit_classifies_its_blocks_states(reading):
    model = make_classifier(dtype=torch.float64, reading=reading, exits=[1, 2])
    _, ids_BL, mask_BL = _ragged([9, 5, 7], 0, 0)
    output = model(ids_BL, mask_BL, output_hidden_states=True)
    assert output.exit_logits.shape == (3, 2, 3) and output.pooled.shape == (3, 3, 32)
    for place, layer in enumerate((1, 2)):
        for row, length in enumerate((9, 5, 7)):
            states_LC = model.exit_norms[place](output.hidden_states[layer][row, :length])
            pooled_C = states_LC.mean(0) if reading == "bidirectional" else states_LC[-1]
            torch.testing.assert_close(output.pooled[row, place], pooled_C, rtol=0, atol=1e-12)
            found_V = output.exit_logits[row, place]
            torch.testing.assert_close(found_V, model.classifiers[place](pooled_C), rtol=0, atol=1e-12)
    assert make_classifier()(ids_BL).exit_logits is None


@pytest.mark.parametrize("reading", READINGS)
@torch.no_grad()
def test_a_text_leaves_at_the_first_exit_that_is_sure_of_it(reading):
    model = make_classifier(dtype=torch.float64, reading=reading, exits=[1, 2])
    _, ids_BL, mask_BL = _ragged([9, 5, 7, 11, 3, 8, 6, 4], 0, 0)
    output = model(ids_BL, mask_BL)
    every_BIV = torch.cat([output.exit_logits, output.logits[:, None]], 1)
    # Between two of them, so that no rounding decides.
    confidence = every_BIV.softmax(-1).amax(-1).flatten().sort().values[11:13].mean().item()
    rows = []
    for block in model.model.blocks:
        block.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    found = model.early_exit(ids_BL, mask_BL, confidence)
    expected_depth = []
    for text in range(8):
        sure = [i for i in range(3) if every_BIV[text, i].softmax(-1).max() >= confidence or i == 2]
        expected_depth.append(sure[0] + 1)
        torch.testing.assert_close(found.logits_BV[text], every_BIV[text, sure[0]], rtol=0, atol=1e-9)
    assert found.depth_B.tolist() == expected_depth and len(set(expected_depth)) > 1
    assert found.mean_depth == pytest.approx(sum(expected_depth) / 8)
    ways = 2 if reading == "bidirectional" else 1
    assert rows == [ways * sum(depth > layer for depth in expected_depth) for layer in range(max(expected_depth))]


@torch.no_grad()
def test_early_exit_at_both_ends():
    model, ids_BL = make_classifier(dtype=torch.float64, exits=[2]), _ids(4, 9)
    output = model(ids_BL)
    nobody, everybody = model.early_exit(ids_BL, confidence=1.1), model.early_exit(ids_BL, confidence=0.0)
    torch.testing.assert_close(nobody.logits_BV, output.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(everybody.logits_BV, output.exit_logits[:, 0], rtol=0, atol=1e-12)
    assert (nobody.mean_depth, everybody.mean_depth) == (3.0, 2.0)


def test_a_text_without_a_label_is_left_out_of_the_loss():
    model, ids_BL = make_classifier(), _ids(3, 12)
    wanted = model(ids_BL[:2], labels=torch.tensor([0, 2])).loss
    found = model(ids_BL, labels=torch.tensor([0, 2, -100])).loss
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)  # float32, in batches of 2 and 3
    nothing = model(ids_BL, labels=torch.full((3,), -100)).loss
    nothing.backward()
    assert nothing.item() == 0.0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("reading", READINGS)
def test_every_parameter_has_a_gradient(reading):
    model = make_classifier(reading=reading, exits=[1], norm="layer").train()
    labels_B = torch.tensor([0, 2, 1])
    output = model(_ids(3, 12), labels=labels_B)
    shallow = self_distillation(
        output.exit_logits, output.pooled[:, :-1], output.logits, output.pooled[:, -1], labels_B
    )
    (output.loss + shallow).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
