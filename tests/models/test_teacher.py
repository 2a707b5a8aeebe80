"""The teacher: tiny models of several families, saved in a folder, and the default one from the shared cache.

Shape suffixes: B windows, L tokens, V vocabulary, E teacher width.
"""

import hashlib
import json
import logging
import math
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from asnn_goose.config.hardware import native_bfloat16
from asnn_goose.errors import UserError
from asnn_goose.models.teacher import Teacher, load_teacher
from asnn_goose.models.tokenizer import load_tokenizer, require_same_vocabulary

VOCABULARY, PADDED = 40, 48


def _tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    words = words or [f"w{i}" for i in range(VOCABULARY)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", unk_token="w0")


def _llama(**keys) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    # A wide initialisation: the logits then differ by much more than any tolerance below.
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": PADDED, "initializer_range": 0.3, **shape, **keys}))


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=PADDED, n_embd=32, n_layer=2, n_head=2, n_positions=16))
    torch.nn.init.normal_(model.transformer.ln_f.bias)
    return model


def _mpt() -> MptForCausalLM:
    torch.manual_seed(0)
    return MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=PADDED))


def _gemma2(**keys) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=PADDED, num_key_value_heads=1, **shape, **keys))


def _teacher(model: PreTrainedModel) -> Teacher:
    return Teacher("tiny", model, _tokenizer(), "fingerprint")


def _saved(folder: Path, model: PreTrainedModel | None = None, **keys) -> Path:
    (model or _llama()).save_pretrained(folder, **keys)
    _tokenizer().save_pretrained(folder)
    return folder


def _ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


# What a pass gives


def test_rows_that_pad_the_vocabulary_are_sliced_off():
    model = _llama().eval()
    teacher = _teacher(model)
    assert teacher.vocab_size == VOCABULARY
    with torch.no_grad():
        full_BLV = model(_ids()).logits
    assert full_BLV.shape[-1] == PADDED
    assert torch.equal(teacher(_ids()).logits_BLV, full_BLV[..., :VOCABULARY])
    assert teacher.head_weight_VE.shape == teacher.embedding_weight_VE.shape == (VOCABULARY, 32)


@pytest.mark.parametrize("build", [_llama, _gpt2])
def test_layers_count_from_one_and_the_last_stands_before_the_final_norm(build):
    model = build().eval()
    teacher = _teacher(model)
    n = teacher.num_layers
    output = teacher(_ids(), tuple(range(n + 1)))
    with torch.no_grad():
        reference = model(_ids(), output_hidden_states=True).hidden_states
        blocks = model.get_submodule("model.layers" if build is _llama else "transformer.h")
        by_hand = blocks[n - 1](reference[n - 1], **_positions(model))
        by_hand = by_hand[0] if isinstance(by_hand, tuple) else by_hand
    assert set(output.hidden) == set(range(n + 1))
    for layer in range(n):
        assert torch.equal(output.hidden[layer], reference[layer])
    # The same operations in float32, in another call.
    torch.testing.assert_close(output.hidden[n], by_hand, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output.hidden[n], reference[n], atol=0.1)


def _positions(model: PreTrainedModel) -> dict:
    if isinstance(model, GPT2LMHeadModel):
        return {}
    positions = torch.arange(7)[None]
    return {"position_embeddings": model.model.rotary_emb(torch.zeros(1), positions), "position_ids": positions}


def test_only_the_layers_asked_for_are_kept_and_no_hook_stays():
    teacher = _teacher(_llama())
    assert set(teacher(_ids(), (2,)).hidden) == {2}
    assert teacher(_ids()).hidden == {}
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in teacher.model.modules())


def test_states_and_layers_come_from_one_pass():
    teacher = _teacher(_llama())
    passes = []
    hook = teacher.model.model.register_forward_hook(lambda *_: passes.append(1))
    last, layers = teacher.states_and_layers(_ids(), (0, 3))
    hook.remove()
    assert len(passes) == 1
    assert torch.equal(last, teacher.states(_ids()))
    expected = teacher(_ids(), (0, 3)).hidden
    assert layers.keys() == {0, 3} and all(torch.equal(layers[layer], expected[layer]) for layer in layers)
    with pytest.raises(UserError, match="no layer 4"):
        teacher.states_and_layers(_ids(), (4,))


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(UserError, match=f"no layer {layer}: choose 0 .* to 3"):
        _teacher(_llama())(_ids(), (layer,))


