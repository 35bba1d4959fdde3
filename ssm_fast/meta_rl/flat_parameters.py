"""The parameters of a model as one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_fast.meta_rl.distributed import World


class FlatParameters:
    """The trainable parameters of a model as one vector, for an optimizer.

    Clipping and Adam take one pass over the vector, instead of one over each of many small tensors,
    where the passes themselves take no time and all that leads to them does.

    Args:
        model: Its trainable parameters have one dtype and device.
        world: The processes whose gradients are averaged.

    Attributes:
        vector: All of them in order ``[P]``, what the optimizer steps.
    """

    def __init__(self, model: nn.Module, world: World | None = None) -> None:
        self._model = model
        self._world = world or World()
        self._parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.vector = nn.Parameter(nn.utils.parameters_to_vector(self._parameters).detach())
        self._views: list[Tensor] = [
            part.view_as(p)
            for part, p in zip(
                torch.split(self.vector.detach(), [p.numel() for p in self._parameters]),
                self._parameters,
                strict=True,
            )
        ]

    @torch.no_grad()
    def read(self) -> None:
        """Take the model's values into the vector.

        Raises:
            ValueError: Other parameters of the model are trainable than at the start.
        """
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        if [p.shape for p in trainable] != [p.shape for p in self._parameters]:
            raise ValueError("the model must train the parameters that the trainer was made with")
        self._parameters = list(trainable)  # load_state_dict(..., assign=True) replaces them
        torch._foreach_copy_(self._views, self._parameters)

    @torch.no_grad()
    def write(self) -> None:
        """Give the vector's values to the model."""
        torch._foreach_copy_(self._parameters, self._views)

    def backward(self, loss: Tensor, max_norm: float, weight: float = 1.0) -> Tensor:
        """Set the vector's gradient to that of ``loss``; the parameters' own stay as they are.

        Args:
            loss: A scalar.
            max_norm: Scale the gradient down to this norm, as ``nn.utils.clip_grad_norm_`` does.
            weight: Of this process's loss in the mean over all of them.

        Returns:
            The norm before that.
        """
        gradients = torch.autograd.grad(
            loss, self._parameters, allow_unused=True, materialize_grads=True
        )
        gradient = torch.cat([gradient.reshape(-1) for gradient in gradients])  # [P]
        gradient = self._world.average(gradient, weight)
        norm: Tensor = torch.linalg.vector_norm(gradient)
        self.vector.grad = gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
