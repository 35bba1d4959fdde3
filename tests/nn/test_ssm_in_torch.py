"""SSM under torch.compile, autocast, torch.save, torch.export and DistributedDataParallel."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence

from ssm_fast import SSM
from ssm_fast.nn import SSMLayer

NORMS = [None, "output", "state"]
L, N = 2, 4


def make(norm: Any = "state", seed: int = 0, **options: Any) -> SSM:
    torch.manual_seed(seed)
    options = {"batch_first": True, "residual": True, "activation": "gelu"} | options
    return SSM(3, 5, L, state_size=N, norm=norm, **options)


def inputs(T: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, T, 3), torch.randn(L, 3, N), torch.rand(3, T) < 0.3


def compiled(function: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("norm", NORMS)
def test_compile_sees_one_graph(norm: Any) -> None:
    module = make(norm)
    x, h0, reset = inputs()
    fast = compiled(module)
    results = []
    for run in (module, fast):
        y, h_n = run(x, h0, reset=reset)
        loss = y.square().sum() + h_n.sum()
        results.append((y, h_n, *torch.autograd.grad(loss, list(module.parameters()))))
    torch.testing.assert_close(results[1], results[0])
    with torch.no_grad():
        torch.testing.assert_close(fast(x, h0, reset=reset)[0], results[0][0])
    step = compiled(module.step)
    torch.testing.assert_close(step(x[:, 0], h0), module.step(x[:, 0], h0))
    stored = torch.randn(3, 7, L, N)
    replay = compiled(module.replay)
    torch.testing.assert_close(
        replay(x, stored, reset=reset), module.replay(x, stored, reset=reset)
    )


def test_compiled_once_for_sequences_of_any_length() -> None:
    module = make()
    frames: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        frames.append(graph)
        return graph

    torch._dynamo.reset()
    fast = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for T in (7, 9, 12):
        x, _, _ = inputs(T)
        torch.testing.assert_close(fast(x)[0], module(x)[0])
    assert len(frames) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_takes_what_it_gave(norm: Any, dtype: torch.dtype) -> None:
    """Outputs, states and packed sequences, some in half precision, some not."""
    module = make(norm, residual=False)
    x, h0, reset = inputs()
    packed = pack_sequence([x[0], x[1, :4]])

    def run() -> list[Tensor]:
        y, h_n = module(x, h0, reset=reset)
        y_next, h_next = module(y[..., :3], h_n)
        y_step, h_step = module.step(y_next[:, -1, :3], h_next)
        y_step, h_step = module.step(x[:, 0], h_step, reset=reset[:, 0])
        return [y, h_n, y_next, y_step, h_step, module(packed)[0].data]

    expected = run()
    with torch.autocast("cpu", dtype=dtype):
        results = run()
    loss = torch.zeros(())
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.float(), exact, rtol=0.1, atol=0.1)
        loss = loss + result.float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_save_and_load(tmp_path: Path) -> None:
    module, path = make(), tmp_path / "module.pt"
    x, _, _ = inputs()
    torch.save(module.state_dict(), path)
    other = make(seed=1)
    other.load_state_dict(torch.load(path, weights_only=True))
    torch.save(module, path)
    for loaded in (other, torch.load(path, weights_only=False)):
        torch.testing.assert_close(loaded(x)[0], module(x)[0], rtol=0, atol=0)


def test_a_state_dict_fits_a_compiled_module() -> None:
    module = make()
    x, _, _ = inputs()
    in_place = make(seed=1)
    in_place.compile(fullgraph=True, backend="aot_eager")
    in_place.load_state_dict(module.state_dict())
    wrapped = compiled(make(seed=2))
    wrapped.load_state_dict({f"_orig_mod.{k}": v for k, v in module.state_dict().items()})
    for other in (in_place, wrapped, copy.deepcopy(in_place), copy.deepcopy(wrapped)):
        torch.testing.assert_close(other(x)[0], module(x)[0])


def test_export() -> None:
    module = make()
    x, _, _ = inputs()
    B, T = (torch.export.Dim(name, min=2, max=64) for name in "BT")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: B, 1: T},))
    x = torch.randn(5, 11, 3)
    torch.testing.assert_close(program.module()(x)[0], module(x)[0])


WORKER = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from ssm_fast import SSM

folder, rank = sys.argv[1], int(sys.argv[2])
distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
)
torch.manual_seed(rank)  # its weights become those of rank 0
module = DistributedDataParallel(SSM(3, 5, 2, batch_first=True, norm="state", dtype=torch.float64))
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
x, reset = torch.load(f"{folder}/data.pt")
half = slice(2 * rank, 2 * rank + 2)
for _ in range(3):
    optimizer.zero_grad()
    module(x[half], reset=reset[half])[0].square().mean().backward()
    optimizer.step()
torch.save([[v.detach(), v.grad] for v in module.parameters()], f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_learn_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SSM(3, 5, 2, batch_first=True, norm="state", dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, reset = torch.randn(4, 7, 3, dtype=torch.float64), torch.rand(4, 7) < 0.3
    torch.save((x, reset), tmp_path / "data.pt")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", WORKER, str(tmp_path), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    for _ in range(3):
        optimizer.zero_grad()
        module(x, reset=reset)[0].square().mean().backward()
        optimizer.step()
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    expected = [[p.detach(), p.grad] for p in module.parameters()]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class TestHooks:
    """Layers of a stack with hooks, which a fast path must not pass over."""

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("norm", NORMS)
    def test_run_wherever_a_layer_does(self, norm: Any, batch_first: bool) -> None:
        module, other = (make(norm, batch_first=batch_first) for _ in range(2))
        calls: list[str] = []
        for layer in module.layers:
            layer.register_forward_pre_hook(lambda *_: calls.append("before"))
            layer.register_forward_hook(lambda *_: calls.append("after"))
        if norm is not None:
            module.layers[0].norm.register_forward_hook(lambda *_: calls.append("norm"))
        x, h, reset = inputs()
        if not batch_first:
            x, reset = x.transpose(0, 1), reset.transpose(0, 1)
        states = torch.randn(*x.shape[:2], L, N)
        packed = pack_sequence([x[0], x[1, :2]])

        def run(module: SSM) -> list[tuple[Tensor, Tensor]]:
            y, h_n = module(packed)
            return [
                module(x, h, reset=reset),
                (y.data, h_n),
                module.step(x[:, 0], None if not batch_first else h, reset=reset[:, 0]),
                module.replay(x, states, reset=reset),
            ]

        expected = run(other)
        for result, wanted in zip(run(module), expected, strict=True):
            torch.testing.assert_close(result, wanted)
        assert calls.count("before") == calls.count("after") == 4 * L
        assert bool(calls.count("norm")) == (norm is not None)

    def test_change_what_comes_out(self) -> None:
        module = make()
        x, h, _ = inputs()
        y, h_n = module(x, h)
        module.layers[-1].register_forward_hook(lambda module, args, out: (out[0] + 1.0, out[1]))
        torch.testing.assert_close(module(x, h), (y + 1.0, h_n))

    def test_backward(self) -> None:
        module, seen = make(), []
        module.layers[0].register_full_backward_hook(lambda *_: seen.append(1))
        module(inputs()[0].requires_grad_())[0].sum().backward()
        assert seen == [1]

    @pytest.mark.parametrize("change", ["pruned", "spectral_norm"])
    @pytest.mark.parametrize("norm", NORMS)
    def test_weights_that_a_hook_computes_train(self, norm: Any, change: str) -> None:
        module = make(norm)
        layer = module.layers[0]
        if change == "pruned":
            prune.random_unstructured(layer, "A", 0.5)
        else:
            nn.utils.spectral_norm(layer, "A")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        x, h, reset = inputs()
        for _ in range(2):
            before = layer.get_parameter("A_orig").detach().clone()
            optimizer.zero_grad()
            y, _ = module(x, h, reset=reset)
            y_step, _ = module.step(x[:, 0], h)
            (y.square().sum() + y_step.square().sum()).backward()
            optimizer.step()
            assert not torch.equal(layer.get_parameter("A_orig"), before)

    def test_a_forward_of_ones_own(self) -> None:
        class Doubled(SSMLayer):
            def forward(self, x: Tensor, s0: Any = None, reset: Any = None) -> Any:
                y, s = super().forward(x, s0, reset)
                return 2.0 * y, s

        module, other = make(), make()
        module.layers[-1] = Doubled(5, 5, N, norm="state")
        module.load_state_dict(other.state_dict())
        x, h, reset = inputs()
        module.residual = other.residual = False
        y, h_n = other(x, h, reset=reset)
        torch.testing.assert_close(module(x, h, reset=reset), (2.0 * y, h_n))
        y, h_n = other.step(x[:, 0], h)
        torch.testing.assert_close(module.step(x[:, 0], h), (2.0 * y, h_n))


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_keeps_the_state_of_steps_in_float32(norm: Any) -> None:
    module = make(norm)
    x, h, _ = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, h_n = module(x[:, :1], h)
        y_step, h_step = module.step(x[:, 0], h)
    assert h_step.dtype == torch.float32
    assert torch.equal(y_step, y[:, 0])
    assert torch.equal(h_step, h_n)


@pytest.mark.parametrize("norm", NORMS)
def test_derivatives_of_a_step(norm: Any) -> None:
    """Of every order and in every mode, where those of torch's layer_norm are wrong."""
    module = make(norm, activation=None).double()
    x, h = torch.randn(2, 3).double(), torch.randn(L, 2, N).double()

    def stepped(x: Tensor) -> Tensor:
        return module.step(x, h)[0].sin().sum()

    def whole(x: Tensor) -> Tensor:
        return module(x.unsqueeze(1), h)[0].sin().sum()

    def third(f: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        for _ in range(3):
            (grad,) = torch.autograd.grad(y, leaf, create_graph=True)
            y = grad.square().sum()
        return grad

    torch.testing.assert_close(third(stepped), third(whole))
    expected = jacrev(jacrev(whole))(x)
    for outer, inner in ((jacrev, jacfwd), (jacfwd, jacrev), (jacfwd, jacfwd)):
        torch.testing.assert_close(outer(inner(stepped))(x), expected)
