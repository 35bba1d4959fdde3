"""What the interpreter cannot show: compilations, graphs, and tensors beyond 32-bit offsets."""

from __future__ import annotations

import pytest
import torch

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.ops import dense_scan, linear_scan, norm_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_new_batch_size_compiles_nothing():
    from ssm_fast.kernels.dense_scan import kernel

    def variants():
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    A = torch.zeros(8, 8, device="cuda")
    dense_scan(torch.zeros(1, 1, 8, device="cuda"), A)
    before = variants()
    for B, T in ((2, 3), (16, 16), (7, 100), (100, 5), (32, 1)):
        dense_scan(torch.zeros(B, T, 8, device="cuda"), A)
    assert variants() == before


def captured(step):
    """What ``step`` gives, and what a replay of its CUDA graph gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    for x in actual:
        x.fill_(float("nan"))
    graph.replay()
    return actual, expected


@pytest.mark.parametrize("T", [20, 600])
@pytest.mark.parametrize("op", ["dense_scan", "norm_scan", "linear_scan"])
def test_a_training_step_is_captured_in_a_graph(op, T):
    u = torch.randn(4, T, 16, device="cuda")
    A = 0.1 * torch.randn(16, 16, device="cuda")
    w, b = (torch.randn(16, device="cuda") for _ in range(2))
    f, *leaves = {
        "dense_scan": (dense_scan, u, A),
        "norm_scan": (norm_scan, u, A, w, b),
        "linear_scan": (linear_scan, torch.rand_like(u), u),
    }[op]
    leaves = [x.requires_grad_() for x in leaves]
    actual, expected = captured(lambda: torch.autograd.grad(f(*leaves).square().sum(), leaves))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_a_policy_step_is_captured_in_a_graph():
    policy = ImprovedSSM(input_dim=5, action_dim=2, state_dim=16, hidden_dim=32).cuda()
    x, state = torch.randn(8, 5, device="cuda"), policy.init_hidden(8).cuda()
    reset = torch.zeros(8, dtype=torch.bool, device="cuda")

    @torch.no_grad()
    def step():
        return policy.get_action(x, state, deterministic=True, reset=reset)

    for actual, expected in zip(*captured(step), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 * 2**30,
    reason="needs 24 GiB of free GPU memory",
)
@pytest.mark.parametrize("op", ["dense_scan", "norm_scan", "linear_scan"])
def test_offsets_beyond_32_bits(op):
    B, T, N = 2**19 + 5, 65, 64  # more than 2^31 elements
    u = torch.empty(B, T, N, device="cuda", dtype=torch.bfloat16).normal_()
    A = 0.1 * torch.randn(N, N, device="cuda", dtype=torch.bfloat16)
    w = torch.ones(N, device="cuda", dtype=torch.bfloat16)
    f = {
        "dense_scan": lambda u: dense_scan(u, A),
        "norm_scan": lambda u: norm_scan(u, A, w, w),
        "linear_scan": lambda u: linear_scan(A[0], u),
    }[op]
    s = f(u)
    assert torch.equal(s[:3], f(u[:3].clone()))
    torch.testing.assert_close(s[-3:], f(u[-3:].clone()))
