"""Encoders as teachers of a task: what is read, what its states are, and which classes can be set side by side.

Shapes: B texts, L tokens, E channels, V classes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from asnn_goose.errors import UserError
from asnn_goose.models.encoder import load_classifier, load_encoder, new_classifier, require_same_classes
from tests.conftest import bytes_tokenizer

LABELS = ("earn", "ship", "grain")


def save_bert(folder: Path, kind: Any = BertModel, **keys: Any) -> Path:
    """A random BERT of two layers of width 32 over bytes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = bytes_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.model_max_length = 64
    kind(BertConfig(vocab_size=257, max_position_embeddings=64, **shape, **keys)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids_BL = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones(2, 9, dtype=torch.bool)
    mask_BL[1, 5:] = False
    return ids_BL, mask_BL


def test_states_are_those_of_the_layers(tmp_path):
    encoder = load_encoder(str(save_bert(tmp_path)))
    ids_BL, mask_BL = _batch()
    states = encoder.states(ids_BL, mask_BL, (0, 1, 2))
    x_BLE = encoder.model.embeddings(input_ids=ids_BL)
    torch.testing.assert_close(states[0], x_BLE, rtol=0, atol=0)
    alone = encoder.states(ids_BL[1:, :5], mask_BL[1:, :5], (2,))[2]
    # float32: the masked positions are left out of a softmax, in another order of summation.
    torch.testing.assert_close(states[2][1:, :5], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(states[2], encoder.model(ids_BL, mask_BL.long()).last_hidden_state, rtol=0, atol=0)
    assert (encoder.num_layers, encoder.hidden_size) == (2, 32)
    assert torch.equal(encoder.embedding_weight_VE, encoder.model.get_input_embeddings().weight)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    with pytest.raises(UserError, match="has no layer 3: choose 0 to 2"):
        encoder.states(ids_BL, mask_BL, (3,))
    encoder.model.train()
    with pytest.raises(RuntimeError, match="was put in train mode"):
        encoder.states(ids_BL, mask_BL, (1,))


def test_a_body_may_come_without_what_pools_it(tmp_path):
    body = load_encoder(str(save_bert(tmp_path, BertForMaskedLM)))
    assert body.states(*_batch(), (2,))[2].shape == (2, 9, 32)


def test_a_classifier_keeps_its_classes_and_a_body_has_none(tmp_path):
    names = dict(enumerate(LABELS))
    folder = str(save_bert(tmp_path / "taught", BertForSequenceClassification, id2label=names))
    teacher = load_classifier(folder)
    assert teacher.labels == LABELS
    ids_BL, mask_BL = _batch()
    expected = BertForSequenceClassification.from_pretrained(folder).eval()(ids_BL, mask_BL.long()).logits
    torch.testing.assert_close(teacher.logits(ids_BL, mask_BL), expected.detach(), rtol=0, atol=0)
    with pytest.raises(
        UserError, match=r"lacks 2 weights of a BertForSequenceClassification \(first: classifier.bias\)"
    ):
        load_classifier(str(save_bert(tmp_path / "body")))


def test_a_new_head_stands_on_the_saved_body(tmp_path):
    folder = str(save_bert(tmp_path / "body"))
    model: Any
    model, tokenizer, fingerprint = new_classifier(folder, LABELS)
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.label2id["ship"] == 1
    body = load_encoder(folder)
    assert fingerprint == body.fingerprint
    saved = body.model.state_dict()
    assert all(torch.equal(model.state_dict()[f"bert.{name}"], value) for name, value in saved.items())
    # A head for two classes is replaced by one for three.
    taught = str(save_bert(tmp_path / "taught", BertForSequenceClassification))
    other: Any = new_classifier(taught, LABELS)[0]
    assert other.classifier.weight.shape == (3, 32)
    assert tokenizer.pad_token_id == model.config.pad_token_id


def test_a_decoder_gets_a_token_to_pad_with(tmp_path, tiny_teacher):
    tokenizer: Any
    model, tokenizer, _ = new_classifier(str(tiny_teacher), LABELS)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    ids_BL, mask_BL = _batch()
    ids_BL[1, 5:] = tokenizer.pad_token_id
    found = model.eval()(ids_BL, attention_mask=mask_BL.long()).logits
    alone = model(ids_BL[1:, :5]).logits
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=1e-5)  # float32


def test_a_decoders_last_state_is_its_blocks_and_not_its_norms(tiny_teacher):
    encoder = load_encoder(str(tiny_teacher))
    ids_BL, mask_BL = _batch()
    last = encoder.num_layers
    states = encoder.states(ids_BL, mask_BL, (last - 1, last))
    normed = encoder.model(ids_BL, mask_BL.long()).last_hidden_state
    torch.testing.assert_close(encoder.model.norm(states[last]), normed, rtol=0, atol=0)
    assert not torch.allclose(states[last], normed)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("smollm2", "'smollm2' is SmolLM2.*which does not classify: use minilm, a folder"),
        ("minilmm", "is neither an asset nor a folder: did you mean 'minilm'"),
        ("./no-such-folder", "is a folder that does not exist"),
    ],
)
def test_what_is_no_encoder_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_encoder(name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no model that reads whole texts can be read from teacher\.name") as error:
        load_encoder(str(tmp_path))
    assert "\n" not in str(error.value)


def test_only_the_number_of_labels_must_match_unless_names_contradict():
    require_same_classes(LABELS, LABELS)
    require_same_classes(LABELS, ("LABEL_0", "LABEL_1", "LABEL_2"))
    with pytest.raises(
        UserError, match=r"student tells 3 labels apart \(earn, ship, grain\) and the teacher 2 \(a, b\)"
    ):
        require_same_classes(LABELS, ("a", "b"))
    with pytest.raises(
        UserError, match="label 0 is 'earn' for the student and 'ship' for the teacher, which has 'earn'"
    ):
        require_same_classes(LABELS, ("ship", "earn", "grain"))
