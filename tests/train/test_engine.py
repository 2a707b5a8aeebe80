"""Devices and dtypes, and two processes that do the work of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asnn_goose.config.hardware import native_bfloat16
from asnn_goose.config.schema import TrainConfig
from asnn_goose.errors import UserError
from asnn_goose.train.checkpoint import NAME
from asnn_goose.train.engine import Engine, resolve_device, resolve_precision

REPOSITORY = Path(__file__).parents[2]


def test_automatic_choices_follow_the_hardware():
    there = torch.cuda.is_available()
    assert resolve_device("auto") == ("cuda" if there else "cpu") and resolve_device("cpu") == "cpu"
    assert resolve_precision("auto", "cpu") == ("bfloat16" if native_bfloat16("cpu") else "float32")
    assert [resolve_precision(name, "cpu") for name in ("bfloat16", "float32")] == ["bfloat16", "float32"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match=r"train\.device is cuda, but torch sees no CUDA device: set train\.device"):
        Engine(TrainConfig(scale="smoke", tokens=1, device="cuda"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_process_is_quiet_and_alone(precision, capfd):
    engine = Engine(TrainConfig(scale="smoke", tokens=1, device="cpu", precision=precision))
    engine.launch()
    assert (engine.rank, engine.world_size, engine.device.type) == (0, 1, "cpu")
    assert engine.sum(0.1) == 0.1
    assert capfd.readouterr() == ("", "")


def run(flags: list[str]) -> str:
    """Run v11_1 in processes of its own, one thread each; returns stderr."""
    command = [sys.executable, str(REPOSITORY / "experiments" / "v11_1.py"), *flags]
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_two_processes_give_the_parameters_of_one(start, tiny_experiment, tiny_flags, tmp_path):
    """One process that accumulates two micro-batches reads the same windows per step as two with one each.

    Neurons are dense: the two sum their gradients in another order, and a spike that flips on such a rounding would
    make a difference of its own.
    """
    flags: dict[str, object] = {
        "train__steps": 3,
        "student__neuron__kind": "dense",
        "student__hidden_neuron__kind": "dense",
        "distillation__temperature__lambda_start": 0.0,
        "distillation__temperature__init": 3.0,
        "distillation__temperature__lr": 1.0,
    }
    one = start(tiny_experiment(**flags, train__accumulate=2)).train()
    two = tmp_path / "two processes"
    told = run([*tiny_flags(**flags, train__devices=2), f"--run-dir={two}"])
    saved = torch.load(two / "checkpoints" / NAME, weights_only=False)
    expected = {name: p.detach() for name, p in one.setting.module.named_parameters() if p.requires_grad}
    assert saved["parameters"].keys() == expected.keys()
    # Adam divides by the gradient's own size, so a parameter whose gradient is as small as its rounding may go either
    # way; three steps of 5e-4 are 1.5e-3.
    for name, parameter in expected.items():
        torch.testing.assert_close(saved["parameters"][name], parameter, rtol=1e-4, atol=2e-5, msg=f"{name} differs")
    assert saved["progress"]["tokens"] == one.progress.tokens == 3 * 2 * 2 * 16
    assert saved["parts"]["windows"] == one.setting.windows.state_dict()
    # The second process repeats nothing, and the engine says nothing.
    assert told.count("loading libraries") == told.count("step 3/3") == 1
    assert "distributed" not in told.lower() and "rank" not in told.lower()
