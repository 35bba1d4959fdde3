from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_fast.core import ImprovedSSM
from ssm_fast.core.rollout_policy import RolloutPolicy, _NativeRolloutPolicy

B, T, I, K, N, L = 4, 7, 3, 2, 5, 2


def _model(kind: type[ImprovedSSM] = ImprovedSSM, **options: Any) -> ImprovedSSM:
    torch.manual_seed(0)
    model = kind(I, K, N, 8, L, normalize_observations=True, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


class Own(ImprovedSSM):
    def get_action(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().get_action(*arguments, **options)


@pytest.mark.parametrize(
    ("kind", "options", "native"),
    [
        (ImprovedSSM, {}, True),
        (ImprovedSSM, {"critic_dim": 6, "norm": "state"}, True),
        (ImprovedSSM, {"discrete": True}, False),
        (Own, {}, False),
    ],
)
def test_plays_as_get_action(
    kind: type[ImprovedSSM], options: dict[str, Any], native: bool
) -> None:
    model = _model(kind, **options)
    x, state = torch.randn(B, T, I).double(), torch.randn(L, B, N).double()
    first, kept = state, state.clone()
    with torch.no_grad():
        policy = RolloutPolicy.of(model, x[:, 0].contiguous(), state, T + 1)
        assert isinstance(policy, _NativeRolloutPolicy) == native
        expected = []
        for t in range(T):
            noise = model.draw_noise(B).repeat_interleave(2, 1)[:, ::2]  # not contiguous
            action, is_finite = policy.act(x[:, t], noise)
            *outputs, state = model.get_action(x[:, t], state, noise=noise)
            expected.append(outputs)
            assert is_finite
            assert torch.equal(torch.from_numpy(action), outputs[0])
            ended = torch.tensor([t == 2, False, True, t == 4])
            policy.end_episodes(ended)
            state = state.masked_fill(ended[:, None], 0.0)
            assert torch.equal(policy.state, state)
    for found, column in zip(policy.recorded(), zip(*expected, strict=True), strict=True):
        assert torch.equal(found, torch.stack(column, 1))
        assert found.is_contiguous()
    assert torch.equal(first, kept)


@pytest.mark.parametrize("kind", [ImprovedSSM, Own])
@pytest.mark.parametrize("name", ["actor.weight", "critic.bias", "log_std"])
def test_tells_of_a_step_that_is_not_finite(kind: type[ImprovedSSM], name: str) -> None:
    model, x = _model(kind), torch.randn(B, I).double()
    with torch.no_grad():
        policy = RolloutPolicy.of(model, x, model.init_hidden(B), 2)
        assert policy.act(x, model.draw_noise(B))[1]
        dict(model.named_parameters())[name].view(-1)[0] = float("nan")
        assert not policy.act(x, model.draw_noise(B))[1]


def test_wrong_tensors() -> None:
    model, x = _model(), torch.randn(B, I).double()
    with torch.no_grad():
        policy, noise = RolloutPolicy.of(model, x, model.init_hidden(B), 1), model.draw_noise(B)
        for wrong in (noise[:1], noise[:, :1]):
            with pytest.raises(ValueError, match="noise must have shape"):
                policy.act(x, wrong)
        with pytest.raises(TypeError, match="noise"):
            policy.act(x, noise.float())
        for bad in (x[:1], x[:, :1], x.float()):
            with pytest.raises(ValueError, match="x must be"):
                policy.act(bad, noise)
        policy.act(x, noise)
        with pytest.raises(ValueError, match="for step 1"):
            policy.act(x, noise)
