"""What a saved student lacks starts as it does in a new one, and the rest stays as it was saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from asnn_goose.models import GooseClassifierConfig, GooseConfig, GooseForCausalLM, GooseForSequenceClassification
from asnn_goose.models.spiking import Neuron

DRAWN = ("receptance.weight", "time_mix.key.weight", "time_mix.value.weight", ".up", "channel_mix.key.weight")
"""Orthogonal at the start, up to a gain."""


@pytest.fixture(autouse=True)
def _fresh_memory_holds_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes room for what is missing with this function."""
    make = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **keys: make(*args, **keys).fill_(torch.nan))


def load(folder: Path, **keys) -> Any:
    return GooseForCausalLM.from_pretrained(folder, **keys)


def assert_started(name: str, found: Tensor, new: Tensor) -> None:
    """As in a new student, and where the start is drawn, orthogonal and of the same size."""
    if not name.endswith(DRAWN):
        assert torch.equal(found, new), name
        return
    gram = found @ found.T if found.shape[0] <= found.shape[1] else found.T @ found
    torch.testing.assert_close(gram, torch.eye(len(gram)) * gram[0, 0], rtol=0, atol=1e-5)
    assert found.norm().item() == pytest.approx(new.norm().item(), rel=1e-5), name


def without(folder: Path, *keys: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key in keys:
        del tensors[key]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("keys", [{}, {"time_mix": "converted", "channel_mix": "gated", "norm": "layer"}])
def test_a_block_more_starts_as_in_a_new_student(make_student, tmp_path, keys):
    saved = make_student(**keys)
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path, num_hidden_layers=3)
    new = GooseForCausalLM(GooseConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, head_size=16, **keys))
    for name, value in loaded.model.blocks[2].state_dict().items():
        assert_started(name if "." in name else f".{name}", value, new.model.blocks[2].state_dict()[name])
    ours = saved.state_dict()
    assert all(torch.equal(v, ours[n]) for n, v in loaded.state_dict().items() if "blocks.2" not in n)


def test_parts_missing_in_the_file_start_and_their_neighbours_stay(make_student, tmp_path):
    saved = make_student(embedding_projection=True)
    saved.save_pretrained(tmp_path)
    missing = [
        "model.norm.weight",
        "model.widen.bias",
        *(f"model.blocks.1.time_mix.{part}" for part in ("mix_k_C", "decay.bias_C", "gate.up", "receptance.weight")),
        "model.blocks.1.time_mix.key.neuron.log_threshold",
        "model.blocks.0.channel_mix.value.weight",
        "model.blocks.0.channel_norm.weight",
    ]
    without(tmp_path, *missing)
    loaded, new, ours = (
        load(tmp_path).state_dict(),
        make_new(embedding_projection=True).state_dict(),
        saved.state_dict(),
    )
    for name, value in loaded.items():
        if name == "model.widen.bias":
            assert not value.any()
        elif name in missing:
            assert_started(name, value, new[name])
        else:
            assert torch.equal(value, ours[name]), name


def make_new(**keys: Any) -> GooseForCausalLM:
    return GooseForCausalLM(GooseConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, head_size=16, **keys))


def test_neurons_given_in_part_take_what_is_given_and_every_other_default(make_student, tmp_path):
    make_student().save_pretrained(tmp_path)
    learning = load(tmp_path, neuron={"decay": 0.9, "learn_decay": "channel"})
    silenced = load(tmp_path, neuron={"kind": "radix", "silence": 0.3})
    decays = [
        torch.as_tensor(m.decay) for m in learning.modules() if isinstance(m, Neuron) and m.decay_logit is not None
    ]
    silences = [m.silence for m in silenced.modules() if isinstance(m, Neuron) and m.silence is not None]
    assert len(decays) == len(silences) == 2 * 5
    # A float32 logit and back.
    torch.testing.assert_close(torch.stack(decays), torch.full((10, 32), 0.9), rtol=1e-6, atol=0)
    assert torch.equal(torch.stack(silences), torch.full((10,), 0.3))
    assert silenced.config.neuron["steps"] == 4 and silenced.config.neuron["silence"] == 0.3
    with pytest.raises(ValueError, match=r"^treshold = 1.0 \(neuron\): no such key"):
        load(tmp_path, neuron={"treshold": 1.0})


def test_a_classifier_starts_what_is_missing_too(tmp_path):
    shape: dict[str, Any] = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "head_size": 8}
    model = GooseForSequenceClassification(GooseClassifierConfig(**shape, num_labels=3, exits=[1]))
    torch.nn.init.normal_(model.both_ways[1].get_parameter("forward_share_C"))
    model.save_pretrained(tmp_path)
    missing = ["both_ways.0.forward_share_C", "exit_norms.0.weight", "model.blocks.1.time_mix.decay.bias_C"]
    without(tmp_path, *missing)
    loaded = GooseForSequenceClassification.from_pretrained(tmp_path).state_dict()
    assert loaded["both_ways.0.forward_share_C"].tolist() == [1.0, 0.0] * 8
    assert loaded["exit_norms.0.weight"].tolist() == [1.0] * 16
    ours = model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in loaded.items() if name != missing[0])
