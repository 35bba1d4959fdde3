"""A recurrent actor-critic made of state-space layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_fast.checkpoint import Model
from ssm_fast.checks import check_count, check_flag, check_number, is_replaced
from ssm_fast.native.plan import Plan, Reason
from ssm_fast.native.step import PolicyStep, step_plan
from ssm_fast.nn.fused import linear_layer, runs_fused, tanh_layer
from ssm_fast.nn.parameters import orthogonal_
from ssm_fast.nn.running_norm import RunningNorm
from ssm_fast.nn.ssm_layer import Norm, SSMLayer, run_layer, step_layer
from ssm_fast.nn.stages import (
    NetworkStages,
    Stage,
    Unplanned,
    check_methods,
    linear_stage,
    overrides,
    running_norm,
)
from ssm_fast.ops.output_norm import fused_output
from ssm_fast.ops.validation import check_dtype

NORM_EPS = 1e-5  # nn.LayerNorm's own


class CriticNetwork(nn.Module):
    """What a critic reads the features of an actor through: two layers of width ``W``.

    ::

        v = tanh(V tanh(V_x x + V_h h + b) + c)

    No gradient flows into the features ``h``.

    Args:
        input_dim: Number of observation features ``I``.
        hidden_dim: Number of features of the actor ``H``.
        width: ``W``.
    """

    def __init__(self, input_dim: int, hidden_dim: int, width: int) -> None:
        super().__init__()
        self.observations = nn.Linear(input_dim, width)
        self.features = nn.Linear(hidden_dim, width, bias=False)
        self.hidden = nn.Linear(width, width)

    def init_orthogonal(self) -> None:
        """Orthogonal matrices of gain √2 and no biases."""
        for linear in (self.observations, self.features, self.hidden):
            orthogonal_(linear.weight, math.sqrt(2.0))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def stages(self, name: str) -> list[Stage]:
        """The network as native code runs it.

        Raises:
            Unplanned: Native code cannot stand in for it.
        """
        if type(self) is not CriticNetwork:
            raise Unplanned(f"{name} is a {type(self).__name__}, not a CriticNetwork")
        x = linear_stage(f"{name}.observations", self.observations)
        h = linear_stage(f"{name}.features", self.features)
        (V, bias, _), (W, (other, _), _) = x.parameters, h.parameters
        if other is not None:
            raise Unplanned(f"{name}.features has a bias")
        if x.outputs != h.outputs:
            raise Unplanned(f"{name}.observations has {x.outputs} outputs, not {h.outputs}")
        first = Stage("linear", h.inputs, h.outputs, [W, bias, V], observations=x.inputs, tanh=True)
        return [first, linear_stage(f"{name}.hidden", self.hidden, tanh=True)]

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """``[..., W]`` from normalised observations ``[..., I]`` and features ``[..., H]``."""
        if not runs_fused(x):
            v = self.observations(x) + self.features(features.detach())  # [..., W]
            out: Tensor = self.hidden(v.tanh()).tanh()  # [..., W]
            return out
        v = linear_layer(self.features, features.detach(), add=linear_layer(self.observations, x))
        return tanh_layer(self.hidden, fused_output(v, None, None, None, NORM_EPS, True))


# What a native step does in the place of these.
_STEP_METHODS = ("normalize", "_check", "_inputs", "_features", "_value")
_METHODS = ("forward", "get_action", "evaluate_actions", "log_prob_and_entropy")


class ImprovedSSM(Model):
    """Actor and critic on a shared stack of state-space layers.

    ::

        h⁰ = tanh(W x + w)                           x normalised first, if asked for
        h^l = h^{l-1} + tanh(SSMLayer_l(h^{l-1}))    without the sum if use_residual is off
        mean = W_a h^L + w_a,  value = W_c h^L + w_c,  log_std a parameter of its own

    The tanh after each layer keeps the features bounded whatever the recurrence does, which is
    what a clipped policy update expects. Each layer owns a state.

    Methods may be overridden in a subclass or an object. `forward`, `get_action` and
    `evaluate_actions` do not call each other: who changes the distribution changes all three.

    With ``discrete`` the actor's output holds the logits of ``action_dim`` actions, and there is
    no ``log_std``.

    Args:
        input_dim: Number of observation features ``I``.
        action_dim: Number of action components, or of actions when ``discrete``, ``K``.
        state_dim: Size of each layer's state ``N``.
        hidden_dim: Width of the layers ``H``.
        num_layers: Number of layers ``L``.
        use_layer_norm: Whether the layers have a LayerNorm.
        use_residual: Whether each layer adds to its input.
        discrete: Whether the action space is discrete.
        norm: Where the LayerNorm stands when ``use_layer_norm``: ``"output"`` or ``"state"``.
        orthogonal_init: Orthogonal encoder and critic's network (gain √2), actor (0.01) and critic
            (1); otherwise ``nn.Linear``'s own initialisation.
        log_std_init: Initial log standard deviation of each action component.
        normalize_observations: Whether the model normalises observations by running statistics,
            kept in the submodule ``obs_norm`` (which ``forward`` does not update).
        critic_dim: Width of a network of the critic's own, through which it reads the features: the
            errors of the value then leave the features to the actor. The critic is linear if None.

    Attributes:
        obs_norm: ``RunningNorm`` or ``None``.
        critic_network: ``CriticNetwork`` or ``None``.
        log_std: ``[K]``, or ``None`` when ``discrete``.

    Raises:
        ValueError: If a size is less than 1, ``norm`` unknown or ``log_std_init`` not finite.
        TypeError: If a size is not an integer, or a flag no bool.
    """

    log_std: Tensor | None
    obs_norm: RunningNorm | None
    critic_network: CriticNetwork | None

    def __init__(
        self,
        input_dim: int,
        action_dim: int,
        state_dim: int = 64,
        hidden_dim: int = 128,
        num_layers: int = 2,
        use_layer_norm: bool = True,
        use_residual: bool = True,
        *,
        discrete: bool = False,
        norm: Literal["output", "state"] = "output",
        orthogonal_init: bool = True,
        log_std_init: float = -0.5,
        normalize_observations: bool = False,
        critic_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.input_dim = check_count("input_dim", input_dim)
        self.action_dim = check_count("action_dim", action_dim)
        self.state_dim = check_count("state_dim", state_dim)
        self.hidden_dim = check_count("hidden_dim", hidden_dim)
        self.num_layers = check_count("num_layers", num_layers)
        if norm not in ("output", "state"):
            raise ValueError(f"norm must be 'output' or 'state', got {norm!r}")
        self.log_std_init = check_number("log_std_init", log_std_init)
        self.use_layer_norm = check_flag("use_layer_norm", use_layer_norm)
        self.use_residual = check_flag("use_residual", use_residual)
        self.discrete = check_flag("discrete", discrete)
        self.norm = norm
        self.orthogonal_init = check_flag("orthogonal_init", orthogonal_init)

        if check_flag("normalize_observations", normalize_observations):
            self.obs_norm = RunningNorm(input_dim)
        else:
            self.register_module("obs_norm", None)
        layer_norm: Norm | None = norm if use_layer_norm else None
        self.encoder = nn.Linear(input_dim, hidden_dim)
        self.layers = nn.ModuleList(
            SSMLayer(hidden_dim, hidden_dim, state_dim, norm=layer_norm) for _ in range(num_layers)
        )
        self.actor = nn.Linear(hidden_dim, action_dim)
        if critic_dim is None:
            self.register_module("critic_network", None)
        else:
            critic_dim = check_count("critic_dim", critic_dim)
            self.critic_network = CriticNetwork(input_dim, hidden_dim, critic_dim)
        self.critic = nn.Linear(critic_dim or hidden_dim, 1)
        if discrete:
            self.register_parameter("log_std", None)
        else:
            self.log_std = nn.Parameter(torch.full((action_dim,), float(log_std_init)))
        if orthogonal_init:
            heads = ((self.encoder, math.sqrt(2.0)), (self.actor, 0.01), (self.critic, 1.0))
            for linear, gain in heads:
                orthogonal_(linear.weight, gain)
                nn.init.zeros_(linear.bias)
            if self.critic_network is not None:
                self.critic_network.init_orthogonal()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for a checkpoint."""
        return {
            "input_dim": self.input_dim,
            "action_dim": self.action_dim,
            "state_dim": self.state_dim,
            "hidden_dim": self.hidden_dim,
            "num_layers": self.num_layers,
            "use_layer_norm": self.use_layer_norm,
            "use_residual": self.use_residual,
            "discrete": self.discrete,
            "norm": self.norm,
            "orthogonal_init": self.orthogonal_init,
            "log_std_init": self.log_std_init,
            "normalize_observations": self.obs_norm is not None,
            "critic_dim": None if self.critic_network is None else self.critic.in_features,
        }

    def init_hidden(self, batch_size: int) -> Tensor:
        """Zeros ``[L, B, N]``, in the parameters' dtype and on their device."""
        check_count("batch_size", batch_size)
        return self._weight.new_zeros(self.num_layers, batch_size, self.state_dim)

    def draw_noise(
        self,
        batch_size: int,
        out: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What ``get_action`` draws the actions of a step from.

        Args:
            batch_size: ``B``.
            out: What an earlier call returned, to be overwritten: it saves most of the time.
            generator: Where to draw from; torch's global one when ``None``.

        Returns:
            ``[B, K]``, standard normal, or of the exponential distribution when ``discrete``.

        Raises:
            ValueError: ``out`` has another shape.
            TypeError: ``out`` has another dtype.
        """
        if out is None:
            out = self._weight.new_empty(batch_size, self.action_dim)
        check_dtype("out", out, self._weight)
        if out.shape != (batch_size, self.action_dim):
            raise ValueError(
                f"out must have shape [B, K] = {[batch_size, self.action_dim]}, "
                f"got {list(out.shape)}"
            )
        if self.discrete:
            return out.exponential_(generator=generator)
        return out.normal_(generator=generator)

    def forward(
        self,
        x: Tensor,
        hidden_state: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Run one step or a whole sequence.

        Args:
            x: Observations of one step ``[B, I]`` or of a sequence ``[B, T, I]``.
            hidden_state: State of every layer before it ``[L, B, N]``; zeros when ``None``. It is
                not modified.
            reset: ``[B]`` or ``[B, T]``, boolean or 0/1: where it is set, the observation is the
                first of an episode and the incoming state is zeroed before it is used.

        Returns:
            - The mean of the action ``[B, K]`` or ``[B, T, K]``; the logits when ``discrete``.
            - Its log standard deviation, of the same shape; ``None`` when ``discrete``.
            - The value ``[B]`` or ``[B, T]``.
            - The next state ``[L, B, N]``.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If a dtype does not fit.
        """
        x = self._inputs(x, hidden_state, reset)
        features, states = self._features(x, hidden_state, reset)
        mean = self.actor(features)  # [B, K] or [B, T, K]
        value = self._value(x, features)  # [B] or [B, T]
        log_std = None if self.log_std is None else self.log_std.expand_as(mean)
        return mean, log_std, value, torch.stack(states)

    def get_action(
        self,
        x: Tensor,
        hidden_state: Tensor | None = None,
        deterministic: bool = False,
        reset: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose actions.

        Args:
            x: Observations ``[B, I]`` or ``[B, T, I]``.
            hidden_state: ``[L, B, N]``; zeros when ``None``. It is not modified.
            deterministic: Take the mode instead of a sample.
            reset: ``[B]`` or ``[B, T]``, as in ``forward``.
            noise: What to draw the actions from, ``[B, K]`` or ``[B, T, K]``, as `draw_noise`
                returns it; drawn here when ``None``, and not read when ``deterministic``.

        Returns:
            - The action ``[B, K]`` (not clipped to any bounds), or ``[B]`` int64 when
                ``discrete``; no gradient flows through it.
            - Its log-probability ``[B]``.
            - The value ``[B]``.
            - The next state ``[L, B, N]``.

            With a sequence, ``[B, T]`` stands for ``[B]``.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If a dtype does not fit.
        """
        if noise is None and not deterministic and is_replaced(self, ImprovedSSM, ("draw_noise",)):
            noise = self.draw_noise(x.shape[:-1].numel()).view(*x.shape[:-1], self.action_dim)
        if noise is not None:
            check_noise(noise, [*x.shape[:-1], self.action_dim], x)
        plan = self._plan(x, hidden_state, reset, noise)
        if plan:
            self._check(x, hidden_state, reset)
            if noise is None and not deterministic:
                noise = self.draw_noise(len(x))
            noise = None if deterministic else noise
            reset = None if reset is None else reset.bool()
            step = PolicyStep(plan, plan.addresses(), holds=plan.parameters)
            return self._act(step, x, hidden_state, reset, noise)
        x = self._inputs(x, hidden_state, reset)
        features, states = self._features(x, hidden_state, reset)
        mean = self.actor(features)  # [B, K] or [B, T, K]
        value = self._value(x, features)  # [B] or [B, T]
        next_hidden = torch.stack(states)  # [L, B, N]
        if self.log_std is None:
            action, log_prob = choose_action(mean, deterministic, noise)  # [B], [B]
        else:
            mean = mean.to(self.log_std.dtype)  # under autocast it has another
            action = mean.detach()
            if not deterministic:
                std = self.log_std.detach().exp()  # [K]
                noise = torch.randn_like(action) if noise is None else noise
                action = torch.addcmul(action, noise, std)  # [B, K]
            log_prob = gaussian_log_prob(action, mean, self.log_std)  # [B]
        return action, log_prob, value, next_hidden

    def stepper(
        self, x: Tensor, hidden_state: Tensor
    ) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """`get_action` for many steps in a row, as a function of ``x``, ``hidden_state`` and ``noise``.

        Where a step is one native call, the weights are looked up and checked once, here: no other
        tensor may take the place of one while the function is in use. Internal to the trainers.

        Args:
            x: Observations of the first step ``[B, I]``; those of the others are like them.
            hidden_state: ``[L, B, N]``, likewise.
        """
        step = self.native_stepper(x, hidden_state)
        if step is None:
            return lambda x, state, noise: self.get_action(x, state, noise=noise)

        def act(x: Tensor, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            check_noise(noise, [len(x), self.action_dim], x)
            return self._act(step, x, state, None, noise)

        return act

    def native_stepper(self, x: Tensor, hidden_state: Tensor) -> PolicyStep | None:
        """The native call behind `stepper`, which holds the weights, or ``None`` where there is none."""
        plan = self._plan(x, hidden_state)
        if not plan or plan.overridden("get_action"):
            return None
        self._check(x, hidden_state, None)
        return PolicyStep(plan, plan.addresses())

    def _plan(self, *inputs: Tensor | None) -> Plan | Reason:
        """How a step with these inputs is one native call, or why it is none."""
        x = inputs[0]
        if x is None or x.ndim != 2:
            return Reason("x is no single step")
        return step_plan(self, *inputs)

    def _act(
        self,
        step: PolicyStep,
        x: Tensor,
        hidden_state: Tensor | None,
        reset: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The results of ``get_action``; the mode where there is no ``noise``."""
        if self.discrete:
            logits, _, value, next_hidden = step(x, hidden_state, reset, None)
            return *choose_action(logits, noise is None, noise), value, next_hidden
        noise = None if noise is None else noise.contiguous()
        action, log_prob, value, next_hidden = step(x, hidden_state, reset, noise)
        assert log_prob is not None
        return action, log_prob, value, next_hidden

    def evaluate_actions(
        self,
        x: Tensor,
        actions: Tensor,
        hidden_state: Tensor | None = None,
        reset: Tensor | None = None,
        normalized: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of given actions, with the values and entropies, differentiable.

        Args:
            x: Observations ``[B, T, I]``, or ``[B, I]``.
            actions: ``[B, T, K]``, or integers ``[B, T]`` when ``discrete``, in ``[0, K)``.
            hidden_state: ``[L, B, N]``; zeros when ``None``. It is not modified.
            reset: ``[B, T]``, as in ``forward``.
            normalized: Whether ``x`` comes from `normalize`.

        Returns:
            Log-probabilities, values and entropies, each ``[B, T]`` (``[B]`` for one step).

        Raises:
            ValueError: If a shape does not fit, or, on the CPU, a discrete action is out of range.
            TypeError: If a dtype does not fit.
        """
        expected = list(x.shape[:-1]) + ([] if self.discrete else [self.action_dim])
        if list(actions.shape) != expected:
            raise ValueError(f"actions must have shape {expected}, got {list(actions.shape)}")
        x = self._inputs(x, hidden_state, reset, normalized)
        features, _ = self._features(x, hidden_state, reset)
        mean = self.actor(features)  # [B, T, K]
        value = self._value(x, features)  # [B, T]
        log_prob, entropy = self.log_prob_and_entropy(mean, actions)
        return log_prob, value, entropy

    def log_prob_and_entropy(self, mean: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Of the policy's distributions.

        Args:
            mean: ``[..., K]``, the logits when ``discrete``.
            actions: ``[..., K]``, or integers ``[...]`` in ``[0, K)`` when ``discrete``.

        Returns:
            Log-probabilities and entropies ``[...]``.

        Raises:
            ValueError: On the CPU, a discrete action is out of range.
            TypeError: If a dtype does not fit.
        """
        if self.log_std is None:
            if actions.is_floating_point() or actions.dtype == torch.bool:
                raise TypeError(f"actions must be integers, got {actions.dtype}")
            log_probs = F.log_softmax(mean, dim=-1)  # [B, T, K]
            chosen = actions.long().unsqueeze(-1)  # [B, T, 1]
            try:
                log_prob = log_probs.gather(-1, chosen).squeeze(-1)  # [B, T]
            except RuntimeError as error:  # gather checks it anyway: a check of ours costs time
                if "out of bounds" not in str(error):
                    raise
                raise ValueError(
                    f"actions must lie in [0, {self.action_dim}), "
                    f"got {int(actions.min())} to {int(actions.max())}"
                ) from error
            entropy = -(log_probs.exp() * log_probs).sum(-1)  # [B, T]
        else:
            check_dtype("actions", actions, self.log_std)
            mean = mean.to(self.log_std.dtype)  # under autocast it has another
            log_prob = gaussian_log_prob(actions, mean, self.log_std)  # [B, T]
            entropy = gaussian_entropy(self.log_std).expand_as(log_prob)  # [B, T]
        return log_prob, entropy

    def normalize(self, x: Tensor) -> Tensor:
        """Observations ``[..., I]`` as the encoder sees them: normalised, where the model does so."""
        return x if self.obs_norm is None else cast("Tensor", self.obs_norm(x))

    def unroll(
        self,
        x: Tensor,
        hidden_state: Tensor | None = None,
        reset: Tensor | None = None,
        normalized: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The values and the states of every step of a sequence.

        Args:
            x: Observations ``[B, T, I]``.
            hidden_state: ``[L, B, N]``; zeros when ``None``. It is not modified.
            reset: ``[B, T]``, as in ``forward``.
            normalized: Whether ``x`` comes from `normalize`.

        Returns:
            Values ``[B, T]`` and the states after each step ``[L, B, T, N]``.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If a dtype does not fit.
        """
        if x.ndim != 3:
            raise ValueError(f"x must have shape [B, T, I], got {list(x.shape)}")
        x = self._inputs(x, hidden_state, reset, normalized)
        features, states = self._features(x, hidden_state, reset, every_state=True)
        return self._value(x, features), torch.stack(states)

    def _inputs(
        self,
        x: Tensor,
        hidden_state: Tensor | None,
        reset: Tensor | None,
        normalized: bool = False,
    ) -> Tensor:
        """Observations that fit, normalised."""
        self._check(x, hidden_state, reset)
        return x if normalized else self.normalize(x)

    def _value(self, x: Tensor, features: Tensor) -> Tensor:
        """The value ``[...]`` of normalised observations ``[..., I]`` and features ``[..., H]``."""
        if self.critic_network is not None:
            features = self.critic_network(x, features)  # [..., W]
        value: Tensor = self.critic(features).squeeze(-1)
        return value

    def _features(
        self,
        x: Tensor,
        hidden_state: Tensor | None,
        reset: Tensor | None,
        every_state: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """The last layer's features ``[..., H]`` and each layer's next state ``[B, N]``.

        Observations are normalised ones. With ``every_state``, all states of a sequence stand for
        the next one, ``[B, T, N]``.
        """
        one_step = x.ndim == 2
        state: tuple[Tensor | None, ...] = (None,) * self.num_layers
        if hidden_state is not None:
            if one_step and reset is not None:
                hidden_state = hidden_state.masked_fill(reset.bool().unsqueeze(1), 0.0)
            state = hidden_state.unbind(0)
        # [B, H] or [B, T, H]
        h = self.encoder(x).tanh() if one_step else tanh_layer(self.encoder, x)
        states: list[Tensor] = []
        for layer, s in zip(cast("list[SSMLayer]", self.layers), state, strict=True):
            residual = h if self.use_residual else None  # [B, H] or [B, T, H]
            if one_step:
                y, s_next = step_layer(layer, h, s)  # [B, H], [B, N]
                h = y.tanh() if residual is None else residual + y.tanh()
            else:
                h, s_next = run_layer(
                    layer, h, s, reset, every_state=every_state, tanh=True, residual=residual
                )  # [B, T, H], [B, N] or [B, T, N]
            states.append(s_next)
        return h, states

    @property
    def _weight(self) -> Tensor:
        """A parameter, which has the dtype and the device of all."""
        weight = getattr(self.encoder, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.is_floating_point():
            return weight
        return next(p for p in self.parameters() if p.is_floating_point())  # of another encoder

    def stages(self) -> NetworkStages:
        """The model as native code runs it; docs/architecture.md.

        Raises:
            Unplanned: Native code cannot stand in for it.
        """
        check_methods("the model", self, ImprovedSSM, _STEP_METHODS)
        encoder = linear_stage("encoder", self.encoder, tanh=True)
        layers = [self._layer_stage(i, layer) for i, layer in enumerate(self.layers)]
        actor, critic = linear_stage("actor", self.actor), linear_stage("critic", self.critic)
        hidden = [] if self.critic_network is None else self.critic_network.stages("critic_network")
        sizes = {
            "encoder.in_features": (encoder.inputs, self.input_dim),
            "the number of layers": (len(layers), self.num_layers),
            "actor.out_features": (actor.outputs, self.action_dim),
            "critic.out_features": (critic.outputs, 1),
        }
        for name, (own, expected) in sizes.items():
            if own != expected:
                raise Unplanned(f"{name} is {own}, not {expected}")
        if self.log_std is not None and self.log_std.shape != (self.action_dim,):
            raise Unplanned(f"log_std is {list(self.log_std.shape)}, not {[self.action_dim]}")
        return NetworkStages(
            [encoder, *layers],
            [([actor], False), ([*hidden, critic], self.critic_network is not None)],
            self.log_std,
            running_norm("obs_norm", self.obs_norm, self.input_dim),
            overrides(self, ImprovedSSM, _METHODS),
        )

    def _layer_stage(self, i: int, layer: nn.Module) -> Stage:
        name = f"layers.{i}"
        if not isinstance(layer, SSMLayer):
            raise Unplanned(f"{name} is a {type(layer).__name__}, not an SSMLayer")
        if layer.state_size != self.state_dim:
            raise Unplanned(f"{name}.state_size is {layer.state_size}, not {self.state_dim}")
        return layer.stage(name, residual=self.use_residual)

    def _check(self, x: Tensor, hidden_state: Tensor | None, reset: Tensor | None) -> None:
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_dim:
            raise ValueError(
                f"x must have shape [B, I] or [B, T, I] with I = {self.input_dim}, "
                f"got {list(x.shape)}"
            )
        weight = self._weight
        check_dtype("x", x, weight)
        if hidden_state is not None:
            expected = (self.num_layers, x.shape[0], self.state_dim)
            if hidden_state.shape != expected:
                raise ValueError(
                    f"hidden_state must have shape [L, B, N] = {list(expected)}, "
                    f"got {list(hidden_state.shape)}"
                )
            check_dtype("hidden_state", hidden_state, weight)
        if reset is not None and reset.shape != x.shape[:-1]:
            raise ValueError(
                f"reset must have shape {list(x.shape[:-1])}, as x without its features, "
                f"got {list(reset.shape)}"
            )


def check_noise(noise: Tensor, expected: list[int], x: Tensor) -> None:
    """Raises where the draws for an action are not those that the observations ask for."""
    if list(noise.shape) != expected:
        raise ValueError(f"noise must have shape {expected}, got {list(noise.shape)}")
    check_dtype("noise", noise, x)


def choose_action(
    logits: Tensor, deterministic: bool, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mode of a categorical distribution or a draw from it, with its log-probability.

    Args:
        logits: ``[..., K]``.
        deterministic: Take the mode.
        noise: Exponential draws ``[..., K]`` to draw with; new ones when ``None``.

    Returns:
        int64 ``[...]`` and ``[...]``.
    """
    log_probs = F.log_softmax(logits, dim=-1)  # [..., K]
    scores = log_probs.detach()
    if not deterministic:
        # The argmax of log p - log E with E ~ Exp(1) is a draw from p (Gumbel-max).
        noise = torch.empty_like(scores).exponential_() if noise is None else noise
        scores = scores - noise.log()
    action = scores.argmax(-1)  # [...]
    return action, log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def gaussian_log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian.

    Args:
        actions: ``[..., K]``.
        mean: ``[..., K]``.
        log_std: ``[K]``.

    Returns:
        ``[...]``, summed over the components.
    """
    z = (actions - mean) / log_std.exp()  # [..., K]
    energy = torch.addcmul(log_std, z, z, value=0.5).sum(-1)  # [...]
    return torch.rsub(energy, -0.5 * math.log(2.0 * math.pi) * log_std.shape[-1])  # [...]


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy ``[]`` of a diagonal Gaussian with ``log_std`` ``[K]``."""
    return log_std.sum() + 0.5 * (1.0 + math.log(2.0 * math.pi)) * log_std.shape[-1]
