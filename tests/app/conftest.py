from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ssm_fast.app import jobs
from ssm_fast.app.visitors import Visitor
from ssm_fast.checkpoint import save_model
from ssm_fast.core import ImprovedSSM


@pytest.fixture(scope="session", autouse=True)
def _prepared() -> None:
    """The imports of the children once, and not for each of them."""
    jobs.prepare()


@pytest.fixture
def visitor(tmp_path: Path) -> Iterator[Visitor]:
    visitor = Visitor(tmp_path / "visitor")
    yield visitor
    visitor.leave()


@pytest.fixture
def save_policy(tmp_path: Path) -> Callable[..., Path]:
    """Writes an untrained policy of CartPole."""

    def save(name: str = "policy.safetensors", **metadata: str) -> Path:
        torch.manual_seed(1)
        model = ImprovedSSM(4, 2, state_dim=4, hidden_dim=8, num_layers=1, discrete=True)
        path = tmp_path / name
        save_model(path, model, metadata)
        return path

    return save


@pytest.fixture
def save_cheetah(tmp_path: Path) -> Callable[..., Path]:
    """Writes an untrained policy of HalfCheetah."""

    def save() -> Path:
        model = ImprovedSSM(17, 6, state_dim=4, hidden_dim=8, num_layers=1)
        bounds = {"action_low": json.dumps([-1.0] * 6), "action_high": json.dumps([1.0] * 6)}
        save_model(tmp_path / "cheetah.safetensors", model, {"env_id": "HalfCheetah-v5", **bounds})
        return tmp_path / "cheetah.safetensors"

    return save
