"""The first stage of a conversion: each mixer alone against hand-made steps, and a whole run that begins with it.

Shapes: B windows, L tokens, C channels.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from asnn_goose import cli
from asnn_goose.config.schema import StudentConfig, TrainConfig, TransferConfig
from asnn_goose.errors import UserError
from asnn_goose.models import GooseForCausalLM, Teacher, build_student
from asnn_goose.models.goose import GooseBlock
from asnn_goose.train.engine import Engine
from asnn_goose.train.loop import Interrupted
from asnn_goose.train.measure import Clock, measure
from asnn_goose.train.setting import prepare
from asnn_goose.train.start import first_windows
from asnn_goose.train.transfer import relative_error, transfer_mixers

V = 257
MIXERS = ("time", "channel")


def _engine(precision: str = "float32") -> Engine:
    return Engine(TrainConfig.model_validate({"scale": "smoke", "tokens": 1, "device": "cpu", "precision": precision}))


def _batches(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randint(V, (2 * count, 16), generator=torch.Generator().manual_seed(seed)).split(2))


def _start(teacher: Teacher, layers=(1, 2), **keys) -> GooseForCausalLM:
    """Spiking as configs/student/converted.yaml says, unless told otherwise; one start for all who ask."""
    neuron = {"threshold": 4.0, "offset": 0.5, "surrogate": "rectangle", "detach_reset": False}
    settings = {"layers": len(layers), "head_size": 8, "init": "layers", "neuron": neuron, "hidden_neuron": neuron}
    torch.manual_seed(0)
    return build_student(StudentConfig.model_validate(settings | keys), teacher, _batches(1)[0], layers=layers)


DENSE = {"neuron": {"kind": "dense"}, "hidden_neuron": {"kind": "dense"}}


def _blocks(student: GooseForCausalLM) -> list[GooseBlock]:
    return [block for block in student.model.blocks if isinstance(block, GooseBlock)]


def _parameters(student: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


def _pairs(teacher: Teacher, layer: int, ids_BL: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mixer -> (residual stream in front of it, what a Llama's block adds to it there)."""
    block, seen = teacher.block(layer), {}
    names = {"self_attn": "out", "mlp": "out", "input_layernorm": "in", "post_attention_layernorm": "in"}
    hooks = []
    for name, side in names.items():

        def keep(_module, arguments, output, name=name, side=side):
            seen[name] = arguments[0] if side == "in" else output[0] if isinstance(output, tuple) else output

        hooks.append(block.get_submodule(name).register_forward_hook(keep))
    teacher(ids_BL)
    for hook in hooks:
        hook.remove()
    return {
        "time": (seen["input_layernorm"], seen["self_attn"]),
        "channel": (seen["post_attention_layernorm"], seen["mlp"]),
    }


def _modules(block: GooseBlock, mixer: str) -> nn.ModuleList:
    """(norm, mixer)."""
    return nn.ModuleList([block.get_submodule(f"{mixer}_norm"), block.get_submodule(f"{mixer}_mix")])


def _error(modules: nn.ModuleList, h_BLC: Tensor, target_BLC: Tensor) -> Tensor:
    """Written out: 1 - R^2 over the positions from the second on."""
    out = modules[1](modules[0](h_BLC.float()))[0][:, 1:].flatten(0, 1)
    target = target_BLC[:, 1:].float().flatten(0, 1)
    return ((out - target) ** 2).sum() / ((target - target.sum(0) / len(target)) ** 2).sum()


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# The error


def test_the_error_is_a_share_of_the_targets_variance():
    generator = torch.Generator().manual_seed(0)
    out_BLC, target_BLC = (torch.randn(3, 7, 5, generator=generator) + 2.0 for _ in range(2))
    out, target = (x[:, 1:].double().numpy().reshape(-1, 5) for x in (out_BLC, target_BLC))
    expected = ((out - target) ** 2).mean() / target.var(0).mean()
    assert relative_error(out_BLC, target_BLC).item() == pytest.approx(expected, rel=1e-5)  # float32 sums
    mean_BLC = target_BLC[:, 1:].mean((0, 1)).expand(3, 7, 5)
    assert relative_error(mean_BLC, target_BLC).item() == pytest.approx(1.0, rel=1e-5)
    assert relative_error(target_BLC, target_BLC).item() == 0.0


