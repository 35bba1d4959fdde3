"""Which code runs a call: the compiled module, a Triton kernel or torch, through the dispatcher or not."""

from __future__ import annotations

import importlib
import os
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch  # before _native: the compiled module uses the OpenMP runtime that torch has loaded
from torch import Tensor
from torch.torch_version import TorchVersion

from ssm_fast._torch import (
    forward_mode_is_active,
    forward_modes_are_nested,
    is_plain,
    is_watched,
    transforms_are_active,
)

try:
    import ssm_fast._native as native
except ModuleNotFoundError as error:
    if error.name != "ssm_fast._native":
        raise
    raise ModuleNotFoundError(
        "ssm_fast._native, the compiled module, is missing: this is the source tree. "
        "Install it with `pip install .` and import it from another folder, or use `pip install -e .`",
        name=error.name,
    ) from error

# The first call of a thread lets torch apply `torch.set_num_threads` to OpenMP there.
native.on_new_thread(torch.get_num_threads)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Impl = Literal["auto", "native", "triton", "reference"]
IMPLS = ("auto", "native", "triton", "reference")

LIBRARY = torch.library.Library("ssm_fast", "DEF")

_OLDEST_TRITON = "3.5"  # those before do not run every kernel in every dtype
REAL = {torch.float32: "float32", torch.float64: "float64"}
HALF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}  # the Triton kernels alone
COMPLEX = {torch.complex64: "complex64", torch.complex128: "complex128"}


def native_kernel(op: str, dtype: torch.dtype) -> Any:
    """The compiled function of ``op`` for ``dtype``.

    Raises:
        TypeError: There is none.
    """
    kernel = getattr(native, f"{op}_{(REAL | COMPLEX).get(dtype)}", None)
    if kernel is None:
        raise TypeError(f"{op} has no kernel for {dtype}")
    return kernel


_interpreting = False


def is_interpreting() -> bool:
    """Whether CPU tensors go through the Triton kernels, in an `interpreter`."""
    return _interpreting


@contextmanager
def interpreter() -> Iterator[None]:
    """Run the ops of CPU tensors through the Triton kernels while the context is open.

    Triton's interpreter executes the kernels on the CPU, for tests without a GPU; gradients and
    transforms go through the kernels as well.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not set before the kernels were imported.
    """
    global _interpreting
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the Triton kernels run on the CPU only with TRITON_INTERPRET=1 set")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


@cache
def triton_kernel(op: str, module: str) -> Callable[..., Any]:
    """The launcher of ``op``, from ``ssm_fast.kernels``; Triton is imported here and no earlier.

    Raises:
        RuntimeError: Triton is not installed, or too old.
    """
    try:
        import triton

        if TorchVersion(triton.__version__) < _OLDEST_TRITON:
            raise RuntimeError(
                f"{op} needs Triton {_OLDEST_TRITON} or newer, got {triton.__version__}"
            )
        return getattr(importlib.import_module(f"ssm_fast.kernels.{module}"), op)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise RuntimeError(
            f"{op} on a GPU needs Triton, which is not installed: pip install 'ssm_fast[gpu]'"
        ) from error


def choose(op: str, impl: str, device: torch.device, *, triton: bool = True) -> str:
    """Resolve ``impl`` for a device to "native", "triton" or "reference".

    Raises:
        ValueError: ``impl`` is unknown, or cannot run on ``device`` or in this forward mode.
        RuntimeError: the op has no backend for ``device``.
    """
    if impl == "auto" and needs_reference():
        return "reference"
    if impl == "auto" and device.type == "cpu" and not _interpreting:
        return "native"
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; expected one of {', '.join(IMPLS)}")
    if impl == "reference":
        return impl
    if needs_reference():
        raise ValueError(
            f"impl={impl!r} of {op} has no forward mode inside forward mode, nor in torch.compile"
        )
    on_cpu = "triton" if _interpreting else "native"
    wanted = {"cpu": on_cpu, "cuda": "triton"}.get(device.type)
    if wanted is None:
        raise RuntimeError(f"{op} has no kernel for device {device}; pass impl='reference'")
    if impl not in ("auto", wanted):
        raise ValueError(f"impl={impl!r} of {op} cannot run on {device}; expected {wanted!r}")
    if wanted == "triton" and not triton:
        raise RuntimeError(f"{op} has no Triton kernel yet; pass impl='reference' on {device}")
    return wanted


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call has to go through the op's autograd Function (which costs about 15 us)."""
    if transforms_are_active() or forward_mode_is_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needs_reference() -> bool:
    """Whether torch's own formulas alone give the right derivatives: forward mode inside forward mode.

    torch takes what a Function's jvp has saved for constant there. torch.compile leaves the jvp of an
    op out in any forward mode, and fails at its gradient inside a transform of torch.func.
    """
    if torch.compiler.is_compiling():
        return transforms_are_active() or forward_mode_is_active()
    return transforms_are_active() and forward_modes_are_nested()


def cpu_kernel(
    op: str, module: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the CPU kernel of ``op``, and return how to call the op.

    The CUDA kernel is registered beside it: the function of that name in
    ``ssm_fast.kernels.<module>``, where a module that is not given has the name of the op.

    torch's dispatcher takes longer for an op written in Python than many of our kernels run, so a
    call goes straight to the kernel where the dispatcher would do nothing else.
    """
    launcher = partial(triton_kernel, op, module or op)

    def on_cpu_of(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def on_cpu(*arguments: Any) -> Any:
            return launcher()(*arguments) if _interpreting else kernel(*arguments)

        return on_cpu

    def on_cuda(first: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device(first.device):
            return launcher()(first, *arguments)

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.impl(f"ssm_fast::{op}", "CPU")(on_cpu_of(kernel))
        torch.library.impl(f"ssm_fast::{op}", "CUDA")(on_cuda)
        dispatched = getattr(torch.ops.ssm_fast, op)

        def run(*arguments: Any) -> Any:
            if _interpreting or is_watched():
                return dispatched(*arguments)
            differentiable = torch.is_grad_enabled()
            for x in arguments:
                if isinstance(x, Tensor) and (
                    not is_plain(x) or (differentiable and x.requires_grad)
                ):
                    return dispatched(*arguments)
            return kernel(*arguments)

        return run

    return register
