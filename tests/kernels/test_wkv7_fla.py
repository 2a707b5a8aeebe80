"""The bridge to flash-linear-attention, whose kernels need a GPU: a stand-in does the sums in its conventions."""

import sys
from types import ModuleType

import pytest
import torch

from asnn_goose.kernels import backend
from asnn_goose.kernels.wkv7 import wkv7_backend
from asnn_goose.kernels.wkv7.fla import wkv7_fla
from tests.kernels.test_wkv7 import inputs, run


def chunk_rwkv7(r, w, k, v, a, b, *, scale, initial_state, output_final_state):
    """h [K, V] <- diag(exp w) h + b (a^T h) + k v^T, y = scale h^T r, as fla's documentation has it."""
    assert output_final_state and scale == 1.0
    h, outputs = initial_state, []
    for t in range(r.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], h)
        h = (
            w[:, t].exp()[..., None] * h
            + b[:, t][..., None] * read[:, :, None]
            + k[:, t][..., None] * v[:, t][:, :, None]
        )
        outputs.append(torch.einsum("bhkv,bhk->bhv", h, r[:, t]))
    return torch.stack(outputs, 1), h


def test_state_and_arguments_are_turned_to_flas_conventions(monkeypatch: pytest.MonkeyPatch):
    names = ("fla", "fla.ops", "fla.ops.rwkv7")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.rwkv7"].chunk_rwkv7 = chunk_rwkv7  # pyright: ignore[reportAttributeAccessIssue]
    tensors = inputs(2, 9, 3, 8, dtype=torch.float32)
    wanted = run([x.double() for x in tensors], backend="reference")
    for found, exact in zip(wkv7_fla(*tensors), wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_auto_takes_it_for_half_precision_alone(monkeypatch: pytest.MonkeyPatch):
    """Its products of float32 run in TF32."""
    monkeypatch.setattr(backend, "find_spec", lambda package: package)
    cuda = torch.device("cuda")
    chosen = {
        dtype: wkv7_backend("auto", cuda, dtype, tokens=256)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    }
    assert list(chosen.values()) == ["fla", "fla", "torch_chunk", "torch_chunk"]
    assert wkv7_backend("auto", cuda, torch.bfloat16, tokens=256, diagonal=True) == "torch_chunk"
    assert wkv7_backend("fla", cuda, torch.float32, tokens=256) == "fla"
