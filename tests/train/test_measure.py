"""The numbers of a finished run, computed again from the files that it left."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from asnn_goose.config import load_dump
from asnn_goose.data.loader import Batch
from asnn_goose.errors import UserError
from asnn_goose.evaluation.information import measure_information
from asnn_goose.reporting import Result, RunFolder, load_result, read_metrics
from asnn_goose.reporting.run_folder import load_provenance
from asnn_goose.train.checkpoint import NAME
from asnn_goose.train.measure import Clock, continue_prompt, measure, probe_spikes, save_model
from asnn_goose.train.setting import prepare


@pytest.fixture(scope="module")
def result(tiny_run) -> Result:
    return load_result(tiny_run / "result.json")


@pytest.fixture
def setting(tiny_run, tiny_flags):
    """The run's text and teacher again, and a student that has not been trained."""
    return prepare(load_dump((tiny_run / "config.yaml").read_text()))


def test_the_saved_student_has_the_reported_perplexities(tiny_run, result, setting):
    student = AutoModelForCausalLM.from_pretrained(tiny_run / "student").eval()
    test, validation = (logits_of(student, setting, split) for split in (setting.text.test, setting.text.validation))
    # The head's product over other tiles of rows, in float32.
    assert result.student.test_ppl == pytest.approx(math.exp(nll(*test).mean()), rel=1e-4)
    assert result.student.val_ppl == pytest.approx(math.exp(nll(*validation).mean()), rel=1e-4)
    student_NV, teacher_NV, targets_N = test
    assert result.teacher.test_ppl == pytest.approx(math.exp(nll(teacher_NV, teacher_NV, targets_N).mean()), rel=1e-4)
    kl_N = (F.softmax(teacher_NV, -1) * (F.log_softmax(teacher_NV, -1) - F.log_softmax(student_NV, -1))).sum(-1)
    assert result.kl_to_teacher == pytest.approx(kl_N.mean().item(), rel=1e-4)
    right = student_NV.argmax(-1) == targets_N, teacher_NV.argmax(-1) == targets_N
    assert result.top1_agreement == pytest.approx((student_NV.argmax(-1) == teacher_NV.argmax(-1)).double().mean())
    assert result.knowledge_retention == pytest.approx(int((right[0] & right[1]).sum()) / max(1, int(right[1].sum())))
    assert result.ratio_to_teacher == pytest.approx(result.student.test_ppl / result.teacher.test_ppl, rel=1e-12)
    bits = nll(*test).sum() / math.log(2) / setting.text.test.predicted_bytes
    assert result.student.bits_per_byte == pytest.approx(bits, rel=1e-4)
    assert result.evaluation.test_tokens == len(targets_N)