def test_right_padding_leaves_the_text_alone():
    teacher = _teacher(_llama())
    padded = F.pad(_ids(), (0, 3))
    # Other lengths of the same sums in float32.
    torch.testing.assert_close(teacher(padded).logits_BLV[:, :7], teacher(_ids()).logits_BLV, rtol=1e-4, atol=1e-4)


# Frozen


def test_training_against_it_leaves_it_as_it_was():
    teacher = _teacher(_llama(attention_dropout=0.5))
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    first = teacher(_ids()).logits_BLV
    student = torch.nn.Parameter(torch.zeros_like(first))
    temperature = torch.nn.Parameter(torch.tensor(2.0))
    optimiser = torch.optim.SGD([student, temperature, *teacher.model.parameters()], lr=1.0)
    for _ in range(3):
        optimiser.zero_grad()
        target = (teacher(_ids()).logits_BLV / temperature).log_softmax(-1)
        F.kl_div(student.log_softmax(-1), target, log_target=True, reduction="sum").backward()
        optimiser.step()
    assert temperature.grad is not None and temperature.grad.abs() > 0  # it reached through the teacher's logits
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert torch.equal(teacher(_ids()).logits_BLV, first)


def test_inference_mode_would_break_a_learned_temperature():
    teacher = _teacher(_llama())
    with torch.inference_mode():
        logits_BLV = teacher(_ids()).logits_BLV
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        (logits_BLV / torch.nn.Parameter(torch.tensor(2.0))).sum().backward()


def test_train_mode_is_refused():
    teacher = _teacher(_llama())
    teacher.model.train()
    with pytest.raises(RuntimeError, match="train mode"):
        teacher.states(_ids())
    with pytest.raises(RuntimeError, match="train mode"):
        teacher(_ids())


# Parts for a student to start from


@pytest.mark.parametrize(("build", "kind"), [(_llama, "rms"), (_gpt2, "layer")])
def test_parts_give_the_logits(build, kind):
    teacher = _teacher(build().to(torch.bfloat16))
    output = teacher(_ids(), (teacher.num_layers,))
    x_BLE = output.hidden[teacher.num_layers].double()
    if kind == "layer":
        x_BLE = x_BLE - x_BLE.mean(-1, keepdim=True)
    x_BLE = x_BLE / (x_BLE.pow(2).mean(-1, keepdim=True) + teacher.final_norm_eps).sqrt() * teacher.final_norm_weight_E
    if teacher.final_norm_bias_E is not None:
        x_BLE = x_BLE + teacher.final_norm_bias_E
    assert teacher.final_norm_kind == kind
    assert teacher.head_weight_VE.dtype == teacher.final_norm_weight_E.dtype == torch.float32
    logits_BLV = x_BLE @ teacher.head_weight_VE.double().T
    # The teacher rounds to the 8 bits of bfloat16 behind the norm and the head.
    scale = logits_BLV.abs().max().item()
    torch.testing.assert_close(output.logits_BLV.double(), logits_BLV, rtol=0, atol=0.01 * scale)


@pytest.mark.parametrize("build", [_llama, _gpt2])
def test_states_times_head_are_the_logits_without_making_them(build):
    teacher = _teacher(build())
    states_BLE = teacher.states(_ids())
    # One product in float32, with another number of columns.
    torch.testing.assert_close(states_BLE @ teacher.head_VE.T, teacher(_ids()).logits_BLV, rtol=1e-5, atol=1e-5)
    assert not states_BLE.requires_grad and not states_BLE.is_inference()


