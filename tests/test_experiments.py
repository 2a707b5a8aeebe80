"""Every experiment has a script that dry-runs, and one of them is really run, with the real teacher and corpus."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from transformers import AutoModelForCausalLM, AutoTokenizer

from asnn_goose.config import (
    experiment_names,
    load_classifier_dump,
    load_classifier_experiment,
    load_dump,
    load_experiment,
)
from asnn_goose.config.load import CLASSIFICATION, CONFIGS
from asnn_goose.reporting import load_result, read_metrics

REPOSITORY = Path(__file__).parents[1]
EXPERIMENTS = REPOSITORY / "experiments"
CLASSIFIERS = experiment_names(CONFIGS / CLASSIFICATION)

PROMISED = {
    "": "version parent seed fingerprint scale tokens_seen wall_seconds tokens_per_second peak_memory_bytes "
    "ratio_to_teacher kl_to_teacher top1_agreement knowledge_retention",
    "teacher": "name test_ppl",
    "student": "test_ppl val_ppl bits_per_byte parameters",
    "baselines": "unigram_ppl bigram_ppl bigram_full_ppl",
    "spikes": "rate zero_fraction operand_fraction dead_fraction saturated_fraction per_layer",
    "energy": "student_joules_per_token teacher_joules_per_token by_kind",
}
"""Names of result.json that other code may rely on, by the branch that they hang on."""


def call(script: Path, *flags: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a script from another working directory; runs and reports go below ``folder``."""
    places = {"ASNN_GOOSE_RUNS": str(folder / "runs"), "ASNN_GOOSE_REPORTS": str(folder / "reports")}
    command = [sys.executable, str(script), *flags]
    user = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TRITON_INTERPRET")}
    return subprocess.run(command, cwd=folder, env=user | places, capture_output=True, text=True, timeout=1800)


def test_every_experiment_has_one_short_script():
    scripts = {path.stem: path for path in EXPERIMENTS.glob("*.py") if path.stem != "roadmap"}
    assert sorted(scripts) == sorted(experiment_names() + CLASSIFIERS)
    for name, path in scripts.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60 and f'main("{name}")' in text, name
        assert text.startswith('"""') and "Parent: " in text, name


