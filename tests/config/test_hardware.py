"""The rule for bfloat16, against what the kernel says of the processor."""

import platform
from pathlib import Path

import pytest
import torch

from asnn_goose.config.hardware import native_bfloat16


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_cpu_rule_agrees_with_the_flags_of_the_kernel():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    wanted = {"x86_64": {"avx512_bf16", "amx_bf16"}, "aarch64": {"bf16", "svebf16"}}[platform.machine()]
    assert native_bfloat16() is bool(flags & wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there_has_no_bfloat16():
    assert native_bfloat16("cuda") is False
    assert native_bfloat16("meta") is False
