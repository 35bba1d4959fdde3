from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from ssm_fast.nn import RunningNorm


def observations(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, shape[-1], dtype=torch.float64)
    return torch.randn(*shape, dtype=torch.float64, generator=generator) * scale + 3.0 * scale


def test_statistics_of_unequal_batches_equal_numpy_on_all_of_them() -> None:
    norm = RunningNorm(5)
    batches = [observations(n, 5, seed=n) for n in (1, 7, 0, 64, 3)]
    for batch in batches:
        norm.update(batch)
    everything = torch.cat(batches).numpy()
    np.testing.assert_allclose(norm.mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(norm.var, everything.var(0), rtol=1e-12)
    assert int(norm.count) == 75


def test_leading_dimensions_are_batch_dimensions() -> None:
    x = observations(4, 6, 5)
    whole, rows = RunningNorm(5), RunningNorm(5)
    whole.update(x)
    for row in x.flatten(0, 1):
        rows.update(row)
    torch.testing.assert_close(whole.mean, rows.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.var, rows.var, rtol=1e-10, atol=0)


def test_a_large_mean_costs_no_digits() -> None:
    norm = RunningNorm(1)
    x = torch.randn(10_000, 1, dtype=torch.float64) + 1e6
    for part in torch.split(x, 100):
        norm.update(part.float())
    seen = x.float().double().numpy()
    np.testing.assert_allclose(norm.var, seen.var(0), rtol=1e-9)
    expected = (seen - seen.mean(0)) / seen.std(0)
    np.testing.assert_allclose(norm(x.float()), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_normalises_clips_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    norm = RunningNorm(3, clip=2.0)
    x = observations(100, 3)
    norm.update(x)
    expected = np.clip((x.numpy() - x.numpy().mean(0)) / np.sqrt(x.numpy().var(0) + 1e-8), -2, 2)
    y = norm(x.to(dtype))
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, atol=1e-4 if dtype == torch.float32 else 1e-12)
    assert float(y.abs().max()) == 2.0
    assert norm(x[:10].view(2, 5, 3)).shape == (2, 5, 3)


def test_forward_never_updates() -> None:
    norm = RunningNorm(3)
    norm.update(observations(10, 3))
    before = copy.deepcopy(norm.state_dict())
    norm.train()(observations(50, 3, seed=9))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_before_the_first_update_it_only_clips() -> None:
    x = torch.tensor([[0.5, -20.0, 10.5]], dtype=torch.float64)
    torch.testing.assert_close(
        RunningNorm(3)(x), torch.tensor([[0.5, -10.0, 10.0]], dtype=torch.float64)
    )


def test_a_constant_feature_stays_finite() -> None:
    norm = RunningNorm(2)
    norm.update(torch.full((8, 2), 7.0))
    torch.testing.assert_close(norm(torch.full((1, 2), 7.0)), torch.zeros(1, 2))
    torch.testing.assert_close(norm(torch.full((1, 2), 8.0)), torch.full((1, 2), 10.0))


def test_moving_the_module_does_not_round_the_statistics() -> None:
    norm = RunningNorm(2)
    norm.update(observations(10, 2))
    exact = norm.mean.clone()
    for moved in (norm.float(), norm.half(), norm.to(torch.bfloat16), norm.to("cpu").double()):
        assert moved.mean.dtype == moved.var.dtype == torch.float64
        assert torch.equal(moved.mean, exact)
    assert norm.to("meta").mean.device.type == "meta"


def test_state_dict_deepcopy_and_pickle_carry_the_statistics() -> None:
    norm = RunningNorm(4)
    norm.update(observations(20, 4))
    fresh = RunningNorm(4)
    fresh.load_state_dict(norm.state_dict())
    x = observations(5, 4, seed=3)
    for other in (fresh, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(other(x), norm(x))
        other.update(x)
        assert int(other.count) == 25
    assert int(norm.count) == 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_leaves_the_statistics_alone(bad: float) -> None:
    norm = RunningNorm(2)
    norm.update(observations(10, 2))
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="x must be finite"):
        norm.update(torch.tensor([[1.0, bad]]))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        RunningNorm(0)
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        RunningNorm(3, clip=0.0)
    with pytest.raises(ValueError, match="eps must be positive, got nan"):
        RunningNorm(3, eps=float("nan"))
    with pytest.raises(ValueError, match=r"x must have shape \[..., 3\], got \[2, 4\]"):
        RunningNorm(3).update(torch.zeros(2, 4))
