"""Freed memory stays with the process: page faults counted by the kernel."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from asnn_goose.train.memory import keep_freed_memory
assert {kept} is False or keep_freed_memory()
def once():
    return torch.ones(12 * 2**20)
# Aligned blocks move upwards a few times before they find their place.
for _ in range(20):
    once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_the_same_tensor_again_costs_no_page_faults():
    faults = {}
    for kept in (False, True):
        command = [sys.executable, "-c", FAULTS.format(kept=kept)]
        faults[kept] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    # 48 MiB are 12,288 pages, or 24 huge ones; glibc always maps anew what is above 32 MiB.
    assert faults[False] >= 10 * 24
    assert faults[True] <= 10
