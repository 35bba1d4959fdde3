from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ssm_fast.ops import dense_scan, dispatch


def test_a_missing_triton_is_named(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("ssm_fast.kernels."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    dispatch.triton_kernel.cache_clear()
    with pytest.raises(
        RuntimeError, match="dense_scan on a GPU needs Triton, which is not installed"
    ):
        dispatch.triton_kernel("dense_scan", "dense_scan")


@pytest.mark.parametrize(("version", "is_old"), [("3.4.0", True), ("3.5.0+git1", False)])
def test_an_old_triton_is_named(monkeypatch, version, is_old):
    launcher = object()
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "ssm_fast.kernels.gae", SimpleNamespace(gae=launcher))
    dispatch.triton_kernel.cache_clear()
    expected = pytest.raises(RuntimeError, match=r"gae needs Triton 3\.5 or newer, got 3\.4\.0")
    with expected if is_old else nullcontext():
        assert dispatch.triton_kernel("gae", "gae") is launcher
    dispatch.triton_kernel.cache_clear()


def test_the_interpreter_needs_its_variable(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="only with TRITON_INTERPRET=1"), dispatch.interpreter():
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not interpreted")
def test_impl_triton_takes_tensors_of_the_cpu_inside_the_interpreter_alone(monkeypatch):
    pytest.importorskip("triton")
    from ssm_fast.kernels import dense_scan as kernels

    launched = []
    monkeypatch.setattr(kernels, "launch", lambda pass_, *_: launched.append(pass_))
    u, A = torch.zeros(1, 2, 3), torch.zeros(3, 3)
    with dispatch.interpreter():
        dense_scan(u, A, impl="triton")
        with pytest.raises(ValueError, match="impl='native' of dense_scan cannot run on cpu"):
            dense_scan(u, A, impl="native")
    assert launched == ["whole"]
    with pytest.raises(ValueError, match="impl='triton' of dense_scan cannot run on cpu"):
        dense_scan(u, A, impl="triton")
