from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

class Sweep(Enum):
    forward = 0
    tangent = 1
    adjoint = 2

class _Kernel(Protocol):
    def __call__(
        self, *arguments: Tensor | float | bool | Sequence[int] | Sweep | None
    ) -> None: ...

class Step_float32:
    def run(
        self,
        rows: int,
        x: int,
        state: int,
        reset: int,
        noise: int,
        action: int,
        log_prob: int,
        value: int,
        next_state: int,
    ) -> bool: ...

class Step_float64(Step_float32): ...

class Network_float32:
    def __init__(
        self,
        trunk: Sequence[Mapping[str, Any]],
        branches: Sequence[tuple[Sequence[Mapping[str, Any]], bool]],
        elements: Sequence[int],
        log_std: int,
    ) -> None: ...
    def stepper(
        self,
        weights: Sequence[int],
        statistics: Sequence[int],
        obs_options: Sequence[float],
        groups: int,
    ) -> Step_float32: ...
    def task_gradients(
        self,
        vectors: Sequence[int],
        inner: Sequence[Any],
        outer: Sequence[Any],
        tasks: int,
        first_order: bool,
    ) -> None: ...
    def ppo_epoch(
        self,
        rollout: Sequence[int],
        sequences: Sequence[int],
        order: int,
        counts: Sequence[int],
        loss: Sequence[float],
        clip_value_loss: bool,
        adam: Sequence[int],
        values: Sequence[int],
        settings: Sequence[float],
        steps: int,
        metrics: int,
    ) -> int: ...

class Network_float64(Network_float32): ...

class Pass_float32:
    def forward(
        self,
        network: Network_float32,
        weights: Sequence[int],
        x: int,
        state: int,
        reset: int,
        outputs: Sequence[int],
        B: int,
        T_len: int,
    ) -> None: ...
    def backward(
        self, network: Network_float32, grad_outputs: Sequence[int], gradient: int
    ) -> None: ...

class Pass_float64(Pass_float32): ...

def isa() -> str: ...
def available_isas() -> list[str]: ...
def num_threads() -> int: ...
def on_new_thread(function: Callable[[], object]) -> None: ...

dense_scan_float32: _Kernel
dense_scan_float64: _Kernel
norm_scan_float32: _Kernel
norm_scan_float64: _Kernel
weight_grad_float32: _Kernel
weight_grad_float64: _Kernel
linear_scan_float32: _Kernel
linear_scan_float64: _Kernel
linear_scan_complex64: _Kernel
linear_scan_complex128: _Kernel
gae_float32: _Kernel
gae_float64: _Kernel
discounted_returns_float32: _Kernel
discounted_returns_float64: _Kernel
output_norm_float32: _Kernel
output_norm_float64: _Kernel
output_norm_grad_float32: _Kernel
output_norm_grad_float64: _Kernel
linear_float32: _Kernel
linear_float64: _Kernel
linear_grad_float32: _Kernel
linear_grad_float64: _Kernel
linear_tangent_float32: _Kernel
linear_tangent_float64: _Kernel
