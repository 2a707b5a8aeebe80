"""The rule for bfloat16, against what the kernel says of the processor."""

import platform
from pathlib import Path

import pytest
import torch

from asnn_goose.config import hardware
from asnn_goose.config.hardware import native_bfloat16


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_cpu_rule_agrees_with_the_flags_of_the_kernel():
    words = set(Path("/proc/cpuinfo").read_text().split())
    if platform.machine() == "aarch64":
        wanted = {"bf16", "svebf16"}
    else:
        wanted = {"amx_bf16"} if "GenuineIntel" in words else {"avx512_bf16", "amx_bf16"}
    assert native_bfloat16() is bool(words & wanted)


@pytest.mark.parametrize(
    ("vendor", "capabilities", "expected"),
    [
        ("GenuineIntel", {"avx512_bf16": True, "amx_bf16": False}, False),
        ("GenuineIntel", {"avx512_bf16": True, "amx_bf16": True}, True),
        ("AuthenticAMD", {"avx512_bf16": True}, True),
        ("AuthenticAMD", {"avx512_bf16": False}, False),
    ],
)
def test_half_rate_dot_products_are_not_chosen(
    vendor: str, capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(hardware, "CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert native_bfloat16.__wrapped__() is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there_has_no_bfloat16():
    assert native_bfloat16("cuda") is False
    assert native_bfloat16("meta") is False
