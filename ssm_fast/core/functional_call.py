"""Calling a model with other weights than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """``torch.func.functional_call`` for models that use a parameter or a module more than once.

    Torch swaps the weights of a module that has two names twice, and puts the second back last: the
    model is left with tensors in the place of its parameters. Here every place is swapped once.

    Args:
        model: The model. It stays as it is.
        weights: By the names of ``model.named_parameters()``; what is missing is the model's own.
        args: Of ``forward``, by place.
        kwargs: Of ``forward``, by name.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    places = {
        f"{path}.{leaf}" if path else leaf: names[id(p)]
        for path, module in model.named_modules()
        for leaf, p in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    chosen = {place: weights[name] for place, name in places.items() if name in weights}
    return torch.func.functional_call(model, chosen, args, kwargs, tie_weights=False)
