"""Training states of the trainers: to and from a run, and checked before any of them is used."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ssm_fast.checkpoint import Model, save_model
from ssm_fast.checks import check_kind, check_number

if TYPE_CHECKING:
    from ssm_fast.env_runner.environment import Environment
    from ssm_fast.env_runner.trial_environment import TrialEnvironment
    from ssm_fast.meta_rl.distributed import World
    from ssm_fast.meta_rl.run import Checkpoint, RunDirectory

_LARGEST_COUNT = 2**53  # as large as float64, in which the learning curve holds it, is exact


class Resumable(Protocol):
    """A trainer whose run can be continued."""

    @property
    def model(self) -> Model:
        """The policy."""

    @property
    def policy_metadata(self) -> Mapping[str, str]:
        """What a file of the policy says beside its environment."""

    @property
    def policy_rates(self) -> Mapping[str, Tensor]:
        """The inner rates in a file of the policy; empty if it takes no gradient steps."""

    @property
    def iteration(self) -> int:
        """How many iterations are done."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of a run depends on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state of `state_dict`, or raises ValueError where it does not fit."""


def save_checkpoint(
    run: RunDirectory, trainer: Resumable, env: Environment | TrialEnvironment
) -> None:
    """Writes the training state and the policy."""

    def write_model(path: Path) -> None:
        save_policy(path, trainer, env)

    run.save_checkpoint(trainer.iteration, trainer.state_dict(), write_model)


@contextmanager
def keep_last_iteration(
    run: RunDirectory | None, trainer: Resumable, env: Environment | TrialEnvironment
) -> Iterator[Callable[[], None]]:
    """Writes a checkpoint of the last whole iteration where something ends a training inside one.

    That is Ctrl-C, or an error of the environment or of a callback. Where numbers are not finite, or
    a file cannot be written, the checkpoints stay as they are.

    Yields:
        What the training calls after each iteration, once its row is written.
    """
    last: dict[str, Any] | None = None

    def keep() -> None:
        nonlocal last
        if run is not None:
            last = copy.deepcopy(trainer.state_dict())

    try:
        yield keep
    except (FloatingPointError, OSError):
        raise
    except BaseException:
        if run is not None and last is not None and not run.has_checkpoint(last["iteration"]):
            trainer.load_state_dict(last)
            save_checkpoint(run, trainer, env)
        raise


def save_policy(path: Path, trainer: Resumable, env: Environment | TrialEnvironment) -> None:
    """Writes the policy, with what whoever loads it must know of its environment and training."""
    metadata = env.policy_metadata() | dict(trainer.policy_metadata)
    save_model(path, trainer.model, metadata, trainer.policy_rates)


def start_run(world: World, run: RunDirectory | None, trainer: Resumable, resume: bool) -> None:
    """Puts the trainers of all ranks where that of rank 0 stands, or its run left it.

    Args:
        world: The processes of the run.
        run: The run; rank 0 has it alone.
        trainer: The trainer of this rank.
        resume: Continue the run.

    Raises:
        ValueError: There is no run to continue, its checkpoint does not fit the trainer, or the
            trainers of two ranks do not fit each other.
    """
    with world.share_errors():
        if world.rank and run is not None:
            raise ValueError("run must be None on all ranks but rank 0")
        if resume and world.rank == 0:
            continue_run(run, trainer)
    world.synchronize(trainer)


def continue_run(run: RunDirectory | None, trainer: Resumable) -> None:
    """Puts a trainer where the newest intact checkpoint of its run left it, if there is one.

    What the run holds of later iterations is dropped.

    Raises:
        ValueError: There is no run, or its checkpoint does not fit the trainer.
    """
    if run is None:
        raise ValueError("resume needs the run to continue")
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        load_checkpoint(checkpoint, trainer)
    run.drop_checkpoints_after(trainer.iteration)
    run.truncate_rows(trainer.iteration)


def load_checkpoint(checkpoint: Checkpoint, trainer: Resumable) -> None:
    """Gives the state of a checkpoint to a trainer.

    Raises:
        ValueError: It does not fit. The message names the checkpoint.
    """
    try:
        trainer.load_state_dict(checkpoint.state)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error


@contextmanager
def must_fit() -> Iterator[None]:
    """Turns what a state of any shape makes the code inside raise into a ValueError that says so."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"training state does not fit: it lacks {error}") from error
    except (
        *(IndexError, TypeError, ValueError),
        *(AttributeError, RuntimeError, OverflowError),
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"training state does not fit: {reason}") from error


def check_model(model: nn.Module, kind: type[nn.Module]) -> None:
    """Raises TypeError for a model of another kind, or in half precision."""
    check_kind(model, kind)
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the model must be float32 or float64 to train, got {dtype}")


def check_parts(optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[Tensor]]) -> None:
    """Compares the tensors of an optimizer with those that a trainer learns.

    Raises:
        ValueError: The optimizer has others: its steps would move nothing.
    """
    held = [[id(x) for x in group["params"]] for group in optimizer.param_groups]
    if held != [[id(x) for x in group] for group in groups]:
        raise ValueError(
            "the trainer must keep the optimizer, the model and the trainable parameters that it was "
            "made with: set options in trainer.optimizer.param_groups, load weights by "
            "trainer.model.load_state_dict(...), or make a new trainer"
        )


@torch.no_grad()
def check_step(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Goes back to what the parameters were before an optimizer's step that is not finite.

    Raises:
        FloatingPointError: It is not.
    """
    if all(bool(torch.isfinite(p).all()) for p in parameters):
        return
    for p, start in zip(parameters, before, strict=True):
        p.copy_(start)
    raise FloatingPointError("the step of the optimizer leads to weights that are not finite")


