from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from gymnasium import spaces
from references import gae_loop, returns_loop
from stable_baselines3.common.buffers import RolloutBuffer
from torchrl.objectives.value import functional

from ssm_fast.ops import discounted_returns, gae


def rollout(B, T, *, dtype=torch.float64, seed=0, ends=0.2):
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, B, T, dtype=dtype, generator=generator)
    terminated, truncated = torch.rand(2, B, T, generator=generator) < ends
    return rewards, values, next_values, terminated, truncated


def test_discounted_returns_bootstrap_from_zero_by_default():
    rewards, _, next_values, terminated, truncated = rollout(5, 20)
    torch.testing.assert_close(
        discounted_returns(rewards, terminated, truncated, 0.9),
        discounted_returns(rewards, terminated, truncated, 0.9, torch.zeros_like(next_values)),
    )


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_gae_equals_torchrl(impl):
    rewards, values, next_values, terminated, truncated = rollout(6, 40, dtype=torch.float32)
    expected, expected_returns = functional.generalized_advantage_estimate(
        0.99,
        0.95,
        *(x.unsqueeze(-1) for x in (values, next_values, rewards)),
        done=(terminated | truncated).unsqueeze(-1),
        terminated=terminated.unsqueeze(-1),
    )
    advantages, returns = gae(
        rewards, values, next_values, terminated, truncated, 0.99, 0.95, impl=impl
    )
    torch.testing.assert_close(advantages, expected.squeeze(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, expected_returns.squeeze(-1), rtol=1e-5, atol=1e-5)


def test_gae_equals_stable_baselines3():
    T, B, gamma = 40, 6, 0.99
    rewards, values, _, terminated, _ = (x.numpy() for x in rollout(B, T, dtype=torch.float32))
    last_values = torch.randn(B)
    buffer = RolloutBuffer(
        T, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)), gamma=gamma, gae_lambda=0.95, n_envs=B
    )
    starts = np.concatenate([np.ones((B, 1), bool), terminated[:, :-1]], axis=1)
    for t in range(T):
        zeros = np.zeros((B, 1), np.float32)
        buffer.add(
            zeros,
            zeros,
            rewards[:, t],
            starts[:, t],
            torch.from_numpy(values[:, t]),
            torch.zeros(B),
        )
    buffer.compute_returns_and_advantage(last_values, terminated[:, -1])

    next_values = np.concatenate([values[:, 1:], last_values[:, None].numpy()], axis=1)
    tensors = (torch.from_numpy(x) for x in (rewards, values, next_values, terminated))
    advantages, returns = gae(*tensors, torch.zeros(B, T, dtype=torch.bool), gamma, 0.95)
    np.testing.assert_allclose(advantages.T.numpy(), buffer.advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns.T.numpy(), buffer.returns, rtol=1e-4, atol=1e-5)


def test_truncation_bootstraps_and_termination_does_not():
    rewards = torch.tensor([[1.0, 1.0, 1.0]])
    values, next_values = torch.zeros(1, 3), torch.full((1, 3), 10.0)
    ends = torch.tensor([[False, True, False]])
    never = torch.zeros(1, 3, dtype=torch.bool)
    cut, _ = gae(rewards, values, next_values, never, ends, 0.5, 1.0)
    over, _ = gae(rewards, values, next_values, ends, never, 0.5, 1.0)
    torch.testing.assert_close(cut, torch.tensor([[6.0 + 0.5 * 6.0, 6.0, 6.0]]))
    torch.testing.assert_close(over, torch.tensor([[6.0 + 0.5 * 1.0, 1.0, 6.0]]))


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dim", [0, 1])
def test_values_that_are_not_used_may_be_nan(dim, impl):
    B, T = 18, 20
    rewards, values, next_values, terminated, truncated = rollout(B, T)
    spoilt = next_values.masked_fill(terminated, torch.nan)
    tensors = (rewards, values, next_values, terminated, truncated)
    expected = gae(*tensors, 0.9, 0.8)[0]
    broken = (rewards, values, spoilt, terminated, truncated)
    inputs = broken if dim == 1 else [x.T for x in broken]
    actual = gae(*inputs, 0.9, 0.8, dim=dim, impl=impl)[0]
    torch.testing.assert_close(actual if dim == 1 else actual.T, expected)

    last = torch.arange(T) == T - 1
    unused = terminated | ~(truncated | last)
    expected = discounted_returns(rewards, terminated, truncated, 0.9, next_values)
    inputs = [rewards, terminated, truncated, next_values.masked_fill(unused, torch.nan)]
    r, te, tr, v = inputs if dim == 1 else [x.T for x in inputs]
    actual = discounted_returns(r, te, tr, 0.9, v, dim=dim, impl=impl)
    torch.testing.assert_close(actual if dim == 1 else actual.T, expected)


