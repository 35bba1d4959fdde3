"""Linear layers, tanh and LayerNorm in the fused kernels, where modules are as torch makes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_fast._torch import is_hooked
from ssm_fast.ops.dispatch import needs_autograd
from ssm_fast.ops.layer_norm import normalised
from ssm_fast.ops.linear import linear
from ssm_fast.ops.output_norm import fused_output

ROWS = 256  # from which on `linear` is faster than torch's product, whose call costs less


def runs_fused(x: Tensor) -> bool:
    """Whether `ops.linear` is the faster one for rows ``x``.

    torch's own product is so for few rows, on a GPU, in half precision and under a compiler. The
    compiler is asked first: it would make the number of rows a condition of the compiled code.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and x.numel() >= ROWS * x.shape[-1]
    )


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """``x Wᵀ``, plus a bias ``[O]`` or plus ``add`` ``[..., O]``."""
    if runs_fused(x):
        return linear(x, weight, bias, add)
    if add is None:
        return F.linear(x, weight, bias)
    rows = torch.addmm(add.flatten(0, -2), x.flatten(0, -2), weight.t())
    return rows.view(add.shape)


def linear_layer(layer: nn.Module, x: Tensor, add: Tensor | None = None) -> Tensor:
    """A linear layer, without a bias and with a sum in its place where there is one to `add`."""
    if type(layer) is nn.Linear and is_untouched(layer) and (add is None or layer.bias is None):
        return product(x, layer.weight, layer.bias, add)
    y: Tensor = layer(x)
    return y if add is None else y + add


def tanh_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """The hyperbolic tangent of a linear layer, in one pass where it is as torch makes it."""
    if type(layer) is nn.Linear and is_untouched(layer) and runs_fused(x):
        return linear(x, layer.weight, layer.bias, tanh=True)
    return fused_output(layer(x), None, None, None, 1e-5, True)


def is_untouched(module: nn.Module) -> bool:
    """Whether the module has no hook and no method that was replaced on the object."""
    own = module.__dict__
    return not (calls_more(module) or "step" in own or "states" in own or "readout" in own)


def calls_more(module: nn.Module) -> bool:
    """Whether a call of the module does something beside its class's ``forward``."""
    return is_hooked(module) or "forward" in module.__dict__


def is_changed(norm: nn.Module) -> bool:
    """Whether a norm is not torch's with a weight and a bias, or has hooks: then it has to be called."""
    return (
        type(norm) is not nn.LayerNorm
        or norm.weight is None
        or norm.bias is None
        or calls_more(norm)
    )


def layer_norm(norm: nn.LayerNorm, z: Tensor) -> Tensor:
    """The norm of rows ``[B, H]``, with right derivatives of every order, which torch's has not."""
    if is_changed(norm):
        normed: Tensor = norm(z)
        return normed
    if not needs_autograd(z, norm.weight, norm.bias):
        return F.layer_norm(z, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    if z.device.type == "cpu" and z.dtype not in (torch.float32, torch.float64):
        return normalised(z, norm.eps)[0] * norm.weight + norm.bias
    return fused_output(z, norm.weight, norm.bias, None, norm.eps, False)
