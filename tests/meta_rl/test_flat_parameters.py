from __future__ import annotations

import pytest
import torch
from torch import nn

from ssm_fast.meta_rl.flat_adam import FlatAdam
from ssm_fast.meta_rl.flat_parameters import FlatParameters
from ssm_fast.nn import SSMLayer
from ssm_fast.nn.parameters import learning_rate_scales


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 2))
    model[2].bias.requires_grad_(False)
    return model


def test_adam_on_the_vector_equals_adam_on_the_parameters() -> None:
    one, other = _model(), _model()
    flat = FlatParameters(one)
    mine = torch.optim.Adam([flat.vector], lr=0.1)
    theirs = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(5, 3)
    for _ in range(4):
        norm = flat.backward(one[2](one[1](one[0](x))).square().sum(), 0.5)  # not the last layer
        FlatAdam(flat, mine).step()
        theirs.zero_grad(set_to_none=False)
        (other[2](other[1](other[0](x))).square().sum() + 0.0 * other[3](x[:, :2]).sum()).backward()
        expected = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        theirs.step()
        torch.testing.assert_close(norm, expected)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("scale", "slow"),
    [(None, {"A": 0.1}), (0.3, {"A": 0.3, "B": 0.3, "C": 0.3, "bias": 0.3}), (1.0, {})],
)
def test_weights_learn_at_their_scale(scale: float | None, slow: dict[str, float]) -> None:
    torch.manual_seed(0)
    layer = SSMLayer(3, 4, 5, norm="output")
    model = nn.ModuleDict({"layer": layer})
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    flat = FlatParameters(model, recurrent_lr_scale=scale)
    target = torch.randn(2, 6, 4)
    flat.backward((layer(torch.randn(2, 6, 3))[0] - target).square().sum(), 1.0)
    FlatAdam(flat, torch.optim.Adam([flat.vector], lr=0.01, eps=0.0)).step()
    for name, parameter in layer.named_parameters():  # Adam's first step has one length
        length = (parameter - before[name]).abs()
        expected = torch.full_like(length, 0.01 * slow.get(name, 1.0))
        torch.testing.assert_close(length, expected, rtol=1e-3, atol=1e-6)


def test_a_norm_within_the_recurrence_is_around_the_state() -> None:
    def scaled(norm: str) -> set[str]:
        scales = learning_rate_scales(SSMLayer(3, 4, 5, norm=norm), 0.5, around=True)
        return {name for name, scale in scales.items() if scale == 0.5}

    assert scaled("output") == {"A", "B", "C", "bias"}
    assert scaled("state") == {"A", "B", "C", "bias", "norm.weight", "norm.bias"}


def test_read_takes_what_changed_in_the_model() -> None:
    model = _model()
    flat = FlatParameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    flat.read()
    assert bool((flat.vector == 2.0).all())
    assert flat.vector.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_read_follows_replaced_parameters_and_refuses_frozen_ones() -> None:
    model = _model()
    flat = FlatParameters(model)
    state = {name: torch.full_like(value, 3.0) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model[2].bias.requires_grad_(False)
    flat.read()
    assert bool((flat.vector == 3.0).all())
    flat.backward(model[0](torch.ones(1, 3)).sum(), 1.0)
    assert float(flat.vector.grad.norm()) > 0.0
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="must train the parameters"):
        flat.read()


def test_read_names_what_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.requires_grad_(False)
    flat = FlatParameters(model)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight is not trained now"):
        flat.read()
    model[1].weight.requires_grad_(True)  # as many numbers as before, of another weight
    with pytest.raises(ValueError, match=r"0\.weight is not trained now"):
        flat.read()
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.weight is trained now"):
        flat.read()
    model[1].weight.requires_grad_(False)
    model[0].bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"0\.bias must have shape \[3\], got \[2\]"):
        flat.read()
