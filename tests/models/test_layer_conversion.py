"""A student's blocks from a teacher's: what they compute, what the smoothing does to channels, which teachers cannot.

The oracles are the teacher's own modules, called by their names in transformers, and numpy float64.

Shapes: B windows, L tokens, C channels, F hidden channels, H query heads, K key and value heads, D channels of a head.
"""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from asnn_goose.config.schema import StudentConfig
from asnn_goose.errors import UserError
from asnn_goose.models import GooseForCausalLM, Teacher, build_student
from asnn_goose.models.goose import GooseBlock
from asnn_goose.models.layer_conversion import block_parts, channel_sizes

C, F, H, D, V = 32, 48, 4, 8, 257
SITES = {"query": "self_attn.q_proj", "output": "self_attn.o_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
SHAPE: dict[str, Any] = {"hidden_size": C, "intermediate_size": F, "vocab_size": 264}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": H}


def _text(seed: int = 0) -> Tensor:
    return torch.randint(V, (8, 20), generator=torch.Generator().manual_seed(seed))


def _teacher(make_teacher, **keys) -> Teacher:
    """Gains and hidden channels of very different sizes, as a trained teacher has them."""
    teacher: Teacher = make_teacher(**{"rms_norm_eps": 1e-5, **keys})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in teacher.model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.exp(torch.randn(parameter.shape, generator=generator)))
            if "up_proj" in name or "v_proj" in name:
                parameter.mul_(torch.exp(torch.randn(len(parameter), 1, generator=generator)))
    return teacher


def _settings(**keys) -> StudentConfig:
    dense = {"kind": "dense"}
    base = {"layers": 2, "head_size": D, "init": "layers", "neuron": dense, "hidden_neuron": dense}
    return StudentConfig.model_validate(base | keys)


def _student(teacher: Teacher, layers=(1, 2), **keys) -> GooseForCausalLM:
    return build_student(_settings(layers=len(layers), **keys), teacher, _text(), layers=layers).eval()


def _blocks(student: GooseForCausalLM) -> list[GooseBlock]:
    return [block for block in student.model.blocks if isinstance(block, GooseBlock)]


