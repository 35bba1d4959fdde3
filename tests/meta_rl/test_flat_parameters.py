from __future__ import annotations

import torch
from torch import nn

from ssm_fast.meta_rl.flat_parameters import FlatParameters


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
        mine.step()
        flat.write()
        theirs.zero_grad(set_to_none=False)
        (other[2](other[1](other[0](x))).square().sum() + 0.0 * other[3](x[:, :2]).sum()).backward()
        expected = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        theirs.step()
        torch.testing.assert_close(norm, expected)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_read_takes_what_changed_in_the_model() -> None:
    model = _model()
    flat = FlatParameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    flat.read()
    assert bool((flat.vector == 2.0).all())
    assert flat.vector.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)
