"""Models and data made before the default device or dtype changed: to a GPU, or here nowhere; to float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from ssm_fast import SSM
from ssm_fast.adaptation import StandardAdapter, TestTimeAdapter
from ssm_fast.checkpoint import load_model, save_model
from ssm_fast.core import ImprovedSSM, StateSpaceModel
from ssm_fast.env_runner import Environment
from ssm_fast.experience import ExperienceBuffer
from ssm_fast.meta_rl.meta_maml import MetaMAML
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.policy_gradient_trainer import PolicyGradientTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.policy import load_policy


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """``torch.set_default_dtype``, taken back at the end."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


X, Y = torch.randn(4, 6, 3), torch.randn(4, 6, 2)


def _packed() -> Callable[[], Tensor]:
    layer, sequences = SSM(3, 5), pack_sequence([X[0], X[1, :4]])
    return lambda: layer(sequences)[0].data


def _meta_update() -> Callable[[], Tensor]:
    maml = MetaMAML(StateSpaceModel(8, 3, 2))
    maml.meta_update([(X, Y, X, Y)] * 2)

    def run() -> Tensor:
        maml.meta_update([(X, Y, X, Y)] * 2)
        return maml.model.get_parameter("A")

    return run


def _ppo(env_id: str) -> Callable[[], Tensor]:
    env = Environment(env_id, 2, max_episode_steps=12)
    model = ImprovedSSM(env.input_dim, env.action_dim, 4, 8, discrete=env.discrete)
    trainer = PPOTrainer(model, num_steps=16, seed=0, ppo_epochs=2)

    def run() -> Tensor:
        trainer.train(env, 64)
        return model.encoder.weight

    return run


def _adapt() -> Callable[[], Tensor]:
    adapter = StandardAdapter(StateSpaceModel(8, 3, 2))

    def run() -> Tensor:
        adapter.update_step(X, Y)
        return adapter.model.get_parameter("A")

    return run


def _adapt_while_playing() -> Callable[[], Tensor]:
    adapter = TestTimeAdapter(ImprovedSSM(3, 2), seed=0)
    for i in range(40):
        adapter.store_transition(X[0, i % 6], Y[0, i % 6], float(i), X[1, i % 6], False)

    def run() -> Tensor:
        adapter.adapt()
        return adapter.model.get_parameter("encoder.weight")

    return run


def _buffer() -> Callable[[], Tensor]:
    buffer = ExperienceBuffer(10, "cpu", seed=0)

    def run() -> Tensor:
        buffer.extend(X[0], Y[0])
        sequences = buffer.sample_sequences(8, 2)["targets"]  # [8, 2, 2]
        return torch.cat((buffer.get_batch(8)[0], sequences[:, 0]), 1)

    return run


CASES: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "packed": _packed,
    "meta-update": _meta_update,
    "PPO, native": lambda: _ppo("Pendulum-v1"),
    "PPO": lambda: _ppo("CartPole-v1"),
    "adapter": _adapt,
    "test-time adapter": _adapt_while_playing,
    "buffer": _buffer,
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_results_do_not_depend_on_the_device(case: Any) -> None:
    results = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        run = case()
        with torch.device(default):
            results.append(run().detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_results_do_not_depend_on_the_dtype(case: Any, default_dtype: Any) -> None:
    results = []
    for default in (torch.float32, torch.float64):
        torch.manual_seed(0)
        run = case()
        default_dtype(default)
        results.append(run().detach().clone())
        default_dtype(torch.float32)
    assert results[1].dtype == torch.float32
    assert torch.equal(*results)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_files_of_any_dtype(
    dtype: torch.dtype, default: torch.dtype, default_dtype: Any, tmp_path: Path
) -> None:
    model = ImprovedSSM(3, 2, normalize_observations=True).to(dtype)
    save_model(tmp_path / "one.safetensors", model)
    default_dtype(default)
    loaded = load_model(tmp_path / "one.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.obs_norm.mean.dtype == torch.float64
    save_model(tmp_path / "other.safetensors", loaded)
    assert (tmp_path / "other.safetensors").read_bytes() == (
        tmp_path / "one.safetensors"
    ).read_bytes()
    policy = load_policy(tmp_path / "one.safetensors")
    expected = torch.float32 if dtype == torch.bfloat16 else dtype
    action, _ = policy.predict(X[0, 0].numpy())
    assert torch.from_numpy(action).dtype == expected


def test_models_of_the_default_dtype_train(default_dtype: Any) -> None:
    default_dtype(torch.float64)
    weight = _ppo("Pendulum-v1")()
    assert weight.dtype == torch.float64
    assert bool(weight.isfinite().all())


@pytest.mark.parametrize(
    ("trainer", "model"),
    [
        (PPOTrainer, ImprovedSSM),
        (MetaRLTrainer, ImprovedSSM),
        (PolicyGradientTrainer, partial(StateSpaceModel, 8)),
    ],
    ids=["PPO", "meta-RL", "REINFORCE"],
)
def test_trainers_name_a_model_in_half_precision(
    trainer: Any, model: Any, default_dtype: Any
) -> None:
    default_dtype(torch.bfloat16)
    with pytest.raises(TypeError, match=r"float32 or float64 to train, got torch.bfloat16"):
        trainer(model(4, 2))


def test_a_step_that_is_imported_under_another_default_device(tmp_path: Path) -> None:
    program = """
import torch
torch.set_default_device("meta")
from ssm_fast.checkpoint import load_model, save_model
from ssm_fast.core import ImprovedSSM
from ssm_fast.native.step import step_plan
torch.set_default_device("cpu")
model = ImprovedSSM(3, 2)
with torch.no_grad():
    assert step_plan(model, torch.randn(4, 3), model.init_hidden(4))
meta = model.to("meta")
with torch.no_grad():
    action = meta.get_action(torch.empty(4, 3, device="meta"))[0]
assert action.device.type == "meta"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