def test_parts_are_copies():
    teacher = _teacher(_llama())
    for part in (teacher.embedding_weight_VE, teacher.head_weight_VE, teacher.final_norm_weight_E):
        part.zero_()
    assert teacher.embedding_weight_VE.abs().sum() > 0
    assert teacher.head_weight_VE.abs().sum() > 0
    assert teacher.final_norm_weight_E.sum() == 32


def test_a_head_needs_no_norm_of_a_known_name():
    torch.manual_seed(0)
    teacher = _teacher(_mpt())
    logits_BLV = F.linear(teacher.states(_ids()), teacher.head_VE)
    torch.testing.assert_close(logits_BLV, teacher(_ids()).logits_BLV)
    with pytest.raises(UserError, match=r"has no such part as a final norm, which student\.init needs"):
        _ = teacher.final_norm


def test_a_vocabulary_with_a_gap_reaches_up_to_its_highest_id():
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"last": PADDED - 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), eos_token="w1")
    assert Teacher("tiny", _llama(), tokenizer, "").vocab_size == PADDED


def test_how_much_it_reads_at_once():
    assert (_teacher(_gpt2()).longest, _teacher(_llama(max_position_embeddings=77)).longest) == (16, 77)
    assert _teacher(_mpt()).longest == math.inf


def test_parts_that_are_missing_are_named():
    gemma = _teacher(_gemma2(final_logit_softcapping=0.1))
    with pytest.raises(UserError, match=r"'tiny' .Gemma2ForCausalLM. has no plain head .*choose a teacher"):
        _ = gemma.head_weight_VE
    with pytest.raises(UserError, match="plain RMS or layer norm"):
        _ = gemma.final_norm_kind
    bare = _teacher(_llama())
    bare.model.model.norm = torch.nn.Identity()
    with pytest.raises(UserError, match="has no such part as a final norm"):
        _ = bare.final_norm_weight_E


# Loading


def _fingerprint(weights: str, folder: Path) -> str:
    """Of one digest of the weights and the configuration beside them."""
    configuration = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return hashlib.sha256((weights + configuration).encode()).hexdigest()


def test_a_folder_is_loaded_with_a_fingerprint_of_weights_and_configuration(tmp_path):
    folder = _saved(tmp_path / "a teacher")
    teacher = load_teacher(str(folder), "float32")
    assert teacher.name == str(folder)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert teacher.fingerprint == _fingerprint(weights, folder)
    assert (teacher.dtype, teacher.hidden_size, teacher.num_layers) == (torch.float32, 32, 3)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert torch.equal(teacher(_ids()).logits_BLV, _teacher(_llama())(_ids()).logits_BLV)
    assert load_teacher(str(folder), "bfloat16")(_ids()).logits_BLV.dtype == torch.bfloat16
    assert load_teacher(str(folder)).dtype == (torch.bfloat16 if native_bfloat16() else torch.float32)


