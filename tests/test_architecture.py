"""What the layout promises: the direction of imports, the length of files, and a silent library."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "asnn_goose").rglob("*.py"))


def lengths(paths: list[Path]) -> dict[str, int]:
    return {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}


def test_imports_go_the_allowed_way():
    # In a process of its own: import-linter configures logging, which switches off every logger that exists already.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_files_of_the_library_have_one_job():
    assert {path: lines for path, lines in lengths(PACKAGE).items() if lines > 350} == {}


def test_experiments_are_thin():
    experiments = lengths(sorted((ROOT / "experiments").glob("*.py")))
    assert {path: lines for path, lines in experiments.items() if lines > 60} == {}


def test_only_the_command_line_prints():
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PACKAGE
        if path.name != "cli.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


BLOCKED = """
import sys
import torch
for name in ("triton", "transformers", "numba", "fla"):
    sys.modules[name] = None
import asnn_goose
import asnn_goose.kernels
y = asnn_goose.kernels.wkv7(*[torch.zeros(1, 9, 1, 4, dtype=torch.float64)] * 6)
s = asnn_goose.kernels.lif(torch.zeros(2, 3, dtype=torch.float64), threshold=1.0, decay=1.0)
"""


def test_the_kernels_import_and_run_without_their_compilers():
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
