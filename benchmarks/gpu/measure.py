"""Time the Triton kernels beside their peers and floors; started by benchmarks/gpu.sh."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bars
import torch
import triton
from gpu_peers import absent, importable
from references import dense_scan_loop, norm_scan_loop, relative_rms
from torch import Tensor, nn

import ssm_fast
from ssm_fast.kernels import dense_scan as dense_kernels
from ssm_fast.kernels import linear_scan as linear_kernels
from ssm_fast.kernels.recurrence import Plan
from ssm_fast.ops import dense_scan, linear_scan, norm_scan

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 11
Contenders = dict[str, "Callable[[], Any]"]


def contest(contenders: Contenders, seconds: float = 6.0) -> dict[str, float]:
    """Median milliseconds of each contender, in alternating rounds of several calls."""
    calls = {}
    for name, run in contenders.items():
        run()  # compiles
        calls[name] = max(1, min(200, int(0.01 / max(elapsed(run, 1), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for round_ in range(ROUNDS):
        for name, run in contenders.items():
            times[name].append(elapsed(run, calls[name]) / calls[name] * 1e3)
        if time.perf_counter() - start > seconds and round_ >= 2:
            break
    return {name: statistics.median(x) for name, x in times.items()}


def elapsed(run: Callable[[], Any], calls: int) -> float:
    """Seconds on the GPU, launches included where they are what takes the time."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def problem(B: int, T: int, N: int, G: int | None = None) -> list[Tensor]:
    """u, A, weight, bias and s0 of a scan whose states stay of order one."""
    g = [] if G is None else [G]
    A = torch.linalg.qr(torch.randn(*g, N, N, device="cuda"))[0] * 0.9
    return [
        torch.randn(*g, B, T, N, device="cuda"),
        A,
        torch.ones(*g, N, device="cuda"),
        torch.zeros(*g, N, device="cuda"),
        torch.zeros(*g, B, N, device="cuda"),
    ]


def backward(f: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Any]:
    """A call of ``f`` with the gradients of all tensors."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    return lambda: torch.autograd.grad(f(*leaves).sum(), leaves)


def second_order(f: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Any]:
    """A Hessian-vector product."""
    leaves = [x.detach().requires_grad_() for x in tensors]

    def run() -> Any:
        first = torch.autograd.grad(f(*leaves).square().mean(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    return run


def whole(u: Tensor, A: Tensor, plan: Plan | None = None) -> Callable[[], Tensor]:
    """dense_scan in one sweep, never in chunks."""
    u, A = u.unsqueeze(0), A.unsqueeze(0)
    chosen = plan or dense_kernels.plan("dense_scan", u.shape[1], u.shape[3], False)

    def run() -> Tensor:
        s = torch.empty_like(u)
        dense_kernels.launch("whole", u, A, None, None, False, s, chosen)
        return s

    return run


def dense() -> dict[str, Any]:
    """Persistent and chunked, in microseconds a step."""
    rows = {}
    for B, T, N in (
        (16, 1024, 64),
        (1, 4096, 64),
        (16, 1024, 128),
        (16, 1024, 256),
        (4096, 256, 64),
    ):
        u, A, *_ = problem(B, T, N)
        ms = contest({"persistent": whole(u, A), "chosen": lambda u=u, A=A: dense_scan(u, A)})
        rows[f"dense_scan B{B} T{T} N{N}, forward"] = {
            "ms": ms, "us_per_step": {name: x / T * 1e3 for name, x in ms.items()},
        }  # fmt: skip
    return rows


def plans() -> dict[str, Any]:
    """What other plans would take: rows of a program, product and warps."""
    rows = {}
    for B, N in ((16, 64), (16, 128), (4096, 64)):
        u, A, *_ = problem(B, 256, N)
        contenders = {
            f"{product} {rows_} rows {warps} warps": whole(u, A, Plan(N, rows_, product, warps))
            for product, rows_, warps in (
                ("sum", 1, 1), ("sum", 1, 2), ("sum", 1, 4), ("sum", 1, 8), ("sum", 4, 4),
                ("sum", 8, 4), ("sum", 4, 8), ("tf32x3", 16, 4), ("tf32x3", 16, 8),
            )
            if (B > 16 or rows_ != 8) and (N < 128 or warps > 2)
        }  # fmt: skip
        ms = contest(contenders, 3.0)
        rows[f"plans of dense_scan B{B} T256 N{N}, forward"] = {
            "ms": ms, "us_per_step": {name: x / 256 * 1e3 for name, x in ms.items()},
        }  # fmt: skip
    return rows


def norm() -> dict[str, Any]:
    """The sweeps of norm_scan, in microseconds a step."""
    inputs = problem(16, 1024, 64)
    ms = contest(
        {
            "forward": lambda: norm_scan(*inputs),
            "forward and backward": backward(norm_scan, *inputs),
        }
    )
    return {
        "norm_scan B16 T1024 N64": {
            "ms": ms, "us_per_step": {name: x / 1.024 for name, x in ms.items()},
        }
    }  # fmt: skip


def recurrent() -> dict[str, Any]:
    """Forward and backward beside recurrent layers of the same width, input projection included."""
    rows = {}
    for B in (16, 256, 4096):
        T, N = 256, 64
        x, *rest = problem(B, T, N)
        weight = torch.randn(N, N, device="cuda") / 8
        contenders: Contenders = {
            "norm_scan": backward(lambda x, W, *rest: norm_scan(x @ W.T, *rest), x, weight, *rest),
            "dense_scan": backward(lambda x, W, A: dense_scan(x @ W.T, A), x, weight, rest[0]),
        }
        for module in (nn.GRU, nn.LSTM, nn.RNN):
            peer = module(N, N, batch_first=True).cuda()
            contenders[f"cuDNN {module.__name__}"] = module_backward(peer, x)
        if B == 16:
            contenders["eager loop"] = backward(
                lambda x, W, *rest: norm_scan_loop(x @ W.T, *rest), x, weight, *rest
            )
        for name, peer in (("TorchRL gru_triton", torchrl_gru), ("FlashRNN LSTM", flash_lstm)):
            run = peer(x)
            if run is not None:
                contenders[name] = run
        rows[bars.WIDTH.format(B)] = {"ms": contest(contenders)}
    return rows


def torchrl_gru(x: Tensor) -> Callable[[], Any] | None:
    """TorchRL's fused GRU, with resets, in float32; None where it is absent."""
    peer = importable("TorchRL gru_triton")
    if peer is None:
        return None
    B, T, N = x.shape
    w_ih, w_hh = (torch.randn(3 * N, N, device="cuda") / 8 for _ in range(2))
    b_ih, b_hh = (torch.zeros(3 * N, device="cuda") for _ in range(2))
    hidden = torch.zeros(B, T, N, device="cuda")
    starts = torch.zeros(B, T, dtype=torch.bool, device="cuda")
    return backward(
        lambda *leaves: peer(leaves[0], hidden, *leaves[1:], starts)[0], x, w_ih, w_hh, b_ih, b_hh
    )


