"""Losses of a classifier against numpy float64 and values worked out by hand.

Shapes: B texts, V classes, C channels, I exits.
"""

import math

import numpy as np
import pytest
import torch
from softmax_oracle import EXACT, STUDENT, TEACHER, float64, kl, softmax

from asnn_goose.errors import UserError
from asnn_goose.losses.classification import classification_kd, self_distillation


def _drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_printed_values():
    # CE: log(e^0.5 + e^1 + e^-0.5) - 1 for label 1; T^2 KL at T = 2 is 0.2304818042039267.
    ce = math.log(math.exp(0.5) + math.exp(1.0) + math.exp(-0.5)) - 1.0
    s, t = float64([STUDENT]), float64([TEACHER])
    found = classification_kd(s, t, torch.tensor([1]), w_ce=0.3, w_kd=0.7, temperature=2.0)
    assert found.item() == pytest.approx(0.3 * ce + 0.7 * 0.2304818042039267, rel=EXACT)


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_it_is_a_mean_over_texts_of_a_weighted_sum(T):
    s, t, labels = _drawn(5, 4), _drawn(5, 4, seed=1), torch.tensor([0, 3, 1, 1, 2])
    ce = -np.log(softmax(s.numpy())[np.arange(5), labels.numpy()])
    expected = (0.1 * ce + 1.5 * T**2 * kl(s.numpy(), t.numpy(), T)).mean()
    found = classification_kd(s, t, labels, w_ce=0.1, w_kd=1.5, temperature=T)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_gradients_are_those_of_the_formula_and_the_teacher_has_none():
    s, t, labels = _drawn(3, 4).requires_grad_(), _drawn(3, 4, seed=1).requires_grad_(), torch.tensor([2, 0, 3])
    T, w_ce, w_kd = 2.0, 0.25, 0.5
    classification_kd(s, t, labels, w_ce, w_kd, T).backward()
    p, q, q1 = (torch.softmax(x, -1).detach() for x in (t / T, s / T, s))
    hot = torch.nn.functional.one_hot(labels, 4)
    # d T^2 KL / ds = T (q - p), d CE / ds = q1 - hot, both divided by the number of texts.
    torch.testing.assert_close(s.grad, (w_ce * (q1 - hot) + w_kd * T * (q - p)) / 3, rtol=1e-12, atol=1e-14)
    assert t.grad is None


def test_another_number_of_labels_is_refused_by_name():
    with pytest.raises(UserError, match="the student tells 3 labels apart and the teacher 4") as error:
        classification_kd(_drawn(2, 3), _drawn(2, 4), torch.tensor([0, 1]))
    assert "\n" not in str(error.value)


def test_self_distillation_is_the_sum_of_its_terms():
    exits, final, labels = _drawn(3, 2, 4), _drawn(3, 4, seed=1), torch.tensor([2, 0, 3])
    states, hint = _drawn(3, 2, 6, seed=2), _drawn(3, 6, seed=3)
    found = self_distillation(exits, states, final, hint, labels, w_ce=0.9, w_kd=0.1, w_hint=0.5, temperature=3.0)
    expected = 0.0
    for i in range(2):
        q = exits[:, i].numpy()
        expected += -0.9 * np.log(softmax(q)[np.arange(3), labels.numpy()]).mean()
        expected += 0.1 * 9.0 * kl(q, final.numpy(), 3.0).mean()
        expected += 0.5 * ((states[:, i] - hint) ** 2).numpy().mean()
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_nothing_flows_into_the_deepest_exit():
    inputs = [_drawn(3, 2, 4), _drawn(3, 2, 6, seed=1), _drawn(3, 4, seed=2), _drawn(3, 6, seed=3)]
    exits, states, final, hint = (x.requires_grad_() for x in inputs)
    self_distillation(exits, states, final, hint, torch.tensor([2, 0, 3]), w_hint=1.0).backward()
    assert final.grad is None and hint.grad is None
    assert exits.grad is not None and exits.grad.abs().min() > 0
    assert states.grad is not None and states.grad.abs().min() > 0