def test_a_windows_first_position_is_no_part_of_the_error():
    generator = torch.Generator().manual_seed(0)
    out_BLC, target_BLC = (torch.randn(3, 7, 5, generator=generator) for _ in range(2))
    before = relative_error(out_BLC, target_BLC)
    out_BLC[:, 0], target_BLC[:, 0] = math.inf, 1e30
    assert torch.equal(relative_error(out_BLC, target_BLC), before)
    target_BLC[:, 1] += 1.0
    assert not torch.equal(relative_error(out_BLC, target_BLC), before)


def test_the_error_of_half_precision_is_summed_in_float32():
    out_BLC, target_BLC = (torch.randn(3, 700, 50, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    found = relative_error(out_BLC.bfloat16(), target_BLC.bfloat16())
    expected = relative_error(out_BLC.bfloat16().double(), target_BLC.bfloat16().double())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# The stage


@pytest.mark.parametrize("layers", [(1, 2), (2,), (1, 2, 2)])
def test_errors_are_those_of_each_mixer_on_the_teachers_inputs(make_teacher, layers):
    teacher, batches = make_teacher(), _batches(1)
    student = _start(teacher, layers)
    expected = {"time": [], "channel": []}
    with torch.no_grad():
        for layer, block in zip(layers, _blocks(student), strict=True):
            for mixer, pair in _pairs(teacher, layer, batches[0]).items():
                expected[mixer].append(_error(_modules(block, mixer), *pair).item())
    first, last = transfer_mixers(student, teacher, layers, batches, TransferConfig(), _engine())
    assert first == last
    # float32 sums.
    assert first.time_mix == pytest.approx(expected["time"], rel=1e-4)
    assert first.channel_mix == pytest.approx(expected["channel"], rel=1e-4)
    means = (float(np.mean(expected["time"])), float(np.mean(expected["channel"])))
    assert first.means() == pytest.approx(means, rel=1e-4)


def test_without_neurons_the_channel_mixes_have_nothing_to_learn(make_teacher):
    teacher = make_teacher(rms_norm_eps=1e-5)
    student = _start(teacher, **DENSE)
    first, _ = transfer_mixers(student, teacher, (1, 2), _batches(1), TransferConfig(), _engine())
    assert max(first.channel_mix) < 1e-8  # squares of float32's rounding
    assert min(first.time_mix) > 0.1


def test_every_mixer_comes_closer_to_the_teachers(make_teacher):
    teacher, same, other = make_teacher(), _batches(1), _batches(1, seed=9)
    before, _ = transfer_mixers(_start(teacher), teacher, (1, 2), other, TransferConfig(), _engine())
    student = _start(teacher)
    first, last = transfer_mixers(student, teacher, (1, 2), same * 16, TransferConfig(), _engine())
    pairs = zip(first.time_mix + first.channel_mix, last.time_mix + last.channel_mix, strict=True)
    assert all(later < 0.6 * earlier for earlier, later in pairs)
    # Text that it was not trained on: only the time mixes had something left to learn.
    after, _ = transfer_mixers(student, teacher, (1, 2), other, TransferConfig(), _engine())
    pairs = zip(before.time_mix, after.time_mix, strict=True)
    assert all(later < 0.8 * earlier for earlier, later in pairs)


def test_only_the_blocks_move_and_all_of_them(make_teacher):
    teacher = make_teacher(tie_word_embeddings=False)
    student = _start(teacher)
    before = _parameters(student)
    transfer_mixers(student, teacher, (1, 2), _batches(3), TransferConfig(), _engine())
    moved = {name for name, value in _parameters(student).items() if not torch.equal(value, before[name])}
    assert all(name.startswith("model.blocks.") for name in moved)
    for number in (0, 1):
        for part in ("time_norm.weight", "time_mix.receptance.weight", "time_mix.output_bias_C", "channel_norm.weight"):
            assert f"model.blocks.{number}.{part}" in moved
        for part in ("time_mix.decay.down", "channel_mix.value.weight", "channel_mix.key.neuron.log_threshold"):
            assert f"model.blocks.{number}.{part}" in moved
    assert all(parameter.grad is None for parameter in student.parameters())


def _clipped(modules: nn.ModuleList) -> list[Tensor]:
    gradients = [p.grad for p in modules.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    return [g * min(1.0, 1.0 / (norm + 1e-6)) for g in gradients]


@pytest.mark.parametrize("keys", [{}, DENSE], ids=["spiking", "dense"])
def test_each_mixer_follows_its_own_error_alone(make_teacher, keys):
    """Gradients at every step, and the weights after three of AdamW at the scheduled rates, one mixer at a time."""
    teacher, batches = make_teacher(), _batches(3)
    config = TransferConfig(lr=2e-3, lr_end=0.2, warmup=0.5)
    # Half the stage is 1.5 steps, so that the first takes 2/3 of the cosine, which is (1, 3/4, 1/4) of the way down.
    rates = [2e-3 * rise * (0.2 + 0.8 * share) for rise, share in ((2 / 3, 1.0), (1.0, 0.75), (1.0, 0.25))]
    student, steps = _start(teacher, **keys), []

    def note(optimiser, *_):
        steps.append({id(p): p.grad.clone() for group in optimiser.param_groups for p in group["params"]})

    alone = {(n, m): copy.deepcopy(_modules(block, m)) for n, block in enumerate(_blocks(student)) for m in MIXERS}
    with register_optimizer_step_pre_hook(note):
        transfer_mixers(student, teacher, (1, 2), batches, config, _engine())
    assert len(steps) == 3
    clipped = []
    for (number, mixer), modules in alone.items():
        together = _modules(_blocks(student)[number], mixer)
        optimiser = torch.optim.AdamW(modules.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
        for ids_BL, rate, step in zip(batches, rates, steps, strict=True):
            modules.zero_grad()
            _error(modules, *_pairs(teacher, number + 1, ids_BL)[mixer]).backward()
            for own, whole, gradient in zip(
                modules.parameters(), together.parameters(), _clipped(modules), strict=True
            ):
                assert own.grad is not None
                clipped.append(not torch.equal(own.grad, gradient))
                own.grad = gradient
                # float32 sums, in another order; from the second step on of weights that differ as little.
                scale = gradient.abs().max().item()
                torch.testing.assert_close(step[id(whole)], gradient, rtol=0, atol=1e-3 * scale + 1e-9)
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
        for own, whole in zip(modules.parameters(), together.parameters(), strict=True):
            # Adam divides by the gradient's own size, so that what is left of it near 0 still moves by the rate.
            assert (own - whole).abs().mean() < 0.01 * sum(rates)
    assert any(clipped) and not all(clipped)


def test_the_teacher_is_unchanged_and_unwatched_whatever_happens(make_teacher):
    teacher = make_teacher()
    before = _parameters(teacher.model)

    def stopped(batches):
        yield batches[0]
        raise KeyboardInterrupt

    transfer_mixers(_start(teacher), teacher, (1, 2), _batches(2), TransferConfig(), _engine())
    assert _hooks(teacher.model) == 0
    with pytest.raises(KeyboardInterrupt):
        transfer_mixers(_start(teacher), teacher, (1, 2), _batches(2), TransferConfig(), _engine(), stopped)
    assert _hooks(teacher.model) == 0
    assert all(torch.equal(value, before[name]) for name, value in _parameters(teacher.model).items())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_two_calls_are_one(make_teacher):
    results = []
    for _ in range(2):
        teacher = make_teacher()
        student = _start(teacher)
        errors = transfer_mixers(student, teacher, (1, 2), _batches(3), TransferConfig(), _engine())
        results.append((_parameters(student), errors))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())


def test_frozen_parameters_stay(make_teacher):
    teacher = make_teacher()
    student = _start(teacher)
    frozen = _blocks(student)[0].time_mix.receptance.weight.requires_grad_(False)
    before = frozen.clone()
    transfer_mixers(student, teacher, (1, 2), _batches(2), TransferConfig(), _engine())
    assert torch.equal(frozen, before)


def test_an_error_that_is_not_finite_ends_the_stage(make_teacher):
    teacher = make_teacher()
    with pytest.raises(FloatingPointError, match=r"a mixer's error is not finite: lower student\.transfer\.lr"):
        transfer_mixers(_start(teacher), teacher, (1, 2), _batches(3), TransferConfig(lr=1e30), _engine())
    assert _hooks(teacher.model) == 0


def test_products_take_the_engines_dtype_and_weights_stay_float32(make_teacher):
    teacher, batches = make_teacher(), _batches(1) * 16
    teacher.model.to(torch.bfloat16)
    student = _start(teacher)
    first, last = transfer_mixers(student, teacher, (1, 2), batches, TransferConfig(), _engine("bfloat16"))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(after < 0.6 * before for before, after in zip(first.means(), last.means(), strict=True))
    exact, _ = transfer_mixers(_start(teacher), teacher, (1, 2), batches[:1], TransferConfig(), _engine())
    # bfloat16 keeps eight bits, and some spikes flip.
    assert first != exact and first.means() == pytest.approx(exact.means(), rel=0.05)


# In a run

LAYERS = {"student__init": "layers", "student__head_size": 8, "student__transfer__tokens": 64}
LAYERS |= {"student__neuron__offset": 0.5, "student__hidden_neuron__offset": 0.5}


def _measured(session) -> dict:
    result = measure(session.setting, session.folder, session.progress, session.seen, Clock(), lambda: 0.0)
    times = {"run_id", "started", "wall_seconds", "seconds_by_phase", "tokens_per_second", "peak_memory_bytes"}
    return {name: value for name, value in json.loads(result.model_dump_json()).items() if name not in times}


def test_a_converted_run_trains_resumes_and_says_what_it_did(start, go_on, tiny_experiment, stopping_at):
    experiment = tiny_experiment(**LAYERS)
    straight = start(experiment).train()
    broken = start(experiment, stopping_at(3))
    with pytest.raises(Interrupted):
        broken.train()
    resumed = go_on(experiment, broken.folder.path).train()
    ours, theirs = (dict(session.setting.module.named_parameters()) for session in (straight, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    result = _measured(resumed)
    assert result == _measured(straight)
    assert math.isfinite(result["student"]["test_ppl"]) and result["tokens_seen"] == 128
    note = straight.setting.transfer.sentence()
    assert result["schedule_notes"] == [note]
    assert note.startswith("Before training, each mixer was matched to the teacher's on the teacher's inputs over 64 ")


def test_a_run_without_the_stage_says_nothing_of_it(start, tiny_experiment):
    session = start(tiny_experiment(**LAYERS | {"student__transfer__tokens": None})).train()
    assert session.setting.transfer is None
    assert _measured(session)["schedule_notes"] == []


def test_the_stage_reads_no_text_that_training_does_not(tiny_experiment):
    setting = prepare(tiny_experiment(**LAYERS | {"student__transfer__tokens": 10_000}))
    # The baselines are fitted on the 128 tokens of four steps.
    assert setting.transfer is not None and setting.transfer.tokens == 128


def test_what_a_curriculum_counts_as_seen_includes_the_stage(tiny_experiment):
    """Before its first step the run has seen the windows of the start, here eight for its sizes and for the stage."""
    staged = {"distillation__curriculum__rule": "time", "distillation__curriculum__rouge_tokens": 4, "train__steps": 8}
    tokens = {"student__transfer__tokens": 128, "student__fit_tokens": 128}
    setting = prepare(tiny_experiment("v10", **LAYERS | staged | tokens))
    assert setting.stages is not None
    ids, starts = setting.seen_tokens(256)
    assert len(starts) == 8
    assert np.array_equal(ids, first_windows(setting.text.shards["train"], 16, 0, 128).flatten())


def test_a_layer_map_that_does_not_fit_is_one_sentence(tiny_experiment):
    with pytest.raises(UserError, match="tinybert needs 2 teacher layers to be divisible by 3"):
        prepare(tiny_experiment(**LAYERS, student__layers=3, student__layer_map="tinybert"))
    # A student that takes no blocks has no use for the map.
    prepare(tiny_experiment(student__layers=3, student__layer_map="tinybert"))


def test_a_stage_that_breaks_down_ends_the_command_in_a_sentence(tiny_flags, capsys):
    assert cli.main("v11_1", tiny_flags(**LAYERS | {"student__transfer__lr": 1e30})) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and error.endswith("lower student.transfer.lr")