def flash_lstm(x: Tensor) -> Callable[[], Any] | None:
    """FlashRNN's LSTM in Triton, one head, bfloat16 as it is published; None where it is absent."""
    peer = importable("FlashRNN LSTM")
    if peer is None:
        return None
    N = x.shape[-1]
    half: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    weight, bias = torch.randn(4 * N, N, **half) / 8, torch.zeros(4, 1, N, **half)
    R = torch.randn(4, 1, N, N, **half) / 8

    def run(x: Tensor, weight: Tensor, R: Tensor, bias: Tensor) -> Tensor:
        gates = (x @ weight.T).unflatten(-1, (4, 1, N))
        return peer(gates, R, bias, function="lstm", backend="triton_fused")[0]

    return backward(run, x.to(torch.bfloat16), weight, R, bias)


def compiled() -> dict[str, Any]:
    """The eager loop under torch.compile, at a length where that takes seconds and not minutes."""
    inputs = problem(16, 16, 64)
    contenders = {
        "norm_scan": backward(norm_scan, *inputs),
        "compiled loop": backward(torch.compile(norm_scan_loop), *inputs),
    }
    return {"forward and backward, B16 T16 N64": {"ms": contest(contenders)}}


def module_backward(module: nn.RNNBase, x: Tensor) -> Callable[[], Any]:
    """Forward and backward of one of torch's recurrent modules."""
    x = x.detach().requires_grad_()
    leaves = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x)[0].sum(), leaves)


