"""One second-order meta-update in several ways: MetaMAML, and what users write over an eager loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from fresh_process import added_memory, in_fresh_process
from references import dense_scan_loop
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.meta_rl.meta_maml import MetaMAML

if TYPE_CHECKING:
    from collections.abc import Callable

INNER_LR, OUTER_LR = 0.01, 1e-3
SIZES = {"G": 20, "B": 20, "T": 100, "N": 64, "I": 17, "O": 6, "H": 128}


class LoopModel(StateSpaceModel):
    """The same model, its recurrence an eager loop over time; the rest takes all steps at once."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = dense_scan_loop(F.linear(x, self.B), self.A)
        return self.C(s) + F.linear(x, self.D), s[:, -1]


class UnbindModel(StateSpaceModel):
    """The loop with ``unbind``, whose gradient does not fill one array of all steps for each step."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = F.linear(x, self.B)
        state, states = u.new_zeros(u.shape[0], u.shape[2]), []
        for u_t in u.unbind(1):
            state = torch.addmm(u_t, state, self.A.T)
            states.append(state)
        s = torch.stack(states, 1)
        return self.C(s) + F.linear(x, self.D), s[:, -1]


class Stepped(nn.Module):
    """A whole model one step at a time, as in the project that this one re-imagines."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        state, outputs = None, []
        for x_t in x.unbind(1):
            y, *_, state = self.model(x_t, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state


def looped_update(model: nn.Module, tasks: list[tuple[Tensor, ...]]) -> Callable[[], None]:
    """One task after the other; gradients add up in the parameters, so that each graph is freed."""
    adam = torch.optim.Adam(model.parameters(), lr=OUTER_LR)
    parameters = dict(model.named_parameters())

    def run() -> None:
        adam.zero_grad()
        for support_x, support_y, query_x, query_y in tasks:
            loss = F.mse_loss(model(support_x)[0], support_y)
            inner = torch.autograd.grad(
                loss, list(parameters.values()), create_graph=True,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            adapted = {
                name: p - INNER_LR * g
                for (name, p), g in zip(parameters.items(), inner, strict=True)
            }
            output, _ = functional_call(model, adapted, (query_x,))
            (F.mse_loss(output, query_y) / len(tasks)).backward()
        adam.step()

    return run


def vmapped_update(model: nn.Module, tasks: list[tuple[Tensor, ...]]) -> Callable[[], None]:
    """All tasks under torch.func.vmap, the inner gradient by torch.func.grad."""
    adam = torch.optim.Adam(model.parameters(), lr=OUTER_LR)
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, weights, (x,))[0], y)

    def query_loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        inner = grad(loss)(parameters, sx, sy)
        return loss({n: p - INNER_LR * inner[n] for n, p in parameters.items()}, qx, qy)

    def run() -> None:
        adam.zero_grad()
        batch = (torch.stack(part) for part in zip(*tasks, strict=True))
        vmap(query_loss)(*batch).mean().backward()
        adam.step()

    return run


def meta_maml(
    loss_fn: Any = None, **options: Any
) -> Callable[[nn.Module, list[tuple[Tensor, ...]]], Any]:
    def update(model: nn.Module, tasks: list[tuple[Tensor, ...]]) -> Callable[[], float]:
        maml = MetaMAML(model, INNER_LR, OUTER_LR, **options)
        return lambda: maml.meta_update(tasks, loss_fn=loss_fn)

    return update


MODELS: dict[str, Callable[..., nn.Module]] = {
    "StateSpaceModel": lambda N, I, O, H, kind=StateSpaceModel: kind(N, I, O, H),
    "ImprovedSSM": lambda N, I, O, H: ImprovedSSM(I, O, N, H),
    "ImprovedSSM norm=state": lambda N, I, O, H: ImprovedSSM(I, O, N, H, norm="state"),
}
OURS: dict[str, Callable[..., Callable[[], Any]]] = {
    "MetaMAML": meta_maml(),
    "MetaMAML chunk_size=1": meta_maml(chunk_size=1),
    "MetaMAML, all tasks at once": meta_maml(chunk_size=SIZES["G"]),
    "MetaMAML first_order": meta_maml(first_order=True),
    "MetaMAML, a loss_fn of one's own": meta_maml(
        lambda output, target: (output - target).square().mean()
    ),
}
PEERS: dict[str, Callable[..., Callable[[], Any]]] = {
    "model loop, tasks looped": lambda model, tasks: looped_update(Stepped(model), tasks),
    "model loop, tasks vmapped": lambda model, tasks: vmapped_update(Stepped(model), tasks),
}
SCAN_LOOPS: dict[str, tuple[type[StateSpaceModel], Callable[..., Callable[[], Any]]]] = {
    "scan loop, tasks looped": (LoopModel, looped_update),
    "scan loop, tasks vmapped": (LoopModel, vmapped_update),
    "scan loop of unbind, tasks vmapped": (UnbindModel, vmapped_update),
}


