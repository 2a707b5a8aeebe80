"""The terms of a classifier's objective against their closed forms.

Shapes: B texts, L tokens, C student channels, E teacher channels, V classes.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from asnn_goose.config.classifier import ClassLosses, ExitLosses
from asnn_goose.errors import UserError
from asnn_goose.models.classification import GooseClassifierConfig, GooseForSequenceClassification
from asnn_goose.train.classifier_objective import ClassifierDistillation, Taught

IDS_BL = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
MASK_BL = torch.arange(6) < torch.tensor([[6], [4], [2]])
LABELS_B = torch.tensor([0, 2, 1])
ONLY = {"ce": 0.0, "kl": 0.0, "features": 0.0, "embeddings": 0.0}


def _student(**keys: Any) -> GooseForSequenceClassification:
    torch.manual_seed(0)
    neuron = {"kind": "ternary", "steps": 2}
    config = GooseClassifierConfig(
        vocab_size=20, embedding_size=16, hidden_size=16, num_hidden_layers=3, head_size=8, neuron=neuron,
        hidden_neuron=neuron, wkv_backend="reference", id2label=dict(enumerate("abc")), label2id={}, **keys,
    )  # fmt: skip
    return GooseForSequenceClassification(config)


def _moved(**keys: Any) -> GooseForSequenceClassification:
    """Away from its start, where a block adds nothing and all hidden states are one."""
    student = _student(**keys)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student


def _objective(student: GooseForSequenceClassification, **weights: float) -> ClassifierDistillation:
    table = torch.randn(20, 16, generator=torch.Generator().manual_seed(1)) if weights.get("embeddings") else None
    return ClassifierDistillation(student, ClassLosses(**(ONLY | weights)), ExitLosses(), 6, 24, table)


def _taught() -> Taught:
    draw = torch.Generator().manual_seed(2)
    states = {layer: torch.randn(3, 6, 24, generator=draw) for layer in range(1, 7)}
    return Taught(torch.randn(3, 3, generator=draw), states)


def _logs(logits: torch.Tensor | None, temperature: float) -> np.ndarray:
    assert logits is not None
    return log_softmax(logits.detach().double().numpy() / temperature, axis=-1)


def test_what_has_no_weight_is_not_computed():
    objective = _objective(_student(), ce=1.0)
    assert set(objective(IDS_BL, MASK_BL, LABELS_B, Taught())) == {"ce"}
    assert objective.weights() == {"ce": 1.0}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_classes_against_scipy_in_float64(temperature: float):
    student, taught = _student(), _taught()
    values = _objective(student, ce=0.1, kl=1.0, temperature=temperature)(IDS_BL, MASK_BL, LABELS_B, taught)
    logits = student(IDS_BL, MASK_BL).logits
    ce = -_logs(logits, 1.0)[np.arange(3), LABELS_B.numpy()].mean()
    p, q = _logs(taught.logits_BV, temperature), _logs(logits, temperature)
    kl = temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()
    # float32 against float64.
    assert values["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert values["kl"].item() == pytest.approx(kl, rel=1e-5)


def test_features_are_a_mean_over_text_and_blocks_and_padding_is_nothing():
    student, taught = _moved(), _taught()
    objective = _objective(student, ce=1.0, features=0.1)
    assert objective.layers == [2, 4, 6]
    value = objective(IDS_BL, MASK_BL, LABELS_B, taught)["features"].item()
    hidden = student(IDS_BL, MASK_BL, output_hidden_states=True).hidden_states
    assert not any(torch.equal(below, above) for below, above in itertools.pairwise(hidden))
    assert taught.states is not None
    errors = [
        ((projector(hidden[block + 1]) - taught.states[layer])[MASK_BL].double() ** 2).mean().item()
        for block, (projector, layer) in enumerate(zip(objective.projectors, objective.layers, strict=True))
    ]
    assert value == pytest.approx(np.mean(errors), rel=1e-5)
    filled = {layer: torch.where(MASK_BL[..., None], x, 1e4) for layer, x in taught.states.items()}
    again = objective(IDS_BL, MASK_BL, LABELS_B, Taught(taught.logits_BV, filled))["features"].item()
    assert again == value


def test_tables_of_embeddings_are_compared_element_by_element():
    student = _student()
    objective = _objective(student, ce=1.0, embeddings=0.1)
    assert objective.table_NE is not None
    value = objective(IDS_BL, MASK_BL, LABELS_B, Taught())["embeddings"].item()
    ours = student.model.embeddings.weight.detach().double()
    assert value == pytest.approx(((ours - objective.table_NE.double()) ** 2).mean().item(), rel=1e-5)
    assert not any("table" in name for name in objective.state_dict())


def test_exits_move_shallow_classifiers_and_leave_the_deepest_alone():
    student = _student(exits=(1, 2))
    objective = _objective(student, ce=1.0)
    objective(IDS_BL, MASK_BL, LABELS_B, Taught())["exits"].backward()
    *shallow, deepest = student.classifiers
    assert all(classifier.get_parameter("weight").grad is not None for classifier in shallow)
    gradient = deepest.get_parameter("weight").grad
    assert gradient is None or not gradient.any()


def test_exits_weigh_labels_classes_and_states_as_configured():
    student = _moved(exits=(1, 2))
    weights = ExitLosses(ce=0.3, kl=0.5, hint=0.7, temperature=2.0)
    objective = ClassifierDistillation(student, ClassLosses(**ONLY | {"ce": 1.0}), weights, 6, 24)
    value = objective(IDS_BL, MASK_BL, LABELS_B, Taught())["exits"].item()
    output = student(IDS_BL, MASK_BL)
    pooled_BIC, p = output.pooled.detach().double().numpy(), _logs(output.logits, 2.0)
    expected = 0.0
    for i in range(2):
        logits = output.exit_logits[:, i]
        q = _logs(logits, 2.0)
        expected += -0.3 * _logs(logits, 1.0)[np.arange(3), LABELS_B.numpy()].mean()
        expected += 0.5 * 4.0 * (np.exp(p) * (p - q)).sum(-1).mean()
        expected += 0.7 * ((pooled_BIC[:, i] - pooled_BIC[:, 2]) ** 2).mean()
    # float32 against float64.
    assert value == pytest.approx(expected, rel=1e-5)


def test_another_number_of_classes_is_refused():
    objective = _objective(_student(), kl=1.0)
    with pytest.raises(UserError, match=r"3.*5|5.*3"):
        objective(IDS_BL, MASK_BL, LABELS_B, Taught(torch.randn(3, 5)))
