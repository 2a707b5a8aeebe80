"""What the processor can do, asked at run time."""

from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def _is_intel() -> bool:
    return CPUINFO.exists() and "GenuineIntel" in CPUINFO.read_text()


@cache
def native_bfloat16(device: str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones, so that "auto" dtypes choose it.

    CPU: AMX, the BF16 extension on ARM, or AVX-512's bfloat16 dot product unless the processor is Intel's: there it
    starts once a cycle where the float32 multiply-add starts twice, and PyTorch reaches half the speed of float32
    (165 against 305 GFLOP/s on two cores of an Emerald Rapids without AMX). CUDA: compute capability 8.0 or later, any
    ROCm card. Others: no.

    Args:
        device: as ``torch.device`` takes it.
    """
    import torch  # asnn_goose.config stays importable in an instant

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        full_rate_avx512 = capabilities.get("avx512_bf16", False) and not _is_intel()
        return full_rate_avx512 or any(capabilities.get(name, False) for name in ("amx_bf16", "bf16"))
    return False
