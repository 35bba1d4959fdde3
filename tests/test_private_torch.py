"""`ssm_fast._torch`: one test a behaviour, and no private name of torch anywhere else."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_fast import _torch

SOURCES = Path(__file__).parent.parent / "ssm_fast"


def inside(transform: Any, question: Any, x: Tensor) -> Any:
    """What a question answers inside a transform."""
    answers: list[Any] = []

    def f(x: Tensor) -> Tensor:
        answers.append(question(x))
        return x.sum()

    transform(f, x)
    return answers[0]


def _vmap(f: Any, x: Tensor) -> None:
    vmap(f)(x)


def _grad(f: Any, x: Tensor) -> None:
    grad(f)(x)


def _jvp(f: Any, x: Tensor) -> None:
    jvp(f, (x,), (x,))


def _jvp_of_jvp(f: Any, x: Tensor) -> None:
    jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x,))


X = torch.randn(3, 2)


@pytest.mark.parametrize("transform", [_vmap, _grad, _jvp])
def test_transforms_are_active(transform: Any) -> None:
    assert not _torch.transforms_are_active()
    assert inside(transform, lambda _: _torch.transforms_are_active(), X)


def test_forward_mode_is_active() -> None:
    assert not _torch.forward_mode_is_active()
    assert inside(_jvp, lambda _: _torch.forward_mode_is_active(), X)
    assert not inside(_grad, lambda _: _torch.forward_mode_is_active(), X)
    with torch.autograd.forward_ad.dual_level():
        assert _torch.forward_mode_is_active()


def test_forward_modes_are_nested() -> None:
    assert inside(_jvp_of_jvp, lambda _: _torch.forward_modes_are_nested(), X)
    for transform in (_jvp, _grad, _vmap):
        assert not inside(transform, lambda _: _torch.forward_modes_are_nested(), X)


def test_is_plain() -> None:
    with torch.inference_mode():
        assert _torch.is_plain(torch.zeros(2))
    plain = (X, X[:, :1], X.t(), nn.Parameter(X), X.requires_grad_(False), torch.zeros(0))
    assert all(_torch.is_plain(x) for x in plain)
    with FakeTensorMode():
        assert not _torch.is_plain(torch.zeros(2))
    zero = torch._efficientzerotensor((2,))
    assert not any(
        map(_torch.is_plain, (X.to("meta"), torch.zeros(2, dtype=torch.cfloat).conj(), zero))
    )
    for transform in (_vmap, _grad, _jvp):
        assert not inside(transform, _torch.is_plain, X)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_is_watched() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    assert not _torch.is_watched()
    with Mode():
        assert _torch.is_watched()
    with torch.profiler.profile():
        assert _torch.is_watched()
    answers: list[bool] = []
    torch.jit.trace(lambda x: (answers.append(_torch.is_watched()), x + 1)[1], X)
    assert answers[0]


def test_has_function_mode() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    assert not _torch.has_function_mode()
    with torch.device("cpu"):
        assert not _torch.has_function_mode()
    with Mode():
        assert _torch.has_function_mode()


def test_direct_apply() -> None:
    class Double(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * grad  # a factor of its own, to be seen

    apply, x = _torch.direct_apply(Double), X.clone().requires_grad_()
    (of_x,) = torch.autograd.grad(apply(x).sum(), x)
    assert torch.equal(of_x, torch.full_like(X, 3.0))
    assert torch.equal(vmap(apply)(X), 2 * X)
    assert torch.equal(grad(lambda x: apply(x).sum())(X), torch.full_like(X, 3.0))


def test_hooks() -> None:
    def hook(*_: Any) -> None:
        pass

    linear = nn.Linear(2, 2)
    assert not _torch.is_hooked(linear)
    for register in (
        linear.register_forward_hook,
        linear.register_forward_pre_hook,
        linear.register_full_backward_hook,
        linear.register_full_backward_pre_hook,
    ):
        handle = register(hook)
        assert _torch.is_hooked(linear)
        assert sum(map(bool, _torch.registries(linear))) == 2  # the parameters, and the hook
        handle.remove()
        assert not _torch.is_hooked(linear)
    assert not _torch.has_global_hooks()
    handle = register_module_forward_hook(hook)
    assert _torch.has_global_hooks()
    assert _torch.is_hooked(linear)
    handle.remove()
    assert not _torch.has_global_hooks()


def test_hooks_of_gradients() -> None:
    linear = nn.Linear(2, 2)
    assert not _torch.has_gradient_hooks(linear.weight)
    handle = linear.weight.register_hook(lambda grad: grad)
    assert _torch.has_gradient_hooks(linear.weight)
    handle.remove()
    assert not _torch.has_gradient_hooks(linear.weight)


def test_steps_are_watched() -> None:
    adam = torch.optim.Adam(nn.Linear(2, 2).parameters())
    assert not _torch.steps_are_watched(adam)
    for register in (adam.register_step_pre_hook, adam.register_step_post_hook):
        handle = register(lambda *_: None)
        assert _torch.steps_are_watched(adam)
        handle.remove()
    handle = register_optimizer_step_post_hook(lambda *_: None)
    assert _torch.steps_are_watched(adam)
    handle.remove()
    assert not _torch.steps_are_watched(adam)


def test_lists_of_tensors() -> None:
    x = [torch.ones(2), torch.ones(3)]
    y = copy.deepcopy(x)
    _torch.add_all(x, y, alpha=0.5)
    assert all(torch.equal(a, 1.5 * b) for a, b in zip(x, y, strict=True))
    _torch.copy_all(x, y)
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


# Private names of modules, tensors and optimizers of torch.
_OF_OBJECTS = {
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_current_level"),
}


def _private_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from filter(_is_private, names)
        elif isinstance(node, ast.Attribute):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            of_torch = isinstance(root, ast.Name) and root.id == "torch"
            if node.attr in _OF_OBJECTS or (of_torch and _is_private(node.attr)):
                yield node.attr


@pytest.mark.parametrize(
    "path",
    sorted(p for p in SOURCES.rglob("*.py") if p.name != "_torch.py" and "kernels" not in p.parts),
    ids=lambda path: str(path.relative_to(SOURCES)),
)
def test_private_names_live_in_one_module(path: Path) -> None:
    found = sorted(set(_private_names(ast.parse(path.read_text()))))
    assert not found, f"use ssm_fast._torch in place of {found}"


def test_the_ban_sees_private_names() -> None:
    found = set(_private_names(ast.parse((SOURCES / "_torch.py").read_text())))
    assert {"_functorch", "_C", "_forward_hooks", "_foreach_add_"} <= found