_RENAMED = {"memory_pace": "recurrent_lr_scale", "transition_lr_scale": "recurrent_lr_scale"}


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, those of older versions by the names that they have now."""
    return {_RENAMED.get(name, name): value for name, value in settings.items()}


def check_settings(state: Mapping[str, Any], version: int, current: Mapping[str, Any]) -> None:
    """Compares what a run was started with and what it is to be continued with.

    Args:
        state: The training state: its `version`, its `settings`, and more of them beside these.
        version: That of the states that the trainer writes.
        current: The trainer's settings by name.

    Raises:
        ValueError: The version or a setting is another one.
    """
    if state["version"] != version:
        raise ValueError(f"version must be {version}, got {state['version']!r}")
    stored = {**with_current_names(state["settings"]), **state}
    for name, value in current.items():
        if stored[name] != value:
            raise ValueError(
                f"{name} must be {stored[name]!r} as in the run that is resumed, got {value!r}"
            )


def check_weights(model: nn.Module) -> None:
    """Raises FloatingPointError where an update has left a parameter that is not finite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FloatingPointError(f"parameter {name} is not finite after the update")


def check_tensors(
    what: str, stored: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Compares a `state_dict` with the one that it is to replace.

    Names, shapes and dtypes are compared before any element is read: a few bytes of a file can
    stand for a tensor of any size, with strides of zero.

    Args:
        what: What the tensors belong to, for the messages.
        stored: The tensors of the file.
        expected: Those of the module.

    Returns:
        The tensors of the file.

    Raises:
        ValueError: A tensor is missing or not expected, has another shape or dtype, is not finite,
            or is a negative variance or count.
    """
    missing, extra = (
        sorted(set(expected) - set(stored)),
        sorted(set(stored) - set(expected), key=str),
    )
    if missing or extra:
        raise ValueError(f"{what} tensors missing: {missing[:8]}, not expected: {extra[:8]}")
    for name, wanted in expected.items():
        _check_kind(f"{what} tensor {name}", stored[name], wanted.shape, wanted.dtype)
    for name in expected:
        at_least = 0.0 if name.rpartition(".")[2] in ("var", "count") else -math.inf
        _check_values(f"{what} tensor {name}", stored[name], at_least)
    return {name: stored[name] for name in expected}


def load_adam(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Takes the moments, step counts and learning rates of an Adam's `state_dict`.

    Everything else stays as `optimizer` has it. `Adam.load_state_dict` itself takes moments of any
    shape, and the fused kernel then writes beyond them.

    Args:
        optimizer: The optimizer.
        stored: The `state_dict` of another one.

    Raises:
        ValueError: The groups differ, or a moment has another shape or dtype than its parameter, is
            not finite, or is a negative square.
    """
    own = optimizer.state_dict()
    groups, stored_groups = own["param_groups"], list(stored["param_groups"])
    if len(stored_groups) != len(groups):
        raise ValueError(f"optimizer must have {len(groups)} groups, got {len(stored_groups)}")
    for group, stored_group in zip(groups, stored_groups, strict=True):
        if list(stored_group["params"]) != group["params"]:
            raise ValueError("optimizer groups must hold the same parameters")
        rate = float(stored_group["lr"])
        group["lr"] = check_number("optimizer learning rate", rate, at_least=0.0)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for i, parameter in enumerate(parameters):
        if i not in stored["state"]:
            continue  # it has had no gradient yet
        moments = stored["state"][i]
        _check_kind(f"optimizer step {i}", moments["step"], torch.Size(), torch.float32)
        _check_values(f"optimizer step {i}", moments["step"], 0.0)
        state[i] = {"step": moments["step"].clone()}
        for name, at_least in (("exp_avg", -math.inf), ("exp_avg_sq", 0.0)):
            what = f"optimizer {name} {i}"
            _check_kind(what, moments[name], parameter.shape, parameter.dtype)
            _check_values(what, moments[name], at_least)
            # A copy of its own, laid out like the parameter, as Adam makes it.
            state[i][name] = torch.empty_like(parameter, requires_grad=False).copy_(moments[name])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def read_count(state: Mapping[str, Any], name: str) -> int:
    """Returns the count `name` of a training state.

    Raises:
        ValueError: It is no integer from 0 to 2**53.
    """
    count = state[name]
    if type(count) is not int or not 0 <= count <= _LARGEST_COUNT:
        raise ValueError(f"{name} must be a count, got {str(count)[:40]}")
    return count


def _check_kind(what: str, tensor: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise ValueError(f"{what} must be a dense tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{what} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{what} must have dtype {dtype}, got {tensor.dtype}")


def _check_values(what: str, tensor: Tensor, at_least: float) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} is not finite")
    if at_least > -math.inf and bool((tensor < at_least).any()):
        raise ValueError(f"{what} must be at least {at_least}")
