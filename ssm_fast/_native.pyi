from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

class Sweep(Enum):
    forward = 0
    tangent = 1
    adjoint = 2

class _Kernel(Protocol):
    def __call__(self, *arguments: float | bool | Sequence[int] | Sweep) -> None: ...

class _SequenceGradient:
    def __init__(
        self,
        weights: Sequence[int],
        gradients: Sequence[int],
        sizes: Sequence[int],
        residual: bool,
        eps: float,
    ) -> None: ...
    def forward(
        self, x: int, state: int, reset: int, mean: int, value: int, S: int, T_len: int
    ) -> None: ...
    def backward(self, grad_mean: int, grad_value: int) -> None: ...
    def ppo_epoch(
        self,
        rollout: Sequence[int],
        sequences: Sequence[int],
        order: int,
        counts: Sequence[int],
        loss: Sequence[float],
        clip_value_loss: bool,
        log_std: Sequence[int],
        adam: Sequence[int],
        values: Sequence[tuple[int, int]],
        settings: Sequence[float],
        steps: int,
        figures: int,
    ) -> int: ...

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
state_space_gradients_float32: _Kernel
state_space_gradients_float64: _Kernel
policy_gradients_float32: _Kernel
policy_gradients_float64: _Kernel
SequenceGradient_float32: type[_SequenceGradient]
SequenceGradient_float64: type[_SequenceGradient]
policy_step_float32: _Kernel
policy_step_float64: _Kernel