def _inputs(teacher: Teacher, layer: int, ids_BL: Tensor) -> dict[str, Tensor]:
    """What the modules of SITES, and the two norms, of a Llama's block get."""
    block, found, hooks = teacher.block(layer), {}, []
    names = SITES | {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    for name, path in names.items():

        def keep(_module, arguments, name=name):
            found[name] = arguments[0]

        hooks.append(block.get_submodule(path).register_forward_pre_hook(keep))
    teacher(ids_BL)
    for hook in hooks:
        hook.remove()
    return found


def _rms(x_BLC: Tensor) -> np.ndarray:
    """Of each channel over all positions but a window's first, in float64."""
    return np.sqrt((x_BLC[:, 1:].detach().double().numpy() ** 2).mean((0, 1)))


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# What a converted block computes


@pytest.mark.parametrize("smoothing", [0.0, 0.4, 1.0])
@torch.no_grad()
def test_each_channel_mix_is_the_teachers_mlp(make_teacher, smoothing):
    teacher = _teacher(make_teacher)
    student = _student(teacher, smoothing=smoothing)
    for layer, block in enumerate(_blocks(student), 1):
        theirs = teacher.block(layer)
        # Another text than the one that the sizes were measured on, and the first positions as well.
        h_BLC = _inputs(teacher, layer, _text(seed=1))["mlp_norm"]
        expected = theirs.get_submodule("mlp")(theirs.get_submodule("post_attention_layernorm")(h_BLC))
        found, _ = block.channel_mix(block.channel_norm(h_BLC))
        # float32: products of 32 and 48 terms, of weights that were divided and multiplied.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("smoothing", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_the_time_mixs_products_are_the_teachers(make_teacher, smoothing, groups):
    teacher = _teacher(make_teacher, num_key_value_heads=groups)
    for layer, block in enumerate(_blocks(_student(teacher, smoothing=smoothing)), 1):
        theirs, mix = teacher.block(layer), block.time_mix
        h_BLC = _inputs(teacher, layer, _text(seed=1))["attention_norm"]
        x_BLC, ours_BLC = theirs.get_submodule("input_layernorm")(h_BLC), block.time_norm(h_BLC)
        q, k, v = (theirs.get_submodule(f"self_attn.{name}_proj")(x_BLC) for name in "qkv")
        # Query head h reads key and value head h K / H.
        k, v = (torch.cat([x[..., h * groups // H * D :][..., :D] for h in range(H)], -1) for x in (k, v))
        o = theirs.get_submodule("self_attn.o_proj")(v)
        found = {
            "receptance": (mix.receptance(ours_BLC), q),
            "key": (mix.key(ours_BLC), k),
            "output of value": (mix.output(mix.value(ours_BLC)), o),
        }
        for name, (ours, expected) in found.items():
            # float32 sums of 32 terms.
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item(), msg=name)
        size_C = _rms(_inputs(teacher, layer, _text())["output"])
        divided = mix.value(ours_BLC).double().numpy() * (size_C / size_C.mean()) ** smoothing
        np.testing.assert_allclose(divided, v, rtol=0, atol=1e-5 * v.abs().max().item())


@torch.no_grad()
def test_without_smoothing_the_teachers_numbers_are_the_students(make_teacher):
    teacher = _teacher(make_teacher)
    for layer, block in enumerate(_blocks(_student(teacher, smoothing=0.0)), 1):
        theirs = dict(teacher.block(layer).named_parameters())
        gate_up = torch.cat([theirs["mlp.gate_proj.weight"], theirs["mlp.up_proj.weight"]])
        for ours, expected in (
            (block.time_norm.get_parameter("weight"), theirs["input_layernorm.weight"]),
            (block.time_mix.receptance.weight, theirs["self_attn.q_proj.weight"]),
            (block.time_mix.key.weight, theirs["self_attn.k_proj.weight"]),
            (block.time_mix.value.weight, theirs["self_attn.v_proj.weight"]),
            (block.time_mix.output.weight, theirs["self_attn.o_proj.weight"]),
            (block.channel_norm.get_parameter("weight"), theirs["post_attention_layernorm.weight"]),
            (block.channel_mix.key.weight, gate_up),
            (block.channel_mix.value.weight, theirs["mlp.down_proj.weight"]),
        ):
            assert torch.equal(ours, expected)


@torch.no_grad()
def test_embedding_final_norm_and_head_are_the_teachers_and_the_embedding_is_not_normalised(make_teacher):
    for tied in (True, False):
        teacher = _teacher(make_teacher, tie_word_embeddings=tied)
        student = _student(teacher)
        output = student(_text(), output_hidden_states=True)
        assert torch.equal(output.hidden_states[0], teacher(_text(), (0,)).hidden[0])
        expected = output.hidden_states[-1].double().numpy()
        expected /= np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-5)
        weights = (teacher.model.get_parameter("model.norm.weight"), teacher.model.get_parameter("lm_head.weight")[:V])
        expected = expected * weights[0].double().numpy() @ weights[1].double().numpy().T
        # float32 sums of 32 terms.
        np.testing.assert_allclose(output.logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert (student.lm_head.weight is student.model.embeddings.weight) == tied


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2])
def test_norms_have_the_teachers_epsilon(make_teacher, eps):
    student = _student(_teacher(make_teacher, rms_norm_eps=eps))
    norms = [module for module in student.modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) == 5 and {norm.eps for norm in norms} == {eps}


@torch.no_grad()
def test_blocks_start_from_the_layers_that_the_map_names(make_teacher):
    teacher = _teacher(make_teacher)
    for layers in ((2,), (1,), (2, 1), (1, 2, 2)):
        student = _student(teacher, layers=layers, smoothing=0.0)
        for layer, block in zip(layers, _blocks(student), strict=True):
            weight = teacher.block(layer).get_parameter("self_attn.q_proj.weight")
            assert torch.equal(block.time_mix.receptance.weight, weight)


def test_a_bfloat16_teachers_weights_are_taken_as_they_are(make_teacher):
    teacher = _teacher(make_teacher)
    nn.Module.to(teacher.model, torch.bfloat16)
    student = _student(teacher, smoothing=0.0)
    weight = _blocks(student)[0].channel_mix.value.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, teacher.block(1).get_parameter("mlp.down_proj.weight").float())


def test_the_teacher_is_left_as_it_was(make_teacher):
    teacher = _teacher(make_teacher)
    before = {name: parameter.clone() for name, parameter in teacher.model.state_dict().items()}
    _student(teacher)
    with pytest.raises(IndexError):
        channel_sizes(teacher, [1, 2], torch.full((1, 4), 100_000))
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.model.state_dict().items())
    assert _hooks(teacher.model) == 0


# Smoothing