@pytest.mark.parametrize("name", experiment_names() + CLASSIFIERS)
def test_every_experiment_dry_runs_from_anywhere(name, tmp_path):
    done = call(EXPERIMENTS / f"{name}.py", "--scale=smoke", "--seed=3", "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    plan, _, dumped = done.stdout.partition("\n\n")
    flags = ["--scale=smoke", "--seed=3"]
    if name in CLASSIFIERS:
        expected, read = load_classifier_experiment(name, flags).experiment, load_classifier_dump(dumped)
    else:
        expected, read = load_experiment(name, flags).experiment, load_dump(dumped)
    assert read == expected
    assert plan.startswith(f"{expected.version}: {expected.question}\nchange: {expected.change}\n")
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Smoke:
    """What the one real run left."""

    done: subprocess.CompletedProcess
    run: Path
    report: Path


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """``experiments/v11_1.py --scale smoke`` as a user starts it, with the teacher and corpus of the shared cache."""
    folder = tmp_path_factory.mktemp("a user's folder")
    run = folder / "my run"
    done = call(EXPERIMENTS / "v11_1.py", "--scale", "smoke", "--run-dir", str(run), folder=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    (report,) = (folder / "reports" / "v11_1").glob("*/report.md")
    return Smoke(done, run, report)


@pytest.mark.slow
class TestTheRealRun:
    """The default teacher, the default corpus and eight optimiser steps, from the command to the report."""

    def test_the_result_has_every_promised_name(self, smoke: Smoke):
        tree = json.loads((smoke.run / "result.json").read_text())
        for branch, names in PROMISED.items():
            for name in names.split():
                assert (tree[branch] if branch else tree)[name] not in (None, {}, [], ""), f"{branch}.{name}"

    def test_the_numbers_are_possible(self, smoke: Smoke):
        result = load_result(smoke.run / "result.json")
        assert (result.version, result.parent, result.scale, result.seed) == ("v11_1", "v10", "smoke", 0)
        assert (result.steps, result.tokens_seen, result.teacher.name) == (8, 4096, "smollm2")
        # The teacher reads news as a model of 135 M parameters does; the student has seen 4,096 tokens.
        assert 20 < result.teacher.test_ppl < 60 < result.student.test_ppl
        low, high = result.student.test_ppl_low, result.student.test_ppl_high
        assert low is not None and high is not None and low < result.student.test_ppl < high
        assert result.baselines.bigram_full_ppl < result.baselines.unigram_ppl < 49_152
        assert result.spikes is not None and result.energy is not None
        assert 0.02 < result.spikes.rate < 0.6 and result.spikes.operand_fraction == 1.0
        assert 0 < result.energy.student_joules_per_token < result.energy.teacher_joules_per_token
        assert result.temperature_final is not None and 1.0 < result.temperature_final < 5.0

    def test_metrics_have_a_step_and_every_loss(self, smoke: Smoke):
        lines = read_metrics(smoke.run / "metrics.jsonl")
        steps = [line for line in lines if "loss_total" in line]
        assert [line["step"] for line in steps] == list(range(1, 9))
        losses = {f"loss_{name}_{kind}" for name in ("ce", "forward_kl") for kind in ("raw", "weighted")}
        assert all(losses | {"temperature", "temperature_lambda", "grad_norm", "lr"} <= line.keys() for line in steps)
        assert [line["step"] for line in lines if "val_ppl" in line] == [4, 8]
        assert all(np.isfinite([value for value in line.values()]).all() for line in lines)

    def test_the_report_is_there_with_its_figures(self, smoke: Smoke):
        text = smoke.report.read_text(encoding="utf-8")
        result = load_result(smoke.run / "result.json")
        assert text.startswith("# v11_1: scale smoke, seed 0\n") and f"{result.teacher.test_ppl:.2f}" in text
        figures = sorted(smoke.report.parent.glob("*.png"))
        assert {path.stem for path in figures} >= {
            "perplexity",
            "losses",
            "temperature",
            "optimiser",
            "spikes",
            "raster",
        }
        for path in figures:
            pixels = image.imread(path)[..., :3]
            assert f"]({path.name})" in text and min(pixels.shape[:2]) > 100
            assert pixels.std() > 0.01 and len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 8, path.name

    def test_the_student_is_an_ordinary_model(self, smoke: Smoke):
        student: Any = AutoModelForCausalLM.from_pretrained(smoke.run / "student").eval()
        tokenizer = AutoTokenizer.from_pretrained(smoke.run / "student")
        ids = tokenizer("The minister said on", return_tensors="pt").input_ids
        with torch.no_grad():
            out = student.generate(ids, max_new_tokens=4, do_sample=False)
        assert out.shape == (1, ids.shape[1] + 4)
        assert sum(p.numel() for p in student.parameters()) == load_result(smoke.run / "result.json").student.parameters

    def test_the_terminal_shows_progress_and_ends_with_the_report(self, smoke: Smoke):
        lines = smoke.done.stderr.strip().split("\n")
        assert lines[0] == "v11_1: loading libraries"
        assert sum(line.startswith("step ") for line in lines) == 8
        others = [line for line in lines if not line.startswith("step ")]
        assert len(others) <= 14 and not any("\r" in line or "Warning" in line for line in others), others
        assert smoke.done.stdout.rstrip().split("\n")[-1].startswith(f"report: {smoke.report}")

    def test_nothing_else_was_written(self, smoke: Smoke):
        assert {path.name for path in smoke.run.iterdir()} == {
            "config.yaml", "provenance.json", "metrics.jsonl", "checkpoints", "result.json", "raster.npz", "student",
        }  # fmt: skip
        provenance = json.loads((smoke.run / "provenance.json").read_text())
        assert provenance["argv"][:4] == ["python", "experiments/v11_1.py", "--scale", "smoke"]
