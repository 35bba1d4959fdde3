from __future__ import annotations

import pytest
import torch

from ssm_fast.ops.backend import interpreter

MARGIN = 4096


@pytest.fixture
def device():
    """A device whose tensors run through Triton: a GPU, or the CPU with Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with interpreter():
        yield torch.device("cpu")


@pytest.fixture
def canaries(device, monkeypatch):
    """Poison every output with NaN and check afterwards that nothing was written around it."""
    buffers = []
    new_empty = torch.Tensor.new_empty

    def guarded(self, *shape, dtype=None, **_):
        shape = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        dtype = dtype or self.dtype
        poison = float("nan") if dtype.is_floating_point or dtype.is_complex else 1
        buffer = new_empty(self, shape.numel() + 2 * MARGIN, dtype=dtype).fill_(poison)
        buffers.append(buffer)
        return buffer[MARGIN : MARGIN + shape.numel()].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    monkeypatch.setattr(
        torch, "empty_like", lambda x, dtype=None: guarded(x, x.shape, dtype=dtype or x.dtype)
    )
    yield
    monkeypatch.undo()
    assert buffers
    for buffer in buffers:
        margins = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
        assert (
            margins.isnan() if buffer.is_floating_point() or buffer.is_complex() else margins == 1
        ).all()
