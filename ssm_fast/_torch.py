"""The private names of torch that the package uses, each behind a word. No other module uses any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._functorch.utils import unwrap_dead_wrappers
from torch.nn.modules import module as _modules
from torch.optim import optimizer as _optimizers
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

__all__ = [
    "add_all",
    "copy_all",
    "direct_apply",
    "forward_mode_is_active",
    "forward_modes_are_nested",
    "has_function_mode",
    "has_global_hooks",
    "has_gradient_hooks",
    "is_hooked",
    "is_plain",
    "is_watched",
    "registries",
    "steps_are_watched",
    "transforms_are_active",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
]

transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""True inside a transform of ``torch.func``, such as ``vmap`` or ``grad``."""

add_all = torch._foreach_add_
"""``add_all(x, y, alpha=a)`` adds ``a * y[i]`` to every ``x[i]``, in few kernels."""

copy_all = torch._foreach_copy_
"""``copy_all(x, y)`` copies every ``y[i]`` into ``x[i]``, in few kernels."""


def forward_mode_is_active() -> bool:
    """True inside ``torch.autograd.forward_ad.dual_level`` and inside ``jvp``."""
    return torch.autograd.forward_ad._current_level >= 0


def forward_modes_are_nested() -> bool:
    """True inside a ``jvp`` of a ``jvp``."""
    levels = retrieve_all_functorch_interpreters()
    return sum(level.key() == TransformType.Jvp for level in levels) > 1


def _keys(x: Tensor) -> int:
    return torch._C._dispatch_keys(x).raw_repr()


with torch.inference_mode():
    _PLAIN = {_keys(torch.empty(0, device="cpu"))}
_PLAIN.add(_keys(torch.empty(0, device="cpu")))


def is_plain(x: Tensor) -> bool:
    """True if a kernel may read ``x.data_ptr()`` directly.

    That is a CPU tensor that is not fake, functorch-wrapped, lazily conjugated or negated, or a zero
    tensor without memory.
    """
    return _keys(x) in _PLAIN


def is_watched() -> bool:
    """True if a compiler, a tracer, a mode or a profiler wants to see each op."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
    )


def has_function_mode() -> bool:
    """True if a mode sees the calls of torch's functions, other than that of a default device."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not DeviceContext for mode in modes)


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for calls that pass every argument by position.

    It skips what torch does to fill in defaults: inspecting the signature of ``forward`` takes longer
    than the rest of ``apply``, in each call outside functorch.
    """
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def run(*arguments: Any) -> Any:
        if transforms_are_active():
            return custom_function_call(function, *arguments)
        return apply(*unwrap_dead_wrappers(arguments))

    return run


_GLOBAL_HOOKS = (
    _modules._global_forward_hooks,
    _modules._global_forward_pre_hooks,
    _modules._global_backward_hooks,
    _modules._global_backward_pre_hooks,
)


def has_global_hooks() -> bool:
    """True if a hook is registered for all modules."""
    return any(_GLOBAL_HOOKS)


def is_hooked(module: nn.Module) -> bool:
    """True if a call of the module runs a hook, forward or backward, its own or a global one."""
    return bool(
        any(_GLOBAL_HOOKS)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def registries(module: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries of a module's parameters, buffers, modules and hooks."""
    return [
        module._parameters,
        module._buffers,
        module._modules,
        module._forward_hooks,  # type: ignore[list-item]
        module._forward_pre_hooks,  # type: ignore[list-item]
        module._backward_hooks,  # type: ignore[list-item]
        module._backward_pre_hooks,  # type: ignore[list-item]
    ]


def has_gradient_hooks(tensor: Tensor) -> bool:
    """True if a hook is registered on the gradient of a tensor."""
    return bool(tensor._backward_hooks)


def steps_are_watched(optimizer: torch.optim.Optimizer) -> bool:
    """True if a hook runs before or after a step of the optimizer, its own or a global one."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _optimizers._global_optimizer_pre_hooks
        or _optimizers._global_optimizer_post_hooks
    )
