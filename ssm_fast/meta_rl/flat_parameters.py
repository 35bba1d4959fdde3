"""The parameters of a model as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssm_fast._torch import copy_all
from ssm_fast.meta_rl.distributed import World
from ssm_fast.nn.parameters import learning_rate_scales


class FlatParameters:
    """The trainable parameters of a model as one vector, for an optimizer.

    Clipping and Adam take one pass over a vector. On many small tensors their calls take most of the
    time.

    Args:
        model: Its trainable parameters have one dtype and device.
        world: The processes whose gradients are averaged.
        recurrent_lr_scale: Of the learning rate of all weights around recurrent states. None: of the
            transition matrices alone, at its default; see `learning_rate_scales`.

    Raises:
        ValueError: No parameter is trainable.

    Attributes:
        model: The model.
        vector: All of them in order ``[P]``, what the optimizer steps.
        parameters: Where its values go.
        lr_scales: The part of the learning rate of each entry ``[P]``.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World | None = None,
        recurrent_lr_scale: float | None = None,
    ) -> None:
        self.model = model
        self._world = world or World()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        if not named:
            raise ValueError("the model must have parameters that require gradients")
        self.vector = nn.Parameter(nn.utils.parameters_to_vector(self.parameters).detach())
        self._views = self._split()
        if recurrent_lr_scale is None:
            scales = learning_rate_scales(model)
        else:
            scales = learning_rate_scales(model, recurrent_lr_scale, around=True)
        parts = [torch.full_like(p.detach(), scales[name]).reshape(-1) for name, p in named]
        self.lr_scales = torch.cat(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._views = self._split()  # copies of views share no memory with the copy of the vector

    def _split(self) -> list[Tensor]:
        """Views into the vector, in the shapes of the parameters."""
        parts = torch.split(self.vector.detach(), [p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def read(self) -> None:
        """Take the model's values into the vector.

        Raises:
            ValueError: Other parameters of the model are trainable than at the start.
            TypeError: They have another dtype.
        """
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        changed = sorted(named.keys() ^ set(self._names))
        if changed:
            raise ValueError(
                "the model must train the parameters that its trainer or adapter was made with: "
                f"{changed[0]} {'is' if changed[0] in named else 'is not'} trained now"
            )
        trainable = [named[name] for name in self._names]
        for name, p, kept in zip(self._names, trainable, self.parameters, strict=True):
            if p.shape != kept.shape:
                raise ValueError(f"{name} must have shape {list(kept.shape)}, got {list(p.shape)}")
            if p.dtype != self.vector.dtype or p.device != self.vector.device:
                raise TypeError(
                    f"the model must stay {self.vector.dtype} on {self.vector.device}, as the "
                    f"trainer was made with, got {p.dtype} on {p.device}"
                )
        self.parameters = list(trainable)  # load_state_dict(..., assign=True) replaces them
        copy_all(self._views, self.parameters)

    @torch.no_grad()
    def write(self) -> None:
        """Give the vector's values to the model."""
        copy_all(self.parameters, self._views)

    def backward(
        self,
        outputs: Tensor | Sequence[Tensor],
        max_norm: float,
        weight: float = 1.0,
        gradients: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Set the vector's gradient to that of a loss; the parameters' own stay as they are.

        Args:
            outputs: The loss, a scalar; or what it is a function of. Those that no trainable
                parameter leads to count for nothing.
            max_norm: Scale the gradient down to this norm, as ``nn.utils.clip_grad_norm_`` does.
            weight: Of this process's loss in the mean over all of them.
            gradients: Of the loss with respect to each of the outputs, where it is not one of them.

        Returns:
            The norm before that.
        """
        if gradients is not None:
            pairs = zip(outputs, gradients, strict=True)
            outputs, gradients = zip(
                *[pair for pair in pairs if pair[0].requires_grad], strict=True
            )
        parts = torch.autograd.grad(
            outputs, self.parameters, gradients, allow_unused=True, materialize_grads=True
        )
        return self.use_gradient(torch.cat([part.reshape(-1) for part in parts]), max_norm, weight)

    def use_gradient(self, gradient: Tensor, max_norm: float, weight: float = 1.0) -> Tensor:
        """`backward` with a precomputed gradient ``[P]``, which is overwritten."""
        gradient = self._world.average(gradient, weight)
        norm: Tensor = torch.linalg.vector_norm(gradient)
        self.vector.grad = gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
