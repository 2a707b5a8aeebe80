"""What the tests of Triton's kernels share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
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


COMPILE = """
import importlib, json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
module, kernels, types, options = json.loads({told!r})
for name, constants in kernels:
    kernel = getattr(importlib.import_module(module), name)
    known = {{key: value for key, value in constants.items() if key in kernel.arg_names}}
    signature = {{argument: types.get(argument, "*fp32") for argument in kernel.arg_names}}
    signature |= dict.fromkeys(known, "constexpr")
    for capability in (80, 90):
        source = ASTSource(fn=kernel, signature=signature, constexprs=known)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx = built.asm["ptx"]
        assert f".target sm_{{capability}}" in ptx and len(built.asm["cubin"]) > 0
        print(name, capability, "fma.rn.f32" in ptx)
"""


@pytest.fixture
def compiled(without_interpreter: Callable[[str], list[str]]) -> Callable[..., list[str]]:
    """Compiles kernels for two GPUs that need not be there; lines of name, capability, whether it multiplies and adds
    at once."""

    def run(module: str, kernels: Sequence[tuple[str, dict]], types: dict[str, str], **options: object) -> list[str]:
        """``kernels``: name and constants, of which a kernel takes those it knows; ``types``: of arguments that are no
        *fp32; ``options``: of the compiler."""
        return without_interpreter(COMPILE.format(told=json.dumps([module, kernels, types, options])))

    return run
