"""Adaptation to a task with replay of earlier experience beside it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssm_fast.adaptation.policy_objective import Experience, PolicyObjective, policy_batch
from ssm_fast.adaptation.standard_adapter import (
    LossFn,
    StandardAdaptationConfig,
    StandardAdapter,
    check_batch,
    supervised_loss,
)
from ssm_fast.checks import check_count, check_kind, check_number
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.experience.experience_buffer import ExperienceBuffer

_POLICY_FIELDS = ("log_probs", "rewards", "terminated", "truncated", "next_observations")


@dataclass(frozen=True)
class HybridAdaptationConfig(StandardAdaptationConfig):
    """How `HybridAdapter` adapts: as `StandardAdaptationConfig`, and from replay.

    Attributes:
        experience_batch_size: Sequences that every gradient step draws from the buffer.
        experience_weight: Weight ``w`` of their loss; the current batch has ``1 - w``.
        sequence_length: Steps of each sequence; fewer where the buffer holds fewer.
        gamma: Discount factor of replayed rewards.
        gae_lambda: Weight of longer returns in their advantages.
        reward_scale: Rewards are divided by it, see `policy_batch`; None is what
            `adapt_to_environment` measures, and 1 in a loop of one's own.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A count is no integer.
    """

    experience_batch_size: int = 32
    experience_weight: float = 0.5
    sequence_length: int = 32
    gamma: float = 0.99
    gae_lambda: float = 0.95
    reward_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("experience_batch_size", self.experience_batch_size)
        check_count("sequence_length", self.sequence_length)
        check_number("experience_weight", self.experience_weight, at_least=0.0, at_most=1.0)
        check_number("gamma", self.gamma, at_least=0.0, at_most=1.0)
        check_number("gae_lambda", self.gae_lambda, at_least=0.0, at_most=1.0)
        if self.reward_scale is not None:
            check_number("reward_scale", self.reward_scale, above=0.0)


class HybridAdapter(StandardAdapter):
    """`StandardAdapter` on ``(1 - w) current + w replay``.

    Replay is of sequences, each from the recurrent state that was stored with its first step, with
    the resets inside it. Under a `PolicyObjective` the actions of a sequence count by their
    clipped importance ratio, and their advantages come from the model's present values
    (`policy_batch`); under any other loss the stored ``targets`` are the ``y``.

    Args:
        model: Where adaptation starts from. It is copied and never changed.
        config: How to adapt.
        experience_buffer: What is replayed; `add_experience` or anybody else fills it. It must
            store ``state``, the state before each step, and ``reset``; for a `PolicyObjective` also
            ``log_probs``, ``rewards``, ``terminated``, ``truncated`` and ``next_observations``, the
            actions being the ``targets``. By default a new one of 10,000 steps.

    Attributes:
        experience_buffer: What is replayed; `reset_to_meta` leaves it as it is.
        reward_scale: What replayed rewards are divided by.

    Raises:
        TypeError: An argument is of another class, or the model's ``forward`` has no ``x`` and ``reset``.
        ValueError: The model has nothing to train, or a weight of it is not finite.
    """

    config: HybridAdaptationConfig

    def __init__(
        self,
        model: nn.Module,
        config: HybridAdaptationConfig | None = None,
        experience_buffer: ExperienceBuffer | None = None,
    ) -> None:
        config = HybridAdaptationConfig() if config is None else config
        if not isinstance(config, HybridAdaptationConfig):
            raise TypeError(f"config must be a HybridAdaptationConfig, got {type(config).__name__}")
        super().__init__(model, config)
        if not _takes_resets(model):
            raise TypeError(
                f"forward of {type(model).__name__} must have the arguments x and reset: sequences "
                "from the buffer hold episodes that begin anywhere"
            )
        if experience_buffer is None:
            device = next(self.model.parameters()).device
            experience_buffer = ExperienceBuffer(10_000, device)
        if not isinstance(experience_buffer, ExperienceBuffer):
            raise TypeError(
                "experience_buffer must be an ExperienceBuffer, "
                f"got {type(experience_buffer).__name__}"
            )
        self.experience_buffer = experience_buffer
        self._forget_reward_scale()

    def update_step(
        self,
        x: Any,
        y: Any,
        hidden_state: Tensor | None = None,
        loss_fn: LossFn | None = None,
    ) -> tuple[float, int]:
        """Take the gradient steps of one batch, each with a draw of its own from the buffer.

        Arguments and result are those of `StandardAdapter.update_step`; an empty buffer has no
        weight, and the loss is then that of the batch alone.

        Raises:
            ValueError: A shape does not fit, the batch is empty, or the buffer lacks a field.
            TypeError: A dtype does not fit.
            FloatingPointError: A loss, gradient or weight is not finite. Nothing has changed then.
        """
        check_batch(x, y)
        chosen = supervised_loss if loss_fn is None else loss_fn
        w = self.config.experience_weight if len(self.experience_buffer) > 0 else 0.0

        def loss_of(_: int) -> Tensor:
            if w == 0.0:
                return chosen(self.model, x, y, hidden_state)
            replay = chosen(self.model, *self._draw(chosen))
            if w == 1.0:
                return replay
            return (1.0 - w) * chosen(self.model, x, y, hidden_state) + w * replay

        return self._descend(loss_of, lambda: self._distribution(x, y, hidden_state))

    def reset_to_meta(self) -> None:
        """Go back to the weights of the start, bitwise, with a new optimizer and average.

        ``reward_scale`` is that of the config again. The buffer stays as it is: what came before is
        what replay is for, and the buffer may be shared. To begin a task without the steps of
        another, give ``experience_buffer`` a new one.
        """
        super().reset_to_meta()
        self._forget_reward_scale()

    def _forget_reward_scale(self) -> None:
        scale = self.config.reward_scale
        self.reward_scale = 1.0 if scale is None else scale

    def add_experience(self, experience: Experience) -> None:
        """Store what a policy did, with the states that the present weights come to."""
        check_kind(self.model, ImprovedSSM)
        with torch.no_grad():
            _, states = self.model.unroll(
                experience.observations, experience.initial_state, experience.reset
            )  # [L, B, T, N]
        before = experience.states_before(states)  # [L, B, T, N]
        for row in range(len(experience.rewards)):
            self.experience_buffer.extend(
                experience.observations[row],
                experience.actions[row],
                reset=experience.reset[row],
                state=before[:, row].movedim(1, 0),  # [T, L, N]
                temperature=experience.temperature[row],
                **{name: getattr(experience, name)[row] for name in _POLICY_FIELDS},
            )

    def _draw(self, loss_fn: LossFn) -> tuple[Any, Any, Tensor]:
        """``x``, ``y`` and state of sequences from the buffer."""
        sequences = self._sequences()
        if "initial_state" not in sequences:
            raise ValueError(
                "experience_buffer must store 'state', the recurrent state before each step: "
                "sequences from a state of zero are not what the model saw"
            )
        state = sequences["initial_state"]  # [n, L, N], or [n, N] of a model of one state
        state = state.movedim(0, 1) if state.ndim == 3 else state
        if not isinstance(loss_fn, PolicyObjective):
            x = {"x": sequences["observations"], "reset": sequences["reset"]}
            return x, sequences["targets"], state
        missing = [name for name in _POLICY_FIELDS if name not in sequences]
        if missing:
            raise ValueError(f"experience_buffer must store {missing} for a PolicyObjective")
        experience = Experience(
            observations=sequences["observations"],
            actions=sequences["targets"],
            reset=sequences["reset"],
            temperature=sequences.get("temperature", torch.ones_like(sequences["rewards"])),
            initial_state=state,
            **{name: sequences[name] for name in _POLICY_FIELDS},
        )
        return policy_batch(
            cast(ImprovedSSM, self.model),
            experience,
            self.config.gamma,
            self.config.gae_lambda,
            reward_scale=self.reward_scale,
        )

    def _sequences(self) -> dict[str, Tensor]:
        """As long as asked for, or as the pieces in the buffer allow."""
        length = min(self.config.sequence_length, self.experience_buffer.longest_sequence())
        return self.experience_buffer.sample_sequences(self.config.experience_batch_size, length)


def _takes_resets(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return anything or {"x", "reset"} <= {p.name for p in parameters}
