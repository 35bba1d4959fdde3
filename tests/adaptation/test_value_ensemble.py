from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssm_fast.adaptation.value_ensemble import ValueEnsemble, critic_scale

pytestmark = pytest.mark.isa_independent

H = 6


def task(T: int, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[1, T, H]``, returns with noise that lasts 20 steps, and the true values."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(1, T, H, generator=g, dtype=torch.float64)
    true = features @ torch.arange(1.0, H + 1, dtype=torch.float64) + 3.0
    shared = torch.randn(1, -(-T // 20), generator=g, dtype=torch.float64)
    return features, true + noise * shared.repeat_interleave(20, 1)[:, :T], true


def critic(factor: float = 1.0) -> Tensor:
    return factor * torch.tensor([*range(1, H + 1), 0.0], dtype=torch.float64)


class TestFit:
    def test_mean_is_near_the_truth(self) -> None:
        features, returns, true = task(4000)
        ensemble = ValueEnsemble(16, block_length=20)
        ensemble.fit(features, returns, torch.zeros(H + 1))
        error = (ensemble.values(features) - true).square().mean().sqrt()
        assert float(error) < 0.1 * float(true.std())

    def test_without_information_it_is_the_scaled_critic(self) -> None:
        # one step cannot say much: the heads stay at 5 times the critic, as the returns ask
        features, returns, _ = task(40, noise=0.5)
        ensemble = ValueEnsemble(64, block_length=40)
        ensemble.fit(features, 5.0 * returns, critic())
        assert ensemble.scale == pytest.approx(5.0, rel=0.2)
        far = 10.0 * torch.randn(50, H, dtype=torch.float64)
        want = 5.0 * far @ critic()[:-1]
        correlation = torch.corrcoef(torch.stack([ensemble.values(far), want]))[0, 1]
        assert float(correlation) > 0.98

    def test_disagreement_is_honest(self) -> None:
        # over many data sets it is about as large as the error of the mean
        errors, spreads = [], []
        points = torch.randn(100, H, dtype=torch.float64)
        for seed in range(40):
            features, returns, _ = task(400, noise=3.0, seed=seed)
            ensemble = ValueEnsemble(16, block_length=20, seed=seed)
            ensemble.fit(features, returns, critic(0.5))
            true = points @ critic()[:-1] + 3.0
            errors.append(ensemble.values(points) - true)
            spreads.append(ensemble.disagreement(points))
        error = torch.stack(errors).square().mean().sqrt()
        spread = torch.stack(spreads).square().mean().sqrt()
        assert 0.5 < float(spread / error) < 2.0

    def test_uncertainty_falls_with_data_and_grows_away_from_them(self) -> None:
        nothing = ValueEnsemble()
        assert torch.equal(nothing.uncertainty(torch.randn(3, H)), torch.ones(3))
        near = torch.randn(200, H, dtype=torch.float64)
        levels = []
        for T in (200, 2000, 20000):
            features, returns, _ = task(T)
            features[..., -1] = 0.01 * features[..., -1]  # a direction that was hardly seen
            ensemble = ValueEnsemble(16, block_length=20)
            ensemble.fit(features, returns, critic())
            seen, unseen = near.clone(), near.clone()
            seen[:, -1], unseen[:, :-1] = 0.0, 0.0
            unseen[:, -1] *= 20.0
            levels.append(float(ensemble.uncertainty(seen).mean()))
            assert float(ensemble.uncertainty(unseen).mean()) > 1.3 * levels[-1]
            assert 0.0 <= levels[-1] <= 1.0
        assert 0.25 < levels[0] < 0.6, "10 blocks tell little of 7 weights"
        assert levels[0] > 1.5 * levels[1] > 3.0 * levels[2]

    def test_same_seed_same_heads(self) -> None:
        features, returns, _ = task(100)
        ensembles = [ValueEnsemble(seed=seed) for seed in (1, 1, 2)]
        for ensemble in ensembles:
            ensemble.fit(features, returns, critic())
        values = [ensemble.disagreement(features) for ensemble in ensembles]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])


class TestCriticScale:
    def test_least_squares(self) -> None:
        values = torch.randn(500, dtype=torch.float64)
        noise = torch.randn(500, dtype=torch.float64)
        scale, explained = critic_scale(values, 7.0 * values - 30.0 + 7.0 * noise)
        assert scale == pytest.approx(7.0, rel=0.1)
        assert explained == pytest.approx(0.5, abs=0.08)
        assert critic_scale(values, 2.0 * values + 1.0) == pytest.approx((2.0, 1.0))

    @pytest.mark.parametrize("factor", [0.0, -1.0])
    def test_a_critic_of_no_use(self, factor: float) -> None:
        values = torch.randn(50)
        assert critic_scale(values, factor * values) == (0.0, 0.0)
        assert critic_scale(torch.ones(50), values) == (0.0, 0.0)

    def test_returns_or_values_that_are_all_the_same_but_for_rounding(self) -> None:
        values = torch.randn(500)
        flat = 100.0 + 1e-5 * values
        assert critic_scale(values, flat) == (0.0, 0.0)
        assert critic_scale(flat, values) == (0.0, 0.0)
        assert critic_scale(values, 100.0 + values)[0] == pytest.approx(1.0, rel=1e-3)


class TestErrors:
    def test_shapes_and_numbers(self) -> None:
        features, returns, _ = task(10)
        ensemble = ValueEnsemble()
        for bad_features, bad_returns, text in (
            (features[0], returns, "must have shapes"),
            (features, returns[:, :9], "must have shapes"),
            (features[:, :0], returns[:, :0], "must have shapes"),
            (features * torch.nan, returns, "features must be finite"),
            (features, returns / 0.0, "returns must be finite"),
        ):
            with pytest.raises(ValueError, match=text):
                ensemble.fit(bad_features, bad_returns, critic())
        for call in (ensemble.values, ensemble.disagreement):
            with pytest.raises(ValueError, match="fit the heads first"):
                call(features)
        with pytest.raises(ValueError, match="num_heads must be at least 2"):
            ValueEnsemble(1)

    @pytest.mark.parametrize("T", [1, 2])
    def test_very_few_steps(self, T: int) -> None:
        features, returns, _ = task(T)
        ensemble = ValueEnsemble()
        ensemble.fit(features, returns, critic())
        assert bool(torch.isfinite(ensemble.values(features)).all())
        assert bool(torch.isfinite(ensemble.uncertainty(features)).all())