def _append_to(calls: list[Tensor]):
    return lambda _module, arguments: calls.append(arguments[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_smoothing_evens_out_the_channels_in_front_of_the_neurons(make_teacher, smoothing):
    """rms_c^(1 - p) times the mean rms to the p: at 1 every channel has the mean size."""
    teacher = _teacher(make_teacher)
    for layer, block in enumerate(_blocks(_student(teacher, smoothing=smoothing)), 1):
        theirs = _inputs(teacher, layer, _text())
        mlp_in_BLC, hidden = block.channel_norm(theirs["mlp_norm"]), []
        block.channel_mix.value.register_forward_pre_hook(_append_to(hidden))
        block.channel_mix(mlp_in_BLC)
        ours = {"query": block.time_norm(theirs["attention_norm"]), "gate": mlp_in_BLC, "down": hidden[0]}
        for name, x_BLC in ours.items():
            size_C = _rms(theirs[name])
            assert size_C.max() > 10 * size_C.min()
            expected = size_C ** (1.0 - smoothing) * size_C.mean() ** smoothing
            np.testing.assert_allclose(_rms(x_BLC), expected, rtol=1e-4)  # float32 sums over 152 positions


def test_sizes_leave_out_a_windows_first_position(make_teacher):
    teacher, ids_BL = _teacher(make_teacher), _text() % 256
    ids_BL[:, 0] = 256
    with torch.no_grad():
        # The sink's one huge channel, which its own row of the residual stream keeps.
        teacher.model.get_parameter("model.embed_tokens.weight")[256, 5] = 1e4
    sizes = channel_sizes(teacher, [1, 2], ids_BL)
    assert {layer: set(of) for layer, of in sizes.items()} == {1: set(SITES), 2: set(SITES)}
    for layer in (1, 2):
        seen = _inputs(teacher, layer, ids_BL)
        for name, size_C in sizes[layer].items():
            np.testing.assert_allclose(size_C, _rms(seen[name]), rtol=1e-5)  # float32 sums
        whole = np.sqrt((seen["query"].double().numpy() ** 2).mean((0, 1)))
        assert whole[5] > 1.5 * sizes[layer]["query"][5].item()


@torch.no_grad()
def test_a_channel_that_is_silent_on_the_calibration_text_stays_finite(make_teacher):
    teacher = _teacher(make_teacher)
    theirs = teacher.block(1)
    theirs.get_parameter("post_attention_layernorm.weight")[3] = 0.0
    theirs.get_parameter("mlp.up_proj.weight")[7] = 0.0
    block = _blocks(_student(teacher))[0]
    h_BLC = _inputs(teacher, 1, _text())["mlp_norm"]
    expected = theirs.get_submodule("mlp")(theirs.get_submodule("post_attention_layernorm")(h_BLC))
    # float32, as above.
    torch.testing.assert_close(
        block.channel_mix(block.channel_norm(h_BLC))[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )
    # A hundredth of the mean size is the smallest divisor.
    column = theirs.get_parameter("mlp.down_proj.weight")[:, 7]
    torch.testing.assert_close(block.channel_mix.value.weight[:, 7], column / 100.0, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("silent", ["self_attn.v_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"])
@torch.no_grad()
def test_a_site_that_is_silent_altogether_stays_finite(make_teacher, silent):
    teacher = _teacher(make_teacher)
    teacher.block(1).get_parameter(silent).zero_()
    student = _student(teacher)
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())


# Refusals


def _perturbed(model: PreTrainedModel, name: str) -> PreTrainedModel:
    with torch.no_grad():
        model.get_parameter(name).add_(0.5)
    return model


def _replaced(model: PreTrainedModel, path: str, module: nn.Module) -> PreTrainedModel:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


def _llama(**keys) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "initializer_range": 0.2, **keys}))


