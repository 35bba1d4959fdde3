"""A whole network's step without gradients, in one native call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ssm_fast.native.plan import Plan, Reason, plan_of, unavailable


def step_plan(model: nn.Module, *inputs: Tensor | None) -> Plan | Reason:
    """How a step of a model is one native call, or why it is none.

    Args:
        model: The model.
        inputs: Observations ``[B, I]``, and what else the step reads, or ``None``.
    """
    plan = plan_of(model)
    if not plan:
        return plan
    if len(plan.stages.branches) != 2:
        return Reason("the model gives no values")
    sentence = unavailable(*inputs)
    if sentence is None and (x := inputs[0]) is not None and x.dtype != plan.dtype:
        sentence = f"x is {x.dtype}, the parameters are {plan.dtype}"
    return plan if sentence is None else Reason(sentence)


class PolicyStep:
    """One step of a recurrent actor-critic in one native call.

    Internal to the models: shapes are not validated. Weights are located once, here. Changed values
    are seen, replaced tensors are not.

    Args:
        plan: Of the model; no call of this object is checked against it.
        addresses: Of the parameters, 0 for one that no stage reads.
        groups: ``G``, where every parameter has that leading dimension: the rows are then those of
            the groups, ``B / G`` of each, one group after the other.
        holds: Tensors that own the memory. The model's parameters unless given, in aliases that keep
            it even where a parameter gets another.
    """

    def __init__(
        self,
        plan: Plan,
        addresses: Sequence[int],
        groups: int = 1,
        holds: Sequence[Tensor] | None = None,
    ) -> None:
        norm = plan.stages.obs_norm
        statistics = () if norm is None else (norm.mean, norm.var)
        self._holds = holds or [p.detach() for p in plan.parameters], statistics
        self._groups = groups
        self._step = plan.network(2).stepper(
            addresses,
            tuple(x.data_ptr() for x in statistics) or (0, 0),
            (0.0, 0.0) if norm is None else (norm.eps, norm.clip),
            groups,
        )
        self.outputs, self.states = plan.outputs, plan.states
        self.is_gaussian = plan.stages.log_std is not None

    def __call__(
        self, x: Tensor, state: Tensor | None, reset: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Run the step.

        Args:
            x: Observations ``[B, I]``, float32 or float64.
            state: ``[L, B, N]``; zeros if None.
            reset: Boolean ``[B]``, or None: where set, the incoming state is zeroed.
            noise: Standard normal draws ``[B, K]``, contiguous; None for the mode, and for a
                discrete policy.

        Returns:
            The action ``[B, K]`` (the logits without a ``log_std``), its log-probability ``[B]``
            (None without a ``log_std``), the value ``[B]`` and the next state ``[L, B, N]``.
        """
        x = x.contiguous()
        state = None if state is None else state.contiguous()
        reset = None if reset is None else reset.contiguous()
        B = len(x)
        action, value = x.new_empty(B, self.outputs), x.new_empty(B)
        log_prob = x.new_empty(B) if self.is_gaussian else None
        next_state = x.new_empty(len(self.states), B, self.states[0])
        self.run(
            B,
            x.data_ptr(),
            _address(state),
            _address(reset),
            _address(noise),
            action.data_ptr(),
            _address(log_prob),
            value.data_ptr(),
            next_state.data_ptr(),
        )
        return action, log_prob, value, next_state

    def run(self, rows: int, *addresses: int) -> bool:
        """Run the step of so many rows on the addresses of contiguous tensors, 0 for None.

        Args:
            rows: ``B``.
            addresses: Of x, state, reset, noise, action, log_prob, value and next_state.

        Returns:
            Whether the values, and the log-probabilities where there are some, are finite.
        """
        finite: bool = self._step.run(rows // self._groups, *addresses)
        return finite


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
