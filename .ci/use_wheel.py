"""Uses the installed package: an op of each kind beside its reference, and the extras that are named.

`check_wheel.py` runs it in the environments it makes. Nothing is needed but the package and its dependencies.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch


def openmp_runtimes() -> set[str]:
    """The OpenMP libraries that this process has loaded."""
    if sys.platform == "darwin":
        dyld = ctypes.CDLL(None)
        dyld._dyld_get_image_name.restype = ctypes.c_char_p
        paths = [dyld._dyld_get_image_name(i).decode() for i in range(dyld._dyld_image_count())]
    else:
        paths = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    names = ("libgomp", "libomp", "libiomp")
    return {path for path in paths if Path(path).name.startswith(names)}


_of_torch = openmp_runtimes()

import ssm_fast
from ssm_fast import ops
from ssm_fast.core import ImprovedSSM
from ssm_fast.ops.dispatch import interpreter, native

OPTIONAL = {"gymnasium", "triton"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def main(extras: list[str]) -> None:
    """All checks; the first that fails ends it."""
    assert not Path(ssm_fast.__file__).is_relative_to(Path(__file__).resolve().parents[1])
    check_openmp()
    for dtype in TOLERANCE:
        check_ops(dtype)
    check_layer()
    check_policy_step()
    assert not sys.modules.keys() & OPTIONAL
    if "rl" in extras:
        check_training()
    if "gpu" in extras:
        check_triton()
    present = [name if find_spec(name) else f"no {name}" for name in sorted(OPTIONAL)]
    print(f"torch {torch.__version__}, {', '.join(present)}")


def check_openmp() -> None:
    """One runtime, that of torch, which therefore sets the threads of the kernels."""
    assert len(_of_torch) == 1, _of_torch
    assert openmp_runtimes() == _of_torch, openmp_runtimes() - _of_torch
    threads = torch.get_num_threads()
    for count in (3, threads):
        torch.set_num_threads(count)
        assert native.num_threads() == count


def check_ops(dtype: torch.dtype) -> None:
    """Values and gradients of the kernels beside those of the references."""
    B, T, N = 5, 33, 17
    torch.manual_seed(0)
    u = torch.randn(B, T, N, dtype=dtype, requires_grad=True)
    A = (0.9 * torch.linalg.qr(torch.randn(N, N, dtype=dtype))[0]).requires_grad_()
    weight, bias = torch.randn(2, N, dtype=dtype, requires_grad=True)
    a = torch.rand(N, dtype=dtype, requires_grad=True)
    reset = torch.rand(B, T) < 0.1
    compare(ops.dense_scan, u, A, reset=reset)
    compare(ops.norm_scan, u, A, weight, bias, reset=reset)
    compare(ops.linear_scan, a, u)
    compare(ops.linear_scan, torch.complex(a, 0.3 * a), torch.complex(u, u.flip(0)))
    compare(ops.output_norm, u, weight, bias, residual=u, tanh=True)

    rewards, values, next_values = torch.randn(3, B, T, dtype=dtype)
    ended = torch.rand(2, B, T) < 0.05
    compare(ops.gae, rewards, values, next_values, *ended, gamma=0.99, gae_lambda=0.95)
    compare(ops.discounted_returns, rewards, *ended, gamma=0.99, next_values=next_values)


def compare(op, *tensors: torch.Tensor, **options) -> None:
    """The outputs of `op` and their gradients, by the kernel and by the reference."""
    leaves = [x for x in tensors if x.requires_grad]
    by_impl = []
    for impl in ("native", "reference"):
        outputs = op(*tensors, **options, impl=impl)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if leaves:
            loss = sum(x.abs().square().sum() for x in outputs)
            outputs += torch.autograd.grad(loss, leaves)
        by_impl.append(outputs)
    for actual, expected in zip(*by_impl, strict=True):
        close(op.__name__, actual, expected)


def close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rounding, as the root mean square tells."""
    error = float((actual - expected).detach().abs().square().mean().sqrt())
    size = float(expected.detach().abs().square().mean().sqrt())
    tolerance = TOLERANCE[torch.empty(0, dtype=actual.dtype).abs().dtype]
    assert error <= tolerance * size, f"{name}: an error of {error} in values of {size}"


def check_layer() -> None:
    """A sequence through the layer that replaces a GRU, and the same in steps."""
    layer = ssm_fast.SSM(3, 8, num_layers=2, batch_first=True, norm="output", residual=True)
    x = torch.randn(4, 9, 3)
    y, h_n = layer(x)
    h = None
    for t in range(9):
        y_t, h = layer.step(x[:, t], h)
        close("SSM.step", y_t, y[:, t])
    close("SSM.step", h, h_n)


def check_policy_step() -> None:
    """An action without gradients, one native call, beside the differentiable one."""
    model = ImprovedSSM(input_dim=5, action_dim=2, state_dim=8, hidden_dim=16)
    x, state = torch.randn(3, 5), model.init_hidden(3)
    expected = model.get_action(x, state, deterministic=True)
    with torch.no_grad():
        actual = model.get_action(x, state, deterministic=True)
    assert expected[0].requires_grad or expected[2].requires_grad
    for one, other in zip(actual, expected, strict=True):
        close("policy_step", one, other)


def check_training() -> None:
    """A few steps of PPO from the command line, and the policy of the run."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"train --mode improved --env CartPole-v1 --steps 256 --out {folder}"
        result = subprocess.run(
            [sys.executable, "-I", "-m", "ssm_fast", *command.split()],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        policy = ssm_fast.load_policy(f"{folder}/policy.safetensors")
        action, _ = policy.predict([0.0, 0.0, 0.0, 0.0])
        assert int(action) in (0, 1), action


def check_triton() -> None:
    """A Triton kernel, interpreted, beside the reference."""
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    u, A = torch.randn(2, 5, 4), 0.5 * torch.eye(4)
    with interpreter():
        actual = ops.dense_scan(u, A)
    close("dense_scan of Triton", actual, ops.dense_scan(u, A, impl="reference"))


if __name__ == "__main__":
    main(sys.argv[1:])
