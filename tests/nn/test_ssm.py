from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from layer_references import stack_loop
from references import relative_rms
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

from ssm_fast.nn import SSM

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_layer": {"num_layers": 1},
    "no_bias": {"bias": False},
    "norm_output": {"norm": "output"},
    "norm_state": {"norm": "state"},
    "residual": {"residual": True, "num_layers": 3},
    "activation": {"activation": "tanh", "residual": True, "norm": "output"},
    "state_size": {"state_size": None},
}


def make(*, dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs: Any) -> SSM:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_layers": 2, "batch_first": True, "state_size": 4}
    return SSM(3, 5, dtype=dtype, **options | kwargs)


def inputs(
    module: SSM, B: int = 3, T: int = 7, *, reset: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch-first x, h0 and a random reset mask."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, 3, dtype=torch.float64, generator=generator)
    h = torch.randn(
        module.num_layers, B, module.state_size, dtype=torch.float64, generator=generator
    )
    mask = torch.rand(B, T, generator=generator) < reset
    dtype = next(module.parameters()).dtype
    return x.to(dtype), h.to(dtype), mask


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_forward_equals_a_float64_loop_over_its_own_parameters(options: dict[str, Any]) -> None:
    module = make(**options)
    x, h0, reset = inputs(module)
    y, h_n = module(x, h0, reset=reset)
    activation = options.get("activation")
    y_ref, h_ref = stack_loop(module, x.numpy(), h0.numpy(), reset.numpy(), activation)
    np.testing.assert_allclose(y.detach(), y_ref, atol=1e-12)
    np.testing.assert_allclose(h_n.detach(), h_ref, atol=1e-12)
    np.testing.assert_allclose(
        module(x)[0].detach(), stack_loop(module, x.numpy(), None, None, activation)[0], atol=1e-12
    )


@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
def test_activations_stand_between_layers_only(activation: str) -> None:
    module = make(activation=activation)
    x, h0, _ = inputs(module)
    y_ref, _ = stack_loop(module, x.numpy(), h0.numpy(), None, activation)
    np.testing.assert_allclose(module(x, h0)[0].detach(), y_ref, atol=1e-12)
    with pytest.warns(UserWarning, match="with num_layers=1 it does nothing"):
        single = make(activation=activation, num_layers=1)
    torch.testing.assert_close(single(x)[0], make(num_layers=1)(x)[0])


def test_gelu_is_torch_gelu() -> None:
    module = make(activation="gelu")
    x, _, _ = inputs(module)
    plain = make()
    one, two = plain.layers
    expected = two(nn.functional.gelu(one(x)[0]))[0]
    torch.testing.assert_close(module(x)[0], expected)


def test_float32_equals_a_float64_loop() -> None:
    torch.manual_seed(0)
    module = SSM(17, 33, 2, batch_first=True, state_size=63, norm="output", residual=True)
    x = torch.randn(2, 65, 17)
    y, h_n = module(x)
    y_ref, h_ref = stack_loop(module, x.double().numpy(), None, None)
    assert relative_rms(y, torch.from_numpy(y_ref)) < 1e-5
    assert relative_rms(h_n, torch.from_numpy(h_ref)) < 1e-5


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_shapes_and_positional_arguments_of_gru(batch_first: bool, num_layers: int) -> None:
    arguments = (3, 5, num_layers, True, batch_first, 0.0)
    gru, ssm = nn.GRU(*arguments), SSM(*arguments)
    h0, h0_unbatched = torch.randn(num_layers, 4, 5), torch.randn(num_layers, 5)
    for x, h in ((torch.randn(4, 4, 3), h0), (torch.randn(6, 3), h0_unbatched)):
        for given in ((x,), (x, h), (x, None)):
            for ours, theirs in zip(ssm(*given), gru(*given), strict=True):
                assert ours.shape == theirs.shape
                assert ours.dtype == theirs.dtype
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
    for name in (*names, "bidirectional", "proj_size"):
        assert getattr(ssm, name) == getattr(gru, name)
    ssm.flatten_parameters()


def test_parameters_are_drawn_anew() -> None:
    module, other = make(seed=0), make(seed=1)
    torch.manual_seed(0)
    other.reset_parameters()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_time_major_equals_batch_major() -> None:
    batch_major = make()
    time_major = make(batch_first=False)
    x, h0, reset = inputs(batch_major)
    y, h_n = batch_major(x, h0, reset=reset)
    for x_t in (x.transpose(0, 1), x.transpose(0, 1).contiguous()):
        y_t, h_t = time_major(x_t, h0, reset=reset.t())
        torch.testing.assert_close(y_t.transpose(0, 1), y)
        torch.testing.assert_close(h_t, h_n)


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_equals_a_batch_of_one(batch_first: bool) -> None:
    module = make(batch_first=batch_first)
    x, h0, reset = inputs(module, B=1)
    y, h_n = module(x[0], h0[:, 0], reset=reset[0])
    y_ref, h_ref = make()(x, h0, reset=reset)
    torch.testing.assert_close(y, y_ref[0])
    torch.testing.assert_close(h_n, h_ref[:, 0])
    y_t, h_t = module.step(x[0, 0], h0[:, 0], reset=reset[0, 0])
    assert (y_t.shape, h_t.shape) == ((5,), (2, 4))
    torch.testing.assert_close(y_t, y[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_step_equals_forward(options: dict[str, Any]) -> None:
    module = make(**options)
    x, h0, reset = inputs(module)
    y, h_n = module(x, h0, reset=reset)
    h: Tensor | None = h0
    for t in range(7):
        y_t, h = module.step(x[:, t], h, reset=reset[:, t])
        torch.testing.assert_close(y_t, y[:, t], rtol=0, atol=1e-12)
    torch.testing.assert_close(h, h_n, rtol=0, atol=1e-12)
    torch.testing.assert_close(module.step(x[:, 0])[0], module(x)[0][:, 0])


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_split_in_two_equals_whole(cut: int) -> None:
    module = make(norm="output", residual=True)
    x, h0, reset = inputs(module)
    y, h_n = module(x, h0, reset=reset)
    y1, h1 = module(x[:, :cut], h0, reset=reset[:, :cut])
    y2, h2 = module(x[:, cut:], h1, reset=reset[:, cut:])
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(h2, h_n, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_reset_starts_a_sequence_anew(dtype: torch.dtype) -> None:
    module = make()
    x, h0, _ = inputs(module)
    reset = torch.zeros(3, 7, dtype=dtype)
    reset[:, 4] = 1
    y, h_n = module(x, h0, reset=reset)
    first, _ = module(x[:, :4], h0)
    second, h_second = module(x[:, 4:])
    torch.testing.assert_close(y, torch.cat([first, second], 1))
    torch.testing.assert_close(h_n, h_second)
    y_t, _ = module.step(x[:, 0], torch.full_like(h0, float("nan")), reset=torch.ones(3))
    torch.testing.assert_close(y_t, module(x)[0][:, 0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm", [None, "output", "state"])
def test_replay_restarts_from_stored_states(batch_first: bool, norm: Any) -> None:
    module = make(norm=norm, residual=True, activation="silu", batch_first=batch_first)
    x, _, reset = inputs(module)
    stored = torch.randn(3, 7, 2, 4, dtype=torch.float64)
    stored[:, 1:][~reset[:, 1:]] = float("nan")  # never read
    given = [v if batch_first else v.transpose(0, 1) for v in (x, stored, reset)]
    y, after = module.replay(given[0], given[1], reset=given[2])
    if not batch_first:
        y, after = y.transpose(0, 1), after.transpose(0, 1)
    h = stored[:, 0].transpose(0, 1)
    for t in range(7):
        h = torch.where(reset[:, t, None], stored[:, t].transpose(0, 1), h)
        y_t, h = module.step(x[:, t], h)
        torch.testing.assert_close(y[:, t], y_t)
        torch.testing.assert_close(after[:, t], h.transpose(0, 1))
    alone = make(norm=norm, residual=True, activation="silu")
    whole, _ = alone(x, stored[:, 0].transpose(0, 1))
    torch.testing.assert_close(alone.replay(x, stored)[0], whole)


def test_gradients_of_replay() -> None:
    module = make(norm="state")
    x, _, reset = inputs(module)
    stored = torch.randn(3, 7, 2, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, stored: Tensor) -> Any:
        return module.replay(x, stored, reset=reset)

    assert gradcheck(run, (x.requires_grad_(), stored), fast_mode=True)


def test_bad_replay() -> None:
    module = make()
    x, _, reset = inputs(module)
    stored = torch.zeros(3, 7, 2, 4, dtype=torch.float64)
    bad_values = [
        (
            x[0],
            stored,
            None,
            r"input must have shape \[B, T, I\] with T >= 1 and I = 3, got \[7, 3",
        ),
        (x[:, :0], stored[:, :0], None, r"T >= 1 and I = 3, got \[3, 0, 3\]"),
        (x, stored[:, 0], None, r"states must have shape \[3, 7, 2, 4\], got \[3, 2, 4\]"),
        (x, stored, reset.t(), r"reset must have shape \[3, 7\], got \[7, 3\]"),
    ]
    for x_bad, stored_bad, reset_bad, message in bad_values:
        with pytest.raises(ValueError, match=message):
            module.replay(x_bad, stored_bad, reset=reset_bad)
    with pytest.raises(TypeError, match="must have the parameters' dtype"):
        module.replay(x, stored.float())


def pack(sequences: list[Tensor], sort: bool) -> PackedSequence:
    return pack_sequence(sequences, enforce_sorted=sort)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm", [None, "output", "state"])
def test_packed_equals_each_sequence_alone(sort: bool, batch_first: bool, norm: Any) -> None:
    module = make(norm=norm, residual=True, activation="silu", batch_first=batch_first)
    alone = make(norm=norm, residual=True, activation="silu")
    lengths = [7, 4, 4, 1] if sort else [4, 7, 1, 4]
    x, h0, reset = inputs(module, B=4)
    sequences = [x[b, :length] for b, length in enumerate(lengths)]
    resets = [reset[b, :length] for b, length in enumerate(lengths)]
    y, h_n = module(pack(sequences, sort), h0, reset=pack(resets, sort))
    assert isinstance(y, PackedSequence)
    for b, (sequence, y_b) in enumerate(zip(sequences, unpack_sequence(y), strict=True)):
        y_ref, h_ref = alone(sequence[None], h0[:, b : b + 1], reset=resets[b][None])
        torch.testing.assert_close(y_b, y_ref[0])
        torch.testing.assert_close(h_n[:, b], h_ref[:, 0])
    y, h_n = module(pack(sequences, sort))
    for b, (sequence, y_b) in enumerate(zip(sequences, unpack_sequence(y), strict=True)):
        y_ref, h_ref = alone(sequence[None])
        torch.testing.assert_close(y_b, y_ref[0])
        torch.testing.assert_close(h_n[:, b], h_ref[:, 0])


def test_packed_input_may_have_garbage_in_its_padding() -> None:
    module = make(batch_first=True)
    x, _, _ = inputs(module)
    lengths = torch.tensor([2, 7, 5])
    junk = x.clone()
    for b, length in enumerate(lengths.tolist()):
        junk[b, length:] = float("nan")
    y, h_n = module(pack_padded_sequence(junk, lengths, True, enforce_sorted=False))
    y_ref, h_ref = module(pack_padded_sequence(x, lengths, True, enforce_sorted=False))
    torch.testing.assert_close(y.data, y_ref.data)
    torch.testing.assert_close(h_n, h_ref)
    padded, out_lengths = pad_packed_sequence(y, batch_first=True)
    assert torch.equal(out_lengths, lengths)
    assert padded.shape == (3, 7, 5)


def test_packed_gradients_equal_those_of_each_sequence_alone() -> None:
    module = make(norm="output")
    x, h0, _ = inputs(module)
    x.requires_grad_()
    h0.requires_grad_()
    lengths = [2, 7, 5]
    y, h_n = module(pack([x[b, :n] for b, n in enumerate(lengths)], sort=False), h0)
    leaves = (x, h0, *module.parameters())
    packed = torch.autograd.grad(y.data.square().sum() + h_n.sum(), leaves)
    loss = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths):
        y_b, h_b = module(x[b : b + 1, :length], h0[:, b : b + 1])
        loss = loss + y_b.square().sum() + h_b.sum()
    torch.testing.assert_close(packed, torch.autograd.grad(loss, leaves))


def test_dropout_acts_between_layers_in_training_only() -> None:
    module = make(dropout=1.0)
    x, _, _ = inputs(module)
    zeros = torch.zeros(3, 7, 5, dtype=torch.float64)
    silent = module.layers[1](zeros)[0]
    torch.testing.assert_close(module(x)[0], silent)
    torch.testing.assert_close(module.step(x[:, 0])[0], silent[:, 0])
    module.eval()
    torch.testing.assert_close(module(x)[0], make()(x)[0])

    module = make(dropout=0.5, residual=True)
    torch.manual_seed(0)
    first, second = module(x)[0], module(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    torch.testing.assert_close(module(x)[0], first, rtol=0, atol=0)
    # A last layer that copies its input shows what the first handed on: kept times 2, or 0.
    module = make(dropout=0.5)
    with torch.no_grad():
        module.get_parameter("layers.1.C").zero_()
        module.get_parameter("layers.1.D").copy_(torch.eye(5))
        one, _ = module.layers
        ratio = module(x)[0] / one(x)[0]
    assert bool(((ratio - 2.0).abs().lt(1e-9) | ratio.eq(0.0)).all())
    assert 0.2 < float(ratio.eq(0.0).double().mean()) < 0.8


@pytest.mark.parametrize("norm", [None, "output", "state"])
def test_gradients(norm: Any) -> None:
    torch.manual_seed(0)
    module = SSM(2, 2, 2, batch_first=True, norm=norm, residual=True, dtype=torch.float64)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    reset = torch.tensor([[0, 0, 1], [1, 1, 0]])
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, h0: Tensor, *values: Tensor) -> Any:
        weights = dict(zip(names, values, strict=True))
        return functional_call(module, weights, (x, h0), {"reset": reset})

    values = [value.detach().clone().requires_grad_() for value in module.parameters()]
    assert gradcheck(run, (x, h0, *values), fast_mode=True)  # in full in test_cells.py


@pytest.mark.parametrize("norm", [None, "output", "state"])
def test_vmap_of_grad_over_task_parameters_equals_a_loop(norm: Any) -> None:
    module = make(norm=norm, residual=True, activation="tanh")
    x, h0, reset = inputs(module)
    G = 3
    tasks = {
        name: torch.stack([value.detach() + 0.1 * torch.randn_like(value) for _ in range(G)])
        for name, value in module.named_parameters()
    }
    data = torch.stack([x + g for g in range(G)])

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y, h_n = functional_call(module, weights, (x, h0), {"reset": reset})
        result: Tensor = y.square().mean() + h_n.sin().mean()
        return result

    together = vmap(grad(loss))(tasks, data)
    for g in range(G):
        alone = grad(loss)({name: value[g] for name, value in tasks.items()}, data[g])
        for name, expected in alone.items():
            torch.testing.assert_close(together[name][g], expected, rtol=1e-9, atol=1e-12)

    only_A = {name: value for name, value in tasks.items() if name.endswith(".A")}
    together = vmap(grad(loss), in_dims=(0, None))(only_A, x)
    for g in range(G):
        alone = grad(loss)({name: value[g] for name, value in only_A.items()}, x)
        for name, expected in alone.items():
            torch.testing.assert_close(together[name][g], expected, rtol=1e-9, atol=1e-12)


def test_vmap_of_step_and_of_packed_sequences_over_task_parameters() -> None:
    module = make(norm="output")
    x, h0, _ = inputs(module)
    packed = pack([x[0], x[1, :3]], sort=True)
    tasks = {
        name: torch.stack([value.detach(), value.detach() * 1.1])
        for name, value in module.named_parameters()
    }

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, h: Tensor) -> Any:
            return self.inner.step(x, h)

    def step(weights: dict[str, Tensor]) -> Any:
        named = {f"inner.{name}": value for name, value in weights.items()}
        return functional_call(Step(), named, (x[:, 0], h0))

    def run(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y, h_n = functional_call(module, weights, (packed,))
        return y.data, h_n

    for function in (step, run):
        together = vmap(function)(tasks)
        for g in range(2):
            alone = function({name: value[g] for name, value in tasks.items()})
            torch.testing.assert_close([value[g] for value in together], list(alone))


def test_deepcopy_pickle_and_state_dict() -> None:
    module = make(norm="state", residual=True, activation="silu")
    x, h0, _ = inputs(module)
    expected = module(x, h0)[0]
    other = make(norm="state", residual=True, activation="silu", seed=7)
    assert not torch.equal(other(x, h0)[0], expected)
    other.load_state_dict(module.state_dict())
    for copied in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(copied(x, h0)[0], expected, rtol=0, atol=0)
    with torch.no_grad():
        next(copy.deepcopy(module).parameters()).zero_()
    torch.testing.assert_close(module(x, h0)[0], expected, rtol=0, atol=0)
    assert list(make(num_layers=1).state_dict()) == [
        f"layers.0.{name}" for name in ("A", "B", "C", "D", "bias")
    ]


def test_arguments_are_never_modified() -> None:
    module = make(norm="output", residual=True)
    x, h0, reset = inputs(module)
    before = x.clone(), h0.clone(), reset.clone()
    module(x, h0, reset=reset)
    module.step(x[:, 0], h0, reset=reset[:, 0])
    module(pack([x[0], x[1]], sort=True), h0[:, :2])
    torch.testing.assert_close((x, h0, reset), before, rtol=0, atol=0)


@pytest.mark.parametrize("radius", [0.0, 0.5, 0.99])
def test_spectral_radius(radius: float) -> None:
    torch.manual_seed(0)
    module = SSM(64, 64, 2, spectral_radius=radius)
    for layer in module.layers:
        torch.testing.assert_close(layer.A.mT @ layer.A, radius**2 * torch.eye(64))
    with torch.no_grad():
        y, _ = module.layers[0](torch.randn(16, 2000, 64))  # [16, 2000, 64]
    assert float(y[:, 1000:].var()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"hidden_size": 1.0}, TypeError, "hidden_size must be an int, got float"),
        ({"state_size": 0}, ValueError, "state_size must be at least 1, got 0"),
        ({"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\], got 1.5"),
        ({"dropout": float("nan")}, ValueError, "dropout must be"),
        ({"norm": "layer"}, ValueError, "norm must be None, 'output' or 'state', got 'layer'"),
        ({"activation": "swish"}, ValueError, "activation must be None or one of .*, got 'swish'"),
        ({"bidirectional": True}, ValueError, "bidirectional must be False"),
        ({"proj_size": 3}, ValueError, "proj_size must be 0, got 3"),
        ({"spectral_radius": 1.0}, ValueError, r"spectral_radius must be in \[0, 1\), got 1.0"),
        ({"spectral_radius": float("nan")}, ValueError, "spectral_radius must be"),
        ({"spectral_radius": "a"}, TypeError, "spectral_radius must be a number, got str"),
    ],
)
def test_bad_construction(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SSM(**{"input_size": 3, "hidden_size": 5} | kwargs)


def test_dropout_with_one_layer_warns_as_gru_does() -> None:
    with pytest.warns(UserWarning, match="with num_layers=1 it does nothing, got dropout=0.5"):
        SSM(3, 5, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSM(3, 5, 2, dropout=0.5)


def test_activation_with_one_layer_warns() -> None:
    with pytest.warns(
        UserWarning, match="with num_layers=1 it does nothing, got activation='gelu'"
    ):
        SSM(3, 5, activation="gelu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSM(3, 5, 2, activation="gelu")


def test_bad_input() -> None:
    module = make()
    x, h0, reset = inputs(module)
    bad_values = [
        (x[..., :2], None, None, r"input must have shape \[B, T, I\] or \[T, I\] with I = 3, got"),
        (x[None], None, None, r"got \[1, 3, 7, 3\]"),
        (x, h0[:1], None, r"hx must have shape \[L, B, N\] = \[2, 3, 4\], got \[1, 3, 4\]"),
        (x, h0[:, 0], None, r"hx must have shape \[L, B, N\] = \[2, 3, 4\], got \[2, 4\]"),
        (x[0], h0, None, r"hx must have shape \[L, N\] = \[2, 4\], got \[2, 3, 4\]"),
        (x, h0, reset.t(), r"reset must have shape \[3, 7\], .*, got \[7, 3\]"),
    ]
    for x_bad, h_bad, reset_bad, message in bad_values:
        with pytest.raises(ValueError, match=message):
            module(x_bad, h_bad, reset=reset_bad)
    with pytest.raises(ValueError, match=r"x must have shape \[B, I\] or \[I\] with I = 3"):
        module.step(x)
    with pytest.raises(ValueError, match=r"reset must have shape \[3\], .*, got \[3, 7\]"):
        module.step(x[:, 0], h0, reset=reset)
    with pytest.raises(ValueError, match=r"got \[2, 2, 4\]"):
        module.step(x[:, 0], h0[:, :2])
    for given in ((x.float(), h0), (x, h0.float()), (x.long(), h0)):
        with pytest.raises(TypeError, match="must have the parameters' dtype"):
            module(*given)
    with pytest.raises(TypeError, match="dtype"):
        module.step(x[:, 0].float(), h0)


def test_bad_packed_input() -> None:
    module = make()
    x, h0, reset = inputs(module)
    packed = pack([x[0], x[1, :3]], sort=False)
    with pytest.raises(TypeError, match="reset must be a PackedSequence, as input is one"):
        module(packed, reset=reset[:2])
    with pytest.raises(TypeError, match="reset must be a tensor, as input is one"):
        module(x, reset=pack([reset[0]], sort=True))
    for other in (
        pack([reset[0], reset[1, :4]], sort=False),
        pack([reset[1, :3], reset[0]], sort=False),
        pack([reset[0, :, None], reset[1, :3, None]], sort=False),
    ):
        with pytest.raises(ValueError, match="reset must be packed like input"):
            module(packed, reset=other)
    with pytest.raises(ValueError, match=r"hx must have shape .* = \[2, 2, 4\], got \[2, 3, 4\]"):
        module(packed, h0)
    with pytest.raises(ValueError, match=r"input.data must have shape"):
        module(pack([x[0, :, :2]], sort=True))


def test_half_precision_on_the_cpu_says_what_to_do() -> None:
    layer = SSM(3, 4).bfloat16()
    with pytest.raises(TypeError, match=r"on the CPU, keep float32 \(torch\.autocast does so"):
        layer(torch.randn(5, 2, 3, dtype=torch.bfloat16))


def test_a_pair_of_states_and_an_array_are_refused_by_name() -> None:
    layer, x, h = SSM(3, 4, batch_first=True), torch.randn(2, 5, 3), torch.zeros(1, 2, 4)
    for wrong in ([[0.0]], None):
        with pytest.raises(TypeError, match="input must be a tensor, got"):
            layer(wrong)
        with pytest.raises(TypeError, match="x must be a tensor, got"):
            layer.step(wrong)
    with pytest.raises(TypeError, match=r"hx must be one tensor \[L, B, N\], got tuple"):
        layer(x, (h, h))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="input must be a tensor, got ndarray"):
        layer(x.numpy())  # type: ignore[arg-type]
