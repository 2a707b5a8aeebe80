"""Made-up runs: complete files with small, plausible numbers."""

import hashlib
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asnn_goose.config.load import dump
from asnn_goose.config.schema import Experiment
from asnn_goose.reporting import Result, RunFolder, collect_provenance

START = datetime(2026, 11, 22, 9, 30, 12, tzinfo=UTC)
TOKENS_PER_STEP = 1024


def _experiment(changes: dict[str, Any]) -> Experiment:
    tree: dict[str, Any] = {
        "version": "child",
        "parent": "base",
        "question": "Does the change help?",
        "change": "The temperature is learned.",
        "seed": 0,
        "teacher": {},
        "student": {},
        "distillation": {
            "losses": {"ce": {"weight": 0.3}, "forward_kl": {"weight": 0.7}},
            "temperature": {"mode": "learned"},
        },
        "data": {},
        "train": {"scale": "cpu", "tokens": 20 * TOKENS_PER_STEP},
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return Experiment.model_validate(tree)


def _result_tree() -> dict[str, Any]:
    sites = [
        {
            "layer": layer,
            "site": site,
            "rate": 0.1 + 0.02 * layer,
            "zero_fraction": 0.61,
            "dead_fraction": 0.013,
            "saturated_fraction": 0.004,
            "threshold": 2.4,
            "decay": 0.97,
        }
        for layer in (1, 2)
        for site in ("receptance", "channel_value")
    ]
    return {
        "run_id": "20261122-093012-s0-0123abcd",
        "version": "child",
        "parent": "base",
        "seed": 0,
        "fingerprint": "0123abcd" * 8,
        "scale": "cpu",
        "started": START,
        "steps": 20,
        "tokens_seen": 20 * TOKENS_PER_STEP,
        "wall_seconds": 523.0,
        "seconds_by_phase": {"training": 411.0, "test": 71.5},
        "tokens_per_second": 441.2,
        "peak_memory_bytes": 2_912_000_000,
        "teacher": {
            "name": "smollm2",
            "test_ppl": 35.48,
            "val_ppl": 36.12,
            "bits_per_byte": 1.093,
            "parameters": 134_515_008,
        },
        "student": {
            "test_ppl": 421.3,
            "val_ppl": 433.6,
            "bits_per_byte": 1.863,
            "parameters": 47_210_000,
            "trained_parameters": 18_930_000,
            "test_ppl_low": 407.8,
            "test_ppl_high": 436.1,
        },
        "ratio_to_teacher": 421.3 / 35.48,
        "kl_to_teacher": 2.3145,
        "top1_agreement": 0.2213,
        "knowledge_retention": 0.4312,
        "evaluation": {"validation_tokens": 32_640, "test_tokens": 65_280, "test_windows": 256},
        "baselines": {"unigram_ppl": 1205.3, "bigram_ppl": 564.9, "bigram_full_ppl": 245.2},
        "spikes": {
            "rate": 0.243,
            "zero_fraction": 0.527,
            "operand_fraction": 0.968,
            "dead_fraction": 0.0043,
            "saturated_fraction": 0.0071,
            "per_layer": sites,
        },
        "information": {
            "windows": 17, "tokens": 4079, "held_out_tokens": 1019, "classes": 256, "coverage": 0.6549,
            "majority": 0.1602,
            "sites": [
                {
                    "layer": layer, "site": "receptance", "teacher_layer": 15 * layer,
                    "cka": {"value": 0.2 + 0.1 * layer, "shuffled": -0.0003},
                    "top1_accuracy": {"value": 0.25 + 0.05 * layer, "shuffled": 0.1534},
                    "states_r2": {"value": 0.41 - 0.1 * layer, "shuffled": -0.0113},
                    "binned_bits": {"value": 0.03 * layer, "shuffled": 0.0112},
                    "binned_bias_bits": 0.0108 * layer,
                }
                for layer in (1, 2)
            ],
        },
        "energy": {
            "student_joules_per_token": 1.53e-4,
            "teacher_joules_per_token": 6.19e-4,
            "by_kind": {
                "mixer_matrices": {
                    "macs": 15.9e6, "spike_macs": 15.4e6, "operations": 13.1e6, "joules_per_token": 1.18e-5,
                    "additions": 12.6e6, "multiplications": 2e4, "bytes_per_token": 3.18e7,
                },
                "head": {"macs": 28.3e6, "spike_macs": 1e6, "operations": 28.1e6, "joules_per_token": 1.3e-4},
            },
            "picojoules": {"multiply_accumulate": 4.6, "multiplication": 3.7, "addition": 0.9},
            "teacher_by_kind": {
                "attention": {"macs": 2.9e6, "spike_macs": 0.0, "operations": 3.1e6, "joules_per_token": 1.4e-5},
            },
            "by_precision": {
                "int8": {
                    "multiplication_picojoules": 0.2, "addition_picojoules": 0.03,
                    "student_joules_per_token": 7.1e-6, "teacher_joules_per_token": 3.1e-5,
                },
            },
            "student_counts_multiplied_joules_per_token": 1.61e-4,
            "student_bytes_per_token": 9.5e7,
            "teacher_bytes_per_token": 2.69e8,
            "dram_picojoules_per_byte": (162.5, 325.0),
        },
        "temperature_final": 1.58,
        "sample": {"prompt": "The bank said", "student": " the year ```` of it.", "teacher": " it would wait."},
        "raster": None,
        "alarms": ("Step 7 was skipped: its gradient was not finite.",),
        "schedule_notes": ("Learning rate: one step of warm-up, then a cosine.",),
    }  # fmt: skip


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    branch: Any = tree
    for part in path:
        branch = branch[int(part) if isinstance(branch, list) else part]
    branch[int(last) if isinstance(branch, list) else last] = value


COMMIT = "c0ffee00" * 5


@pytest.fixture(scope="session")
def make_experiment() -> Callable[..., Experiment]:
    """Experiment with some dotted keys set."""
    return lambda changes=None: _experiment(changes or {})


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Result]:
    """Result with some dotted keys set."""

    def make(changes: dict[str, Any] | None = None) -> Result:
        tree = _result_tree()
        for key, value in (changes or {}).items():
            _set(tree, key, value)
        return Result.model_validate(tree)

    return make