def elementwise() -> dict[str, Any]:
    """linear_scan on more than a gigabyte, beside a copy of the same bytes."""
    a, b = (torch.rand(64, 1024, 1280, device="cuda") for _ in range(2))
    source = torch.empty(3 * a.numel() // 2, device="cuda")
    target = torch.empty_like(source)
    contenders: Contenders = {
        "linear_scan": lambda: linear_scan(a, b),
        "copy of the same bytes": lambda: target.copy_(source),
    }
    scan = importable("accelerated-scan")
    if scan is not None:
        gates, tokens = (x.transpose(1, 2).contiguous() for x in (a, b))
        contenders["accelerated-scan"] = lambda: scan(gates, tokens)
    ms = contest(contenders)
    share = ms["copy of the same bytes"] / ms["linear_scan"]
    rows: dict[str, Any] = {
        "linear_scan B64 T1024 C1280, forward": {
            "ms": ms,
            "share_of_copy_bandwidth": share,
            "copy_TB_per_s": 3 * a.nbytes / ms["copy of the same bytes"] / 1e9,
        }
    }
    for B, T in ((1, 65536), (64, 4096)):
        a, b = (torch.rand(B, T, 64, device="cuda") for _ in range(2))
        ms = contest({"one sweep": one_sweep(a, b), "chosen": lambda a=a, b=b: linear_scan(a, b)})
        rows[f"linear_scan B{B} T{T} C64, forward"] = {"ms": ms}
    return rows


def one_sweep(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """linear_scan through all of time, never in chunks."""

    def run() -> Tensor:
        h = torch.empty_like(b)
        linear_kernels.launch("whole", a, b, None, h, None, b.shape[1], 1, False, False)
        return h

    return run


def orders() -> dict[str, Any]:
    """Second-order gradients beside the eager loop."""
    inputs = problem(16, 256, 64)
    ms = contest(
        {
            "norm_scan": second_order(norm_scan, *inputs),
            "eager loop": second_order(norm_scan_loop, *inputs),
        },
        20.0,
    )
    return {"second order of norm_scan, B16 T256 N64": {"ms": ms}}


def groups() -> dict[str, Any]:
    """64 tasks with weights of their own in one launch, and in one each."""
    inputs = problem(8, 256, 64, G=64)
    tasks = [[x[g] for x in inputs] for g in range(64)]
    return {
        "64 tasks, norm_scan B8 T256 N64, forward": {
            "ms": contest(
                {
                    "one launch": lambda: norm_scan(*inputs),
                    "a launch each": lambda: [norm_scan(*task) for task in tasks],
                }
            )
        }
    }


def accuracy() -> dict[str, Any]:
    """Relative RMS error of float32 against a float64 loop."""
    found = {}
    for name, ours, loop, count in (
        ("dense_scan", dense_scan, dense_scan_loop, 2),
        ("norm_scan", norm_scan, norm_scan_loop, 5),
    ):
        inputs = problem(4, 300, 64)[:count]
        inputs[1] = inputs[1] * 0.5  # contracting, so that rounding does not grow with time
        results = []
        for dtype, f in ((torch.float32, ours), (torch.float64, loop)):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            s = f(*leaves)
            first = torch.autograd.grad(s.pow(3).mean(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            results.append(([s], first, second))
        found[f"{name}, relative RMS error"] = {
            order: max(relative_rms(x, y) for x, y in zip(actual, expected, strict=True))
            for order, actual, expected in zip(("output", "first", "second"), *results, strict=True)
        }
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "ssm_fast": ssm_fast.__version__,
    }


def table(rows: dict[str, Any], missing: dict[str, str]) -> list[str]:
    """One line a contest, times of each contender and its other figures; last, absent peers."""
    lines = ["| benchmark | figures |", "|---|---|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error']} |")
            continue
        cells = []
        for key, value in row.items():
            if isinstance(value, dict):
                cells += [f"{who} {x:.4g} {key.replace('_per_', '/')}" for who, x in value.items()]
            else:
                cells.append(f"{key} {value:.3g}")
        lines.append(f"| {name} | {', '.join(cells)} |")
    for peer, reason in missing.items():
        escaped = reason.replace("|", "\\|")
        lines.append(f"| {peer} | absent: {escaped} |")
    return lines


def main() -> None:
    """Run every suite while there is time, and write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180.0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    rows: dict[str, Any] = {}
    missing = absent()
    # Products of torch's own run in float32, as those of the kernels do.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for suite in (accuracy, dense, norm, elementwise, groups, recurrent, orders, plans, compiled):
        if time.perf_counter() - start > arguments.seconds:
            rows[suite.__name__] = {"error": "no time left"}
            continue
        try:
            rows |= suite()
        except Exception as error:  # noqa: BLE001 - the other suites still have something to say
            rows[suite.__name__] = {"error": f"{type(error).__name__}: {error}"[:300]}
            torch.cuda.empty_cache()
        payload = {"machine": machine(), "absent": missing, "rows": rows}
        (arguments.results / "gpu.json").write_text(json.dumps(payload, indent=2) + "\n")
        head = ", ".join(f"{k} {v}" for k, v in machine().items())
        tables = [*bars.table(rows), "", *table(rows, missing)]
        text = ["# GPU benchmarks", "", f"`benchmarks/gpu.sh` on: {head}", "", *tables]
        (arguments.results / "gpu.md").write_text("\n".join(text) + "\n")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
