"""Playing a checkpoint in anybody's loop, with Stable-Baselines3's ``predict``."""

from __future__ import annotations

import json
import os
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ssm_fast.checkpoint import load_checkpoint
from ssm_fast.checks import check_kind, describe_spaces
from ssm_fast.core import ImprovedSSM, StateSpaceModel


class Policy:
    """A model that takes and returns NumPy arrays.

    Args:
        model: An `ImprovedSSM`, or a `StateSpaceModel` whose outputs are the logits of a discrete
            action space. It normalises observations itself if it was trained to.
        action_low: Lower bounds of continuous actions ``[K]``; not clipped when ``None``.
        action_high: Upper bounds ``[K]``.

    Raises:
        ValueError: If the bounds do not fit the model or each other, or no number of the model's dtype
            lies between them.
        TypeError: If ``model`` is another one, or wrapped.
    """

    def __init__(
        self,
        model: ImprovedSSM | StateSpaceModel,
        action_low: ArrayLike | None = None,
        action_high: ArrayLike | None = None,
    ) -> None:
        check_kind(model, ImprovedSSM, StateSpaceModel)
        self.model = model
        self.action_low = self._bounds("action_low", action_low)
        self.action_high = self._bounds("action_high", action_high)
        self._rounded: dict[np.dtype[Any], tuple[NDArray[Any], NDArray[Any]]] = {}
        self._bounds_in(_array(next(model.parameters()).detach()[:0]).dtype)

    def __repr__(self) -> str:
        name, model = type(self).__name__, type(self.model).__name__
        return f"{name}({model}, {describe_spaces(*spaces_of(self.model))})"

    def predict(
        self,
        obs: ArrayLike,
        state: NDArray[Any] | None = None,
        episode_start: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Choose actions, as Stable-Baselines3's ``predict`` does.

        Args:
            obs: One observation ``[I]`` or a batch ``[B, I]``.
            state: What the last call returned; ``None`` at the start. It is not modified.
            episode_start: ``[B]`` booleans (one for a single observation): the state of such a
                row is zeroed before it is used.
            deterministic: The mode of the distribution instead of a sample (drawn with torch's
                global generator).

        Returns:
            - The action: ``[K]`` or ``[B, K]`` in the model's dtype (float32 for bfloat16), clipped
                to the bounds; of a discrete space int64, a NumPy scalar or ``[B]``.
            - The next state, ``[L, B, N]`` (`StateSpaceModel`: ``[B, N]``), ``B`` 1 for a single
                observation.

        Raises:
            ValueError: If a shape does not fit, or an observation or state is not finite.
            TypeError: If ``obs`` is not numeric.
        """
        x = self._tensor("obs", obs)  # [I] or [B, I]
        if x.ndim not in (1, 2) or x.shape[-1] != self.model.input_dim:
            raise ValueError(
                f"obs must have shape [I] or [B, I] with I = {self.model.input_dim}, "
                f"got {list(x.shape)}; where the space has more dimensions, flatten one by "
                "obs.reshape(-1) and a batch by obs.reshape(len(obs), -1), as Environment does"
            )
        single = x.ndim == 1
        if single:
            x = x.unsqueeze(0)  # [1, I]
        h = None if state is None else self._tensor("state", state)
        reset = None
        if episode_start is not None:
            starts = np.asarray(episode_start)
            if starts.size != x.shape[0]:
                raise ValueError(
                    f"episode_start must have shape [B] = [{x.shape[0]}], got {list(starts.shape)}"
                )
            reset = torch.tensor(starts.reshape(-1) != 0, device=x.device)  # [B]
        with torch.inference_mode():
            action, h = self._act(x, h, reset, deterministic)
        actions = _array(action)  # [B, K] or [B]
        if self.action_low is not None or self.action_high is not None:
            actions = np.clip(actions, *self._bounds_in(actions.dtype))
        return actions[0] if single else actions, _array(h)

    def _act(
        self, x: Tensor, h: Tensor | None, reset: Tensor | None, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        if isinstance(self.model, ImprovedSSM):
            action, _, _, h = self.model.get_action(x, h, deterministic, reset)
            return action, h
        logits, h = self.model(x, h, reset)  # [B, K], [B, N]
        if not deterministic:
            logits = logits - torch.empty_like(logits).exponential_().log()  # Gumbel-max
        return logits.argmax(-1), h

    def _tensor(self, name: str, values: ArrayLike) -> Tensor:
        array = np.asarray(values, order="C")
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name} must be numeric, got dtype {array.dtype}")
        weight = next(self.model.parameters())
        tensor = torch.tensor(array, dtype=weight.dtype, device=weight.device)
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or Inf")
        return tensor

    def _bounds_in(self, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The bounds in the dtype of the actions, rounded inwards: no action lies beyond them."""
        if dtype not in self._rounded:
            low = -np.inf if self.action_low is None else self.action_low
            high = np.inf if self.action_high is None else self.action_high
            if bool(np.any(low > high)):
                raise ValueError("action_low must not exceed action_high")
            least, most = _round(low, dtype, np.inf), _round(high, dtype, -np.inf)
            if bool(np.any(least > most)):
                raise ValueError(f"action_low and action_high must have a {dtype} between them")
            self._rounded[dtype] = least, most
        return self._rounded[dtype]

    def _bounds(self, name: str, values: ArrayLike | None) -> NDArray[np.float64] | None:
        if values is None:
            return None
        model = self.model
        if not isinstance(model, ImprovedSSM) or model.discrete:
            raise ValueError(f"{name} must be None for discrete actions")
        bounds = np.array(values, dtype=np.float64)
        if bounds.shape != (model.action_dim,) or bool(np.isnan(bounds).any()):
            raise ValueError(
                f"{name} must hold {model.action_dim} numbers, one per action component, "
                f"got {bounds.tolist()}"
            )
        return bounds


def _array(x: Tensor) -> NDArray[Any]:
    """A NumPy array, which has no bfloat16."""
    return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()


def _round(bounds: ArrayLike, dtype: np.dtype[Any], towards: float) -> NDArray[Any]:
    """Bounds in another dtype, rounded towards one side."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(bounds).astype(dtype)
    short = rounded < bounds if towards > 0 else rounded > bounds
    result: NDArray[Any] = np.where(short, np.nextafter(rounded, dtype.type(towards)), rounded)
    return result


def spaces_of(model: ImprovedSSM | StateSpaceModel) -> tuple[int, int, bool]:
    """The sizes of observations and actions, and whether these are discrete."""
    if isinstance(model, ImprovedSSM):
        return model.input_dim, model.action_dim, model.discrete
    return model.input_dim, model.output_dim, True


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Load a checkpoint for playing.

    Bounds of the actions come from the header's ``action_low`` and ``action_high`` (JSON lists),
    where it has them.

    Args:
        path: A file of `ssm_fast.checkpoint.save_model` or ``model.save``, or a run folder of
            `ssm-fast train`, whose ``policy.safetensors`` is taken.

    Returns:
        The policy, its model in evaluation mode.

    Raises:
        ValueError: If the file is not a sound checkpoint; the message names it.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "policy.safetensors")
    model, metadata = load_checkpoint(path)
    try:
        bounds = {
            key: json.loads(metadata[key])
            for key in ("action_low", "action_high")
            if key in metadata
        }
        return Policy(cast("ImprovedSSM | StateSpaceModel", model.eval()), **bounds)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r}: action bounds in the header: {error}") from error