def updates_of(kind: str) -> list[str]:
    """Names of the updates that there are for a model."""
    return [*OURS, *PEERS, *(SCAN_LOOPS if kind == "StateSpaceModel" else ())]


def make_update(
    kind: str, name: str, G: int, B: int, T: int, N: int, I: int, O: int, H: int
) -> Callable[[], Any]:
    """An update of a model on a regression of random sequences."""
    torch.manual_seed(0)
    if name in SCAN_LOOPS:
        loop, update = SCAN_LOOPS[name]
        model = MODELS[kind](N, I, O, H, loop)
    else:
        update, model = (OURS | PEERS)[name], MODELS[kind](N, I, O, H)
    x, y = torch.randn(G, 2, B, T, I), torch.randn(G, 2, B, T, O)
    return update(model, [(x[g, 0], y[g, 0], x[g, 1], y[g, 1]) for g in range(G)])


def products(
    kind: str, G: int, B: int, T: int, N: int, I: int, O: int, H: int
) -> Callable[[], None]:
    """The matrix products that a second-order update cannot do without, as torch.bmm alone.

    Of a matrix between activations, four times each: outputs, gradients of the inputs, gradients
    of the matrix (support and query set, and two of the second derivative). The matrices at the
    observations have three, and no gradients of the inputs.
    """
    first, hidden = _matrices(kind, N, I, O, H)
    calls = []
    for inputs, outputs in first + hidden:
        x, g = torch.randn(G, B * T, inputs), torch.randn(G, B * T, outputs)
        w, y = torch.randn(G, outputs, inputs), torch.empty_like(g)
        x_grad, w_grad = torch.empty_like(x), torch.empty_like(w)
        if (inputs, outputs) in first:
            calls += [(x, w.mT, y), (g.mT, x, w_grad)] * 3
        else:
            calls += [(x, w.mT, y), (g, w, x_grad), (g.mT, x, w_grad)] * 4

    def run() -> None:
        for left, right, out in calls:
            torch.bmm(left, right, out=out)

    return run


def one_product(
    kind: str, G: int, B: int, T: int, N: int, I: int, O: int, H: int
) -> Callable[[], None]:
    """As many operations as `products` has, in one product of square matrices: what the machine can do."""
    first, hidden = _matrices(kind, N, I, O, H)
    macs = sum(6 * a * b for a, b in first) + sum(12 * a * b for a, b in hidden)
    size = round((G * B * T * macs) ** (1 / 3))
    left, right, out = (torch.randn(size, size) for _ in range(3))

    def run() -> None:
        torch.mm(left, right, out=out)

    return run


def _matrices(
    kind: str, N: int, I: int, O: int, H: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Inputs and outputs of the matrices at the observations, and of those between activations."""
    if kind == "StateSpaceModel":
        return [(I, N), (I, O)], [(N, N), (N, H), (H, O)]
    layer = [(H, N), (N, N), (N, H), (H, H)]
    return [(I, H)], [*layer, *layer, (H, O)]


def peak_memory(kind: str, name: str, **sizes: int) -> float:
    """MiB that an update adds to a fresh process."""
    return in_fresh_process(_memory_of, kind, name, sizes)


def _memory_of(kind: str, name: str, sizes: dict[str, int]) -> float:
    make_update(kind, name, **(sizes | {"G": 2, "B": 2, "T": 4}))()  # what every process pays once
    return added_memory(make_update(kind, name, **sizes))
