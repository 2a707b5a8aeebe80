"""What the tests of Triton's kernels share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def without_interpreter(tmp_path: Path) -> Callable[[str], list[str]]:
    """Runs Python code in a process in which Triton compiles, with a cache of its own; the lines that it prints."""

    def run(code: str) -> list[str]:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run