@torch.no_grad()
def logits_of(student, setting, split) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student's [N, V], teacher's [N, V], targets [N]) over the predicted positions, in float64."""
    rows = []
    for batch in split.batches:
        keep = batch.mask[:, 1:]
        pair = student(batch.input_ids).logits, setting.teacher.model(batch.input_ids).logits
        pair = [logits[:, :-1, : setting.teacher.vocab_size][keep].double() for logits in pair]
        rows.append((*pair, batch.input_ids[:, 1:][keep]))
    student_NV, teacher_NV, targets_N = (torch.cat(part) for part in zip(*rows, strict=True))
    return student_NV, teacher_NV, targets_N


def nll(logits_NV: torch.Tensor, _: torch.Tensor, targets_N: torch.Tensor) -> np.ndarray:
    return F.cross_entropy(logits_NV, targets_N, reduction="none").numpy()


def test_the_student_folder_is_whole_and_generates(tiny_run, setting):
    student: Any = AutoModelForCausalLM.from_pretrained(tiny_run / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "student")
    assert tokenizer.get_vocab() == setting.teacher.tokenizer.get_vocab()
    ids = tokenizer("bake lomi", return_tensors="pt").input_ids
    with torch.no_grad():
        out = student.generate(ids, max_new_tokens=8, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 8) and torch.equal(out[:, : ids.shape[1]], ids)
    saved = torch.load(tiny_run / "checkpoints" / NAME, weights_only=False)["parameters"]
    trained = {name: value for name, value in saved.items() if name.startswith("student.")}
    parameters = {f"student.{name}": parameter for name, parameter in student.named_parameters()}
    assert trained and trained.keys() <= parameters.keys()
    for name, value in trained.items():
        assert torch.equal(parameters[name], value), name


def test_counts_and_clocks_add_up(tiny_run, result, setting):
    assert (result.steps, result.tokens_seen) == (4, 4 * 2 * 16)
    assert {"preparation", "training", "evaluation", "baselines", "sample"} <= result.seconds_by_phase.keys()
    # The phases follow each other; each is rounded to 10 ms.
    assert sum(result.seconds_by_phase.values()) <= result.wall_seconds + 0.1
    training = result.tokens_seen / result.tokens_per_second
    assert 0.0 < training <= result.seconds_by_phase["training"] + 0.01
    assert result.peak_memory_bytes > 100e6  # torch alone
    assert result.evaluation.test_documents == len(set(setting.text.test.documents_W.tolist())) > 1
    assert load_provenance(tiny_run).hardware.threads == torch.get_num_threads()
    assert result.student.trained_parameters == result.student.parameters - 257 * 32
    last = [line for line in read_metrics(tiny_run / "metrics.jsonl") if "temperature" in line][-1]
    assert last["step"] == 4 and last["tokens"] == result.tokens_seen
    saved = torch.load(tiny_run / "checkpoints" / NAME, weights_only=False)["parameters"]["temperature.raw"]
    assert result.temperature_final == pytest.approx(1.0 + 4.0 * torch.sigmoid(saved).item(), rel=1e-6)


def test_the_headline_energy_is_that_of_its_kinds_and_of_the_spikes_that_were_seen(result):
    energy, spikes = result.energy, result.spikes
    width, hidden, steps = 32, 128, 4
    shapes = {"channel_key": (width, hidden), "channel_value": (hidden, width)}
    additions = 0.0
    for site in spikes.per_layer:
        channels, outputs = shapes.get(site.site, (width, width))
        additions += site.rate * steps * channels * outputs
    mixer = energy.by_kind["mixer_matrices"]
    assert mixer.additions == mixer.operations == pytest.approx(additions, rel=1e-9)
    assert mixer.macs == mixer.spike_macs == 2 * (4 * width * width + 2 * width * hidden)
    for joules, traffic, kinds in (
        (energy.student_joules_per_token, energy.student_bytes_per_token, energy.by_kind),
        (energy.teacher_joules_per_token, energy.teacher_bytes_per_token, energy.teacher_by_kind),
    ):
        assert joules == pytest.approx(sum(kind.joules_per_token for kind in kinds.values()), rel=1e-12)
        assert traffic == sum(kind.bytes_per_token for kind in kinds.values())
        for kind in kinds.values():
            macs = kind.macs - kind.spike_macs
            picojoules = macs * 4.6 + kind.additions * 0.9 + kind.multiplications * 3.7
            assert kind.joules_per_token == pytest.approx(picojoules * 1e-12, rel=1e-12)
    assert list(energy.by_precision) == ["fp16", "int8", "int8_in_int32"]
    # At most four additions of 0.9 pJ for what one multiply-accumulate of 4.6 pJ would do.
    assert energy.student_counts_multiplied_joules_per_token > energy.student_joules_per_token


def test_the_probes_are_those_of_the_saved_student_on_the_test_windows(tiny_run, result, setting):
    student: Any = AutoModelForCausalLM.from_pretrained(tiny_run / "student").eval()
    expected = measure_information(student, setting.teacher, setting.text.test.batches, tokens=256)
    found = result.information
    assert (found.windows, found.tokens, found.classes) == (expected.windows, expected.tokens, expected.classes)
    assert [site.layer for site in found.sites] == [1, 2]
    for ours, theirs in zip(found.sites, expected.sites, strict=True):
        assert (ours.site, ours.teacher_layer) == (theirs.site, theirs.teacher_layer) == ("channel_key", ours.layer)
        for name in ("cka", "top1_accuracy", "states_r2", "binned_bits"):
            # Products of another shape round otherwise, in float32.
            assert vars(getattr(ours, name)) == pytest.approx(vars(getattr(theirs, name)), abs=1e-3)
    assert "## What the spikes carry" in (
        tiny_run.parents[2] / "reports" / "v11_1" / tiny_run.name / "report.md"
    ).read_text(encoding="utf-8")


def test_a_deep_student_is_probed_at_six_blocks_evenly_spread(monkeypatch, setting):
    asked = {}

    def measured(*_, **options):
        asked.update(options)
        raise ValueError("stop here")

    monkeypatch.setattr("asnn_goose.train.neuron_results.measure_information", measured)
    for depth, blocks in ((30, [5, 10, 15, 20, 25, 30]), (8, [1, 3, 4, 5, 7, 8]), (2, [1, 2])):
        setting.module.student.config.num_hidden_layers = depth
        probe_spikes(setting)
        assert asked["blocks"] == blocks and asked["tokens"] == 1024


@pytest.mark.parametrize(("changes", "spiking"), [
    ({"train__probe_tokens": 0}, True),
    ({"student__neuron__kind": "dense", "student__hidden_neuron__kind": "dense"}, False),
])  # fmt: skip
def test_without_a_budget_or_without_spikes_nothing_is_probed(start, tiny_experiment, changes, spiking):
    session = start(tiny_experiment("v10", student="goose", train__steps=1, **changes)).train()
    found = measure(session.setting, session.folder, session.progress, session.seen, Clock(), lambda: 1.0)
    assert (found.spikes is not None) == spiking
    assert found.information is None and found.alarms == () and "probes" not in found.seconds_by_phase


def test_too_little_text_for_the_probes_is_an_alarm_and_no_end(setting):
    first = setting.text.test.batches[0]
    few = Batch(first.input_ids[:3], first.mask[:3])
    setting.text.test = replace(setting.text.test, batches=(few,))
    information, (alarm,) = probe_spikes(setting)
    assert information is None
    assert alarm.startswith("What the spikes carry was not measured: information is measured on at least 4 windows")


def test_the_bigram_of_the_seen_tokens_knows_less_than_that_of_all_text(result):
    assert result.baselines.bigram_full_ppl < result.baselines.bigram_ppl
    assert result.baselines.bigram_full_ppl < result.baselines.unigram_ppl


def test_the_raster_is_that_of_the_prompt(tiny_run, result):
    assert result.raster is not None and result.sample is not None
    with np.load(tiny_run / result.raster.file) as arrays:
        tokens, spikes = arrays["tokens"].tolist(), arrays["spikes"]
    assert "".join(tokens) == result.sample.prompt and len(tokens) == 16
    assert spikes.shape == (16 * 4, 32) and set(np.unique(spikes)) <= {-1, 0, 1}
    assert 0.02 < np.abs(spikes).mean() < 0.9


def test_a_short_first_document_is_not_prompted_with_its_padding(setting):
    first = setting.text.validation.batches[0]
    first.mask[0, 5:] = False
    assert continue_prompt(setting).prompt == setting.teacher.tokenizer.decode(first.input_ids[0, :5])


def test_a_full_disk_leaves_no_half_student(setting, tiny_run, tmp_path, disk_with_room_for):
    folder = RunFolder(tmp_path, RunFolder.open(tiny_run).provenance)
    with disk_with_room_for(20_000), pytest.raises(UserError, match=r"student .*free some space"):
        save_model(setting.module.student, setting.teacher.tokenizer, folder)
    assert list(tmp_path.iterdir()) == []
    save_model(setting.module.student, setting.teacher.tokenizer, folder)
    assert (folder.student / "model.safetensors").is_file()


def test_a_clock_counts_what_fails_too():
    clock = Clock()
    clock.time("one", lambda: None)
    with pytest.raises(ZeroDivisionError):
        clock.time("one", lambda: 1 / 0)
    assert list(clock.seconds) == ["one"] and clock.seconds["one"] >= 0.0