def test_an_end_cuts_off_a_later_infinity():
    rewards = torch.tensor([[1.0, 1.0, torch.inf]])
    zeros, never = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool)
    ends = torch.tensor([[False, True, False]])
    for impl in ("native", "reference"):
        advantages, _ = gae(rewards, zeros, zeros, ends, never, 0.5, 1.0, impl=impl)
        torch.testing.assert_close(advantages, torch.tensor([[1.5, 1.0, torch.inf]]))


@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (2, 3, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_dimensions(shape, dtype):
    inputs = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    flags = [torch.rand(shape) < 0.3 for _ in range(2)]
    for dim in range(len(shape)):
        native = gae(*inputs, *flags, 0.9, 0.8, dim=dim)
        reference = gae(*inputs, *flags, 0.9, 0.8, dim=dim, impl="reference")
        torch.testing.assert_close(native, reference)


@pytest.mark.parametrize("ends", [0.0, 0.001, 0.2])
@pytest.mark.parametrize("shape", [(1, 40_001), (5, 8200), (1030, 1031)])
def test_long_and_large_equal_the_loop(shape, ends):
    rewards, values, next_values, terminated, truncated = tensors = rollout(*shape, ends=ends)
    arrays = [x.T.numpy() for x in tensors]
    expected = [torch.from_numpy(gae_loop(*arrays, 0.99, 0.95)).T]
    expected.append(expected[0] + values)
    sums = torch.from_numpy(returns_loop(arrays[0], *arrays[2:], 0.99)).T
    for dtype, flip in product((torch.float32, torch.float64), (False, True)):
        tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {}
        r, v, n = (x.to(dtype) for x in (rewards, values, next_values))

        def laid(x, flip=flip):
            return x.T.contiguous().T if flip else x  # time-major in memory

        inputs = [laid(x) for x in (r, v, n, terminated, truncated)]
        actual = gae(*inputs, 0.99, 0.95)
        assert actual[0].stride() == inputs[0].stride()
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x.double(), y, **tolerance)
        actual = discounted_returns(inputs[0], *inputs[3:], 0.99, inputs[2])
        torch.testing.assert_close(actual.double(), sums, **tolerance)


def test_an_infinity_reaches_back_to_the_cut_over_chunks_of_time():
    T = 20_000
    rewards, zeros = torch.ones(1, T), torch.zeros(1, T)
    rewards[0, 15_000] = torch.inf
    ends = torch.zeros(1, T, dtype=torch.bool)
    never, ends[0, 999] = ends.clone(), True
    advantages, _ = gae(rewards, zeros, zeros, never, ends, 0.9, 0.5)
    assert torch.isfinite(advantages[0, :1000]).all()
    assert torch.isinf(advantages[0, 1000:15_001]).all()
    assert torch.isfinite(advantages[0, 15_001:]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"values": torch.zeros(2, 4)},
            ValueError,
            r"values must have shape that of rewards = \[2, 3\]",
        ),
        (
            {"terminated": torch.zeros(2, 3)},
            TypeError,
            "terminated must be torch.bool, got torch.float32",
        ),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        ({"gae_lambda": float("nan")}, ValueError, r"gae_lambda must be in \[0, 1\], got nan"),
        ({"dim": 2}, ValueError, r"dim must be a dimension of rewards, \[2, 3\], got 2"),
        (
            {"values": torch.zeros(2, 3).double()},
            TypeError,
            "values must have the dtype of rewards",
        ),
        (
            {"rewards": torch.zeros(2, 3, dtype=torch.long)},
            TypeError,
            "rewards of gae must be float32",
        ),
        (
            {"terminated": torch.zeros(2, 3, dtype=torch.bool, device="meta")},
            ValueError,
            "terminated must be on cpu",
        ),
        ({"truncated": [False]}, TypeError, "truncated must be a torch.Tensor, got list"),
    ],
)
def test_wrong_arguments_raise_before_a_kernel_runs(change, error, message):
    zeros, never = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    arguments = {
        "rewards": zeros,
        "values": zeros,
        "next_values": zeros,
        "terminated": never,
        "truncated": never,
        "gamma": 0.9,
        "gae_lambda": 0.9,
    }
    with pytest.raises(error, match=message):
        gae(**(arguments | change))