@pytest.fixture(scope="session")
def make_run(make_result: Callable[..., Result]) -> Callable[..., RunFolder]:
    """Finished run on disk; `hours` tells runs apart in time."""

    def make(
        root: Path,
        settings: dict[str, Any] | None = None,
        results: dict[str, Any] | None = None,
        hours: int = 0,
        overrides: dict[str, Any] | None = None,
    ) -> RunFolder:
        experiment = _experiment(settings or {})
        started = START + timedelta(hours=hours)
        provenance = collect_provenance(
            experiment, "0123abcd" * 8, argv=["x.py"], overrides=overrides or {}, started=started
        )
        # Not that of the checkout, which may hold changes.
        provenance = provenance.model_copy(update={"commit": COMMIT, "dirty": False})
        folder = RunFolder.create(root, experiment, dump(experiment), provenance)
        for step in range(0, 20, 2):
            ce = 6.0 + 4.0 / (1 + step)
            folder.log(
                step, lr=1e-3, loss_total=1.7 * ce, loss_ce_raw=ce, loss_ce_weighted=0.3 * ce, grad_norm=1.0 + ce,
                loss_forward_kl_raw=2 * ce, loss_forward_kl_weighted=1.4 * ce, temperature=2.0 - 0.02 * step,
                temperature_lambda=step / 20, temperature_gradient=-0.1, loss_anchor=1e-5 * step**2,
            )  # fmt: skip
            if step % 6 == 0:
                folder.log(step, val_ppl=float(np.exp(ce)), easy_ce=ce - 1.0, hard_ce=ce + 1.0)
        rng = np.random.default_rng(0)
        raster = folder.write_raster(1, "key", ["The", " $", " bank"], rng.integers(-1, 2, size=(12, 40)))
        identity = {
            "run_id": folder.run_id,
            "version": experiment.version,
            "parent": experiment.parent,
            "seed": experiment.seed,
            "scale": experiment.train.scale,
            "started": started,
            "raster": raster.model_dump(),
        }
        folder.write_result(make_result(identity | (results or {})))
        return folder

    return make


@pytest.fixture
def record(make_run: Callable[..., RunFolder], tmp_path: Path) -> Callable[..., Path]:
    """Write the records of a run below `tmp_path`; the teacher stands at 40, the interval reaches 5 % to both sides."""
    clock = itertools.count()

    def write(
        version: str,
        seed: int,
        ppl: float,
        parent: str = "base",
        settings: dict[str, Any] | None = None,
        results: dict[str, Any] | None = None,
        hours: int | None = None,
    ) -> Path:
        experiment = {
            "version": version,
            "parent": None if version == "base" else parent,
            "seed": seed,
            "change": f"What {version} changes.",
        }
        measured = {
            "student.test_ppl": ppl,
            "student.test_ppl_low": 0.95 * ppl,
            "student.test_ppl_high": 1.05 * ppl,
            "teacher.test_ppl": 40.0,
            "ratio_to_teacher": ppl / 40.0,
            "kl_to_teacher": 2.5,
            "fingerprint": hashlib.sha256(f"{version} {seed} {ppl} {settings}".encode()).hexdigest(),
        }
        at = next(clock) if hours is None else hours
        return make_run(tmp_path, experiment | (settings or {}), measured | (results or {}), hours=at).path

    return write


@pytest.fixture
def small_ladder(record: Callable[..., Path], tmp_path: Path) -> Path:
    """reports/ with two seeds of base and child, without any spread, and one of the A/A check."""
    for seed in (0, 1):
        record("base", seed, 400.0)
        record("child", seed, 200.0, settings={"distillation.losses.ce.weight": 0.5})
    record("aa", 5, 420.0)
    return tmp_path
