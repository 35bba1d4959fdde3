from __future__ import annotations

import sys

import pytest
import torch

from ssm_fast.ops import dispatch

OPS = ("dense_scan", "norm_scan", "linear_scan", "output_norm", "gae")

MARGIN = 4096


@pytest.fixture
def device():
    """A device whose tensors run through Triton: a GPU, or the CPU with Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with dispatch.interpreter():
        yield torch.device("cpu")


@pytest.fixture(params=["native", "reference", "triton"])
def backend(request, monkeypatch):
    """A device for each backend in turn, on which the ops run through it."""
    if request.param == "triton":
        return request.getfixturevalue("device")
    assert not dispatch._interpreting
    if request.param == "native":
        return torch.device("cpu")
    for op in OPS:
        module = sys.modules[f"ssm_fast.ops.{op}"]
        monkeypatch.setattr(module, "choose", lambda *_: "reference")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def canaries(request, monkeypatch):
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
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    assert buffers or "reference" in request.node.name
    for buffer in buffers:
        margins = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
        assert (
            margins.isnan() if buffer.is_floating_point() or buffer.is_complex() else margins == 1
        ).all()