GPT2: dict[str, Any] = {"n_embd": C, "n_layer": 2, "n_head": H, "n_positions": 64, "vocab_size": 264}
GEMMA: dict[str, Any] = SHAPE | {"num_key_value_heads": H, "head_dim": D, "final_logit_softcapping": None}
EXPERTS: dict[str, Any] = SHAPE | {"num_key_value_heads": H, "num_experts": 4, "moe_intermediate_size": 8}
EXPERTS |= {"shared_expert_intermediate_size": F, "tie_word_embeddings": True}
QUERY = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
        "block 1 has no attention with q_proj, k_proj, v_proj, o_proj",
    ),
    "qwen2 with a bias": (
        lambda: _perturbed(Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=H)), f"{QUERY}.bias"),
        "block 1 has a bias behind its query matrix, which the student's has not",
    ),
    "a bias in block 2": (
        lambda: _perturbed(_llama(mlp_bias=True), "model.layers.1.mlp.down_proj.bias"),
        "block 2 has a bias behind its down matrix, which the student's has not",
    ),
    "qwen3": (
        lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=H, head_dim=D)),
        "block 1 has q_norm and k_norm in its attention, which the student's has not",
    ),
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA)),
        "block 1 has 4 norms of the final norm's kind where the student's has two",
    ),
    "gelu": (lambda: _llama(hidden_act="gelu"), r"block 1 has an MLP that is not down\(silu\(gate x\) \* \(up x\)\)"),
    "relu": (lambda: _llama(hidden_act="relu"), r"block 1 has an MLP that is not down\(silu\(gate x\) \* \(up x\)\)"),
    "a wrapped matrix": (
        lambda: _replaced(_llama(), QUERY, nn.Sequential(nn.Linear(C, C, bias=False))),
        "block 1 has a Sequential where its query matrix should be",
    ),
    "experts": (lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**EXPERTS)), "block 1 has no gated MLP with gate_proj"),
    "layer norms with a bias": (
        lambda: _perturbed(
            StableLmForCausalLM(StableLmConfig(**SHAPE, num_key_value_heads=H)), "model.layers.0.input_layernorm.bias"
        ),
        "block 1 has a bias",
    ),
    "scaled outputs": (
        lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, num_key_value_heads=H, residual_multiplier=0.2)),
        "block 1 has outputs",
    ),
    "a scaled embedding": (
        lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, num_key_value_heads=H, embedding_multiplier=12.0)),
        "an embedding",
    ),
}
"""What -> (a model that has it, what the sentence says of it)."""


@pytest.mark.parametrize("what", REFUSED)
def test_a_teacher_that_cannot_be_taken_over_is_refused_in_one_sentence(make_teacher, what):
    build, part = REFUSED[what]
    teacher = make_teacher(build())
    with pytest.raises(UserError, match=part) as error:
        _student(teacher, norm=teacher.final_norm_kind if what != "gemma2" else "rms")
    message = str(error.value)
    assert message.startswith("teacher 'tiny' cannot be converted layer by layer: ")
    assert message.endswith("; choose --student goose") and "\n" not in message and ". " not in message
    assert _hooks(teacher.model) == 0


def test_biases_that_are_all_zero_are_no_obstacle(make_teacher):
    # Qwen2's class gives q, k and v one, which starts at 0.
    teacher = make_teacher(Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)))
    assert isinstance(block_parts(teacher, 1).query.bias, Tensor)
    assert _student(teacher)(_text()).logits.shape == (8, 20, V)


def test_heads_of_another_size_are_refused(make_teacher):
    teacher = _teacher(make_teacher)
    for size in (4, 16):
        with pytest.raises(
            UserError,
            match=rf"teacher 'tiny' has 4 heads of 8 channels, and the student 32 channels in heads of {size}: set "
            r"student\.head_size to 8 and student\.width to null, or choose --student goose",
        ):
            _student(teacher, head_size=size)
    with pytest.raises(UserError, match=r"student\.head_size 5 does not divide the width 32"):
        _student(teacher, head_size=5)


def test_heads_that_are_wider_than_the_residual_stream_are_refused(make_teacher):
    with pytest.raises(UserError, match="4 heads of 16 channels, and the student 32 channels in heads of 8"):
        _student(_teacher(make_teacher, head_dim=16))


def test_mlps_of_unequal_widths_are_refused(make_teacher):
    wide = _llama().get_submodule("model.layers.0.mlp")
    teacher = make_teacher(_replaced(_llama(intermediate_size=40), "model.layers.1.mlp", wide))
    with pytest.raises(UserError, match=r"40.*48|48.*40"):
        _student(teacher)


def test_widths_of_ones_own_are_refused():
    for key in ("width", "channel_mix_width"):
        with pytest.raises(ValidationError, match="init layers takes the teacher's widths: set width and channel_mix"):
            _settings(**{key: 64})
    with pytest.raises(ValidationError, match="transfer is a stage of init layers: set it to null with init none"):
        _settings(init="none", transfer={})
    with pytest.raises(ValidationError, match="layer_map pkd_skip has no teacher layer for each block: set it to unif"):
        _settings(layer_map="pkd_skip")


def test_another_norm_than_the_teachers_is_refused(make_teacher):
    with pytest.raises(UserError, match=r"student\.norm is 'layer' and the teacher's final norm is 'rms': set"):
        _student(_teacher(make_teacher), norm="layer")


def test_without_a_number_of_blocks_there_are_as_many_as_the_teacher_has(make_teacher):
    teacher = _teacher(make_teacher, num_hidden_layers=3)
    student = build_student(_settings(layers=None), teacher, _text(), layers=(1, 2, 3))
    assert len(_blocks(student)) == teacher.num_layers == 3
