"""Hand-made records: small, whole, and each with what a test says of it."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from asnn_goose.config import load_experiment
from asnn_goose.reporting.comparison import FinishedRun
from asnn_goose.reporting.record import Result

TEACHER = 30.0


def _record(
    version: str = "v10",
    *flags: str,
    scale: str = "ladder",
    seed: int = 0,
    ppl: float = 300.0,
    tokens: int = 65_536,
    wall: float = 300.0,
    zero: float | None = 0.65,
    rate: float = 0.2,
) -> FinishedRun:
    argv = [f"--scale={scale}", f"--seed={seed}", f"--train.tokens={tokens}", "--student=goose", *flags]
    experiment = load_experiment("v10", argv).experiment.model_copy(update={"version": version})
    shares = {"rate": rate, "zero_fraction": zero, "operand_fraction": 1.0}
    shares |= {"dead_fraction": 0.0, "saturated_fraction": 0.0, "per_layer": ()}
    tree = {
        "run_id": f"{scale}-s{seed}-{ppl:g}-{tokens}", "version": version, "parent": None, "seed": seed,
        "fingerprint": "0" * 64, "scale": scale, "started": datetime(2026, 11, 22, tzinfo=UTC), "steps": tokens // 512,
        "tokens_seen": tokens, "wall_seconds": wall, "tokens_per_second": 400.0, "peak_memory_bytes": 1,
        "teacher": {"name": "smollm2", "test_ppl": TEACHER},
        "student": {"test_ppl": ppl, "val_ppl": ppl, "bits_per_byte": 1.0, "parameters": 1},
        "ratio_to_teacher": ppl / TEACHER, "kl_to_teacher": 1.0, "top1_agreement": 0.3, "knowledge_retention": 0.3,
        "evaluation": {"validation_tokens": 32_640, "test_tokens": 65_280},
        "baselines": {"unigram_ppl": 1e3, "bigram_ppl": 6e2, "bigram_full_ppl": 3e2},
        "spikes": None if zero is None else shares,
    }  # fmt: skip
    return FinishedRun(Path(), Result.model_validate(tree), experiment)


@pytest.fixture(scope="session")
def record() -> Callable[..., FinishedRun]:
    """A finished run under a version's name, with v10's settings and the student goose; more flags change them."""
    return _record
