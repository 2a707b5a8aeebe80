"""What the processor can do, asked at run time."""

from functools import cache


@cache
def native_bfloat16(device: str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, so that "auto" dtypes choose it.

    CPU: the AVX-512 or AMX bfloat16 dot product on x86-64, the BF16 extension on ARM; without them PyTorch converts
    each operand and is slower than in float32. CUDA: compute capability 8.0 or later, any ROCm card. Others: no.

    Args:
        device: as ``torch.device`` takes it.
    """
    import torch  # asnn_goose.config stays importable in an instant

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False
