"""Policies for sb3-contrib's ``RecurrentPPO`` with an `SSM` where it has an LSTM."""

from __future__ import annotations

from typing import Any

from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from torch import Tensor, nn

from ssm_fast.nn import SSM


class MlpSSMPolicy(RecurrentActorCriticPolicy):
    """``MlpLstmPolicy`` with an `SSM` in place of each ``nn.LSTM``.

    ``policy_kwargs`` are those of ``MlpLstmPolicy``, by the same names: ``lstm_hidden_size`` (of
    the output and of the state), ``n_lstm_layers``, ``shared_lstm``, ``enable_critic_lstm``, ...
    A sequence is one call, whether or not episodes begin inside it. Of the LSTM's two states,
    which ``RecurrentPPO`` stores, the second stays as it is: zero.

    Args:
        *args: Those of ``MlpLstmPolicy``.
        lstm_kwargs: Further arguments of `SSM`; ``{"norm": "state"}`` when ``None``, whose states
            cannot run away, however fast a critic learns from rewards of any size.
        **kwargs: Those of ``MlpLstmPolicy``.

    Raises:
        ValueError: If ``lstm_kwargs`` has ``batch_first`` or ``state_size``.
    """

    def __init__(
        self, *args: Any, lstm_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lstm_kwargs = {"norm": "state"} if lstm_kwargs is None else lstm_kwargs
        for name in ("batch_first", "state_size"):  # RecurrentPPO stores states of hidden_size
            if name in self.lstm_kwargs:
                raise ValueError(f"lstm_kwargs must leave {name} to the policy")
        for name in ("lstm_actor", "lstm_critic"):
            lstm = getattr(self, name)
            if lstm is not None:
                setattr(self, name, _in_place_of(lstm, self.lstm_kwargs))
        # The parent's optimizer holds the parameters of the LSTMs.
        options = {"lr": self.optimizer.param_groups[0]["lr"]} | self.optimizer_kwargs
        self.optimizer = self.optimizer_class(self.parameters(), **options)

    @staticmethod
    def _process_sequence(
        features: Tensor,
        lstm_states: tuple[Tensor, Tensor],
        episode_starts: Tensor,
        lstm: Any,
    ) -> tuple[Tensor, Any]:
        """Run ``B`` sequences of features ``[B * T, I]`` with their ``episode_starts`` ``[B * T]``."""
        h, unused = lstm_states  # [L, B, N]
        B = h.shape[1]
        if features.shape[0] == B:
            y, h = lstm.step(features, h, reset=episode_starts)  # [B, H]
            return y, (h, unused)
        x = features.reshape(B, -1, features.shape[1])  # [B, T, I]
        y, h = lstm(x, h, reset=episode_starts.view(B, -1))  # [B, T, H]
        return y.flatten(0, 1), (h, unused)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """What ``policy.save`` needs beside the weights."""
        return super()._get_constructor_parameters() | {
            "lstm_hidden_size": self.lstm_output_dim,
            "n_lstm_layers": self.lstm_actor.num_layers,
            "share_features_extractor": self.share_features_extractor,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
        }


class CnnSSMPolicy(MlpSSMPolicy, RecurrentActorCriticCnnPolicy):
    """``CnnLstmPolicy`` with an `SSM` in place of each ``nn.LSTM``; see `MlpSSMPolicy`."""


class MultiInputSSMPolicy(MlpSSMPolicy, RecurrentMultiInputActorCriticPolicy):
    """``MultiInputLstmPolicy`` with an `SSM` in place of each ``nn.LSTM``; see `MlpSSMPolicy`."""


def _in_place_of(lstm: nn.LSTM, options: dict[str, Any]) -> SSM:
    return SSM(lstm.input_size, lstm.hidden_size, lstm.num_layers, batch_first=True, **options)