def test_several_weight_files_have_one_fingerprint(tmp_path):
    folder = _saved(tmp_path, max_shard_size="10KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    weights = hashlib.sha256(digests.encode()).hexdigest()
    assert load_teacher(str(folder), "float32").fingerprint == _fingerprint(weights, folder)


def test_the_same_weights_under_another_configuration_are_another_teacher(tmp_path):
    folder = _saved(tmp_path)
    before = load_teacher(str(folder), "float32")
    configuration = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (folder / "config.json").write_text(json.dumps(configuration))
    after = load_teacher(str(folder), "float32")
    assert not torch.allclose(before.states(_ids()), after.states(_ids()))
    assert before.fingerprint != after.fingerprint


def test_a_missing_weight_is_refused_and_never_made_up(tmp_path):
    folder = _saved(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a LlamaForCausalLM \(first: model\.norm\.weight\)"):
        load_teacher(str(folder))


def _damage_tokenizer(folder: Path) -> None:
    facts = json.loads((folder / "tokenizer.json").read_text())
    del facts["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "damage", ["no weights", "cut weights", "other weights", "no tokenizer", "cut tokenizer", "no config"]
)
def test_a_folder_that_is_not_whole_is_one_sentence(tmp_path, damage):
    folder = _saved(tmp_path)
    if damage == "cut weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    elif damage == "other weights":
        other = _saved(tmp_path / "other", _llama(intermediate_size=64))
        (other / "model.safetensors").rename(folder / "model.safetensors")
    elif damage == "cut tokenizer":
        _damage_tokenizer(folder)
    else:
        victim = {"no weights": "model.safetensors", "no tokenizer": "tokenizer.json", "no config": "config.json"}[
            damage
        ]
        (folder / victim).unlink()
    with pytest.raises(
        UserError, match=r"is a folder without a whole causal language model .*save_pretrained"
    ) as error:
        load_teacher(str(folder))
    assert "\n" not in str(error.value)


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=PADDED,
        initializer_range=0.3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    folder = _saved(tmp_path, BertLMHeadModel(config))
    with pytest.raises(UserError, match=r"is no causal language model .its logits depend on later tokens"):
        load_teacher(str(folder), "float32")
    with pytest.raises(UserError, match=r"'minilm' is all-MiniLM-L6-v2, .* not a causal language model"):
        load_teacher("minilm")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_refused(name):
    with pytest.raises(UserError, match=f"'{name}' is a folder that does not exist"):
        load_teacher(name)


def test_no_way_to_the_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing' is neither an asset nor a folder") as error:
        load_teacher("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_model_in_the_hubs_cache_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--you--tiny"
    snapshot = _saved(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    teacher = load_teacher("you/tiny", "float32")
    weights = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    assert teacher.fingerprint == _fingerprint(weights, snapshot)
    assert torch.equal(teacher(_ids()).logits_BLV, _teacher(_llama())(_ids()).logits_BLV)


def test_a_misspelt_asset_gets_the_nearest_spelling():
    with pytest.raises(UserError, match=r"'smolm2' is neither an asset nor a folder: did you mean 'smollm2'"):
        load_teacher("smolm2")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match=r"teacher\.dtype is 'int8': choose auto, bfloat16 or float32"):
        load_teacher("smollm2", "int8")


def test_more_tokens_than_output_rows_is_refused():
    with pytest.raises(UserError, match="39 output rows for the 40 tokens"):
        _teacher(_llama(vocab_size=VOCABULARY - 1))


def test_the_default_teacher_knows_a_capital_and_splits_numbers():
    teacher = load_teacher("smollm2")
    assert (teacher.vocab_size, teacher.hidden_size, teacher.num_layers) == (49_152, 576, 30)
    input_ids = teacher.tokenizer("The capital of France is", return_tensors="pt").input_ids
    logits_BLV = teacher(input_ids).logits_BLV
    assert teacher.tokenizer.decode(logits_BLV[0, -1].argmax()) == " Paris"
    assert teacher.tokenizer.tokenize("at ½ past  12") == ["at", "Ġ", "Â½", "Ġpast", "ĠĠ", "1", "2"]


# Vocabulary


def test_a_tokenizer_is_read_alone(tmp_path):
    _tokenizer().save_pretrained(tmp_path / "words")
    require_same_vocabulary(_tokenizer(), load_tokenizer(str(tmp_path / "words")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"student\.tokenizer '.*empty' cannot be read .*set it to null") as error:
        load_tokenizer(str(tmp_path / "empty"))
    assert "\n" not in str(error.value)


def test_the_same_map_is_required(caplog):
    words = [f"w{i}" for i in range(VOCABULARY)]
    require_same_vocabulary(_tokenizer(), _tokenizer(words))
    assert not caplog.records
    splitting = _tokenizer()
    splitting.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with caplog.at_level(logging.WARNING):
        require_same_vocabulary(_tokenizer(), splitting)
    assert "other rules for splitting text" in caplog.text
    permuted = [*words[:10], words[11], words[10], *words[12:]]
    for other in (permuted, words[:-1], [*words, "more"]):
        for pair in ((words, other), (other, words)):
            with pytest.raises(UserError, match=r"differ, for one at token .*set student\.tokenizer to null"):
                require_same_vocabulary(*map(_tokenizer, pair))
