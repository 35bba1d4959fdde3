"""An `SSM` as a TorchRL module, beside its ``LSTMModule`` and ``GRUModule``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from tensordict import TensorDictBase, unravel_key, unravel_key_list
from tensordict.nn import TensorDictModuleBase, dispatch
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import recurrent_mode

from ssm_fast.nn import SSM

NestedKey: TypeAlias = str | tuple[str, ...]


class SSMModule(TensorDictModuleBase):
    """``GRUModule`` with an `SSM` in place of the ``nn.GRU``.

    By default each entry of the tensordict is one step, as in a collector: the state is read from
    ``in_keys[1]`` (zeros where ``is_init`` is set or there is none) and the new one written. Under
    ``torchrl.modules.set_recurrent_mode(True)``, which TorchRL's losses set themselves and its
    value estimators do not, the last dimension is time: a sequence goes on from its first stored
    state and, inside it, from the one stored where ``is_init`` is set, all in one call and under
    ``vmap`` too. The state after every step is written, where ``GRUModule`` writes the last of each
    episode.

    Args:
        input_size: Number of input features ``I``.
        hidden_size: Number of output features ``H``.
        num_layers: Number of layers ``L``.
        in_key: Key of the input ``[..., I]``; the state's is then ``"recurrent_state"``.
        in_keys: Instead, the keys of input and state ``[..., L, N]``, and of ``is_init`` where
            that is another.
        out_key: Key of the output ``[..., H]``; the state's is then ``("next", "recurrent_state")``.
        out_keys: Instead, the keys of output and state.
        ssm: An `SSM` to use, instead of the sizes; with ``batch_first``.
        default_recurrent_mode: What holds where no ``set_recurrent_mode`` does.
        **options: Further arguments of `SSM`.

    Raises:
        ValueError: If keys or sizes are missing, given twice or too many, or ``ssm`` is time-major.
    """

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        num_layers: int = 1,
        *,
        in_key: NestedKey | None = None,
        in_keys: Sequence[NestedKey] | None = None,
        out_key: NestedKey | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        ssm: SSM | None = None,
        default_recurrent_mode: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if ssm is None and input_size is not None and hidden_size is not None:
            ssm = SSM(input_size, hidden_size, num_layers, **{"batch_first": True} | options)
        elif ssm is None or input_size is not None or hidden_size is not None or options:
            raise ValueError("either ssm, or input_size and hidden_size, must be given")
        if not ssm.batch_first:
            raise ValueError("ssm must have batch_first=True")
        self.ssm = ssm
        self.in_keys = _keys("in", in_key, in_keys, "recurrent_state")
        self.out_keys = _keys("out", out_key, out_keys, ("next", "recurrent_state"))
        if len(self.in_keys) == 2:
            self.in_keys.append("is_init")
        if (len(self.in_keys), len(self.out_keys)) != (3, 2):
            raise ValueError(
                "in_keys must be those of input, state and is_init, out_keys those of output and "
                f"state, got {self.in_keys} and {self.out_keys}"
            )
        self.default_recurrent_mode = default_recurrent_mode

    @property
    def recurrent_mode(self) -> bool:
        """Whether the last dimension of a tensordict is time."""
        mode = recurrent_mode()
        return self.default_recurrent_mode if mode is None else mode

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Read the input, the state and ``is_init``; write the output and the new state.

        Raises:
            ValueError: In recurrent mode, the tensordict has new states but not those before them, or
                no dimension of time.
        """
        ssm = self.ssm
        x_key, state_key, init_key = self.in_keys
        x, is_init = tensordict[x_key], tensordict[init_key]  # [..., I], [..., 1]
        state = tensordict.get(state_key, None)  # [..., L, N]
        batch = x.shape[:-1]
        L, N = ssm.num_layers, ssm.state_size
        if state is None:
            if self.recurrent_mode and self.out_keys[1] in tensordict.keys(include_nested=True):
                raise ValueError(
                    f"{state_key!r} must be in what was collected: without the environment's transform "
                    "make_tensordict_primer() every step has started from zeros"
                )
            state = x.new_zeros(*batch, L, N)
        if self.recurrent_mode:
            if not batch:
                raise ValueError("in recurrent mode the tensordict must have a time dimension")
            B, T = batch[:-1].numel(), batch[-1]
            x, state, is_init = (
                x.reshape(B, T, -1),
                state.reshape(B, T, L, N),
                is_init.reshape(B, T),
            )
            y, state = ssm.replay(x, state, reset=is_init)  # [B, T, H], [B, T, L, N]
        else:
            B = batch.numel()
            x, state, is_init = x.reshape(B, -1), state.reshape(B, L, N), is_init.reshape(B)
            y, state = ssm.step(x, state.transpose(0, 1), reset=is_init)  # [B, H], [L, B, N]
            state = state.transpose(0, 1)  # [B, L, N]
        tensordict.set(self.out_keys[0], y.reshape(*batch, -1))
        tensordict.set(self.out_keys[1], state.reshape(*batch, L, N))
        return tensordict

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that gives an environment's tensordicts the state that they start from.

        Raises:
            ValueError: If the new state's key is not ``("next", in_keys[1])``.
        """
        state_key = self.in_keys[1]
        if self.out_keys[1] != unravel_key(("next", state_key)):
            raise ValueError(
                f"out_keys[1] must be ('next', in_keys[1]) for an environment to hand the state "
                f"on, got {self.out_keys[1]!r} and {state_key!r}"
            )
        dtype = next(self.ssm.parameters()).dtype
        shape = (self.ssm.num_layers, self.ssm.state_size)
        return TensorDictPrimer({state_key: Unbounded(shape, dtype=dtype)}, expand_specs=True)


def _keys(
    name: str, key: NestedKey | None, keys: Sequence[NestedKey] | None, state_key: NestedKey
) -> list[NestedKey]:
    if keys is None and key is not None:
        keys = [key, state_key]
    elif keys is None or key is not None:
        raise ValueError(f"either {name}_key or {name}_keys must be given, and not both")
    return list(unravel_key_list(list(keys)))
