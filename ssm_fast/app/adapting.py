"""The tab Adapt: a copy of the policy learns a task while it plays it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gymnasium

from ssm_fast.app.fields import SEED, Count, Fraction
from ssm_fast.app.jobs import Note, Send
from ssm_fast.app.status import Status, View, with_errors_as_sentences
from ssm_fast.app.visitors import StoredPolicy, Visitor
from ssm_fast.cli.adapt import AdaptationReport, adapt_policy, default_adapt_every
from ssm_fast.cli.environments import FAMILY_OF
from ssm_fast.cli.options import ADAPT_DEFAULTS, DEFAULTS, HYBRID_DEFAULTS, Adapt
from ssm_fast.env_runner import Task, get_family

KIND = "adapting"
METHODS = {
    "test_time": "value ensemble, exploration by uncertainty, step size by difficulty",
    "standard": "learns from the last stretch",
    "hybrid": "with replay of the stretches before",
    "gradient": "the steps that a policy of meta_rl has learnt to take",
}
MOST_EPISODES = 20
OPTIONS: dict[str, Count | Fraction] = {
    "episodes": Count("Episodes", 1, MOST_EPISODES),
    "rows": Count("Copies of the task", 1, 64),
    "adapt_every": Count("Steps between updates", 1, 10_000),
    "lr": Fraction("Learning rate", above=0.0),
    "steps": Count("Gradient steps in an update", 1, 200),
    "max_kl": Fraction("Largest KL divergence", above=0.0),
    "experience_weight": Fraction("Weight of the replay", at_least=0.0, at_most=1.0),
    "seed": SEED,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "test_time": ADAPT_DEFAULTS | {"seed": 0},
    "standard": ADAPT_DEFAULTS | {"seed": 0},
    "hybrid": HYBRID_DEFAULTS | {"seed": 0},
    "gradient": {"episodes": 4, "rows": DEFAULTS["meta_rl"]["batch_size"], "seed": 0},
}
USUAL_TASK = ""  # what the environment plays anyway
_USUAL_LIMIT = 1000  # steps of an episode, of Gymnasium's MuJoCo tasks
_LONGEST_DESCRIPTION = 5  # numbers of a task that are still read


@dataclass(frozen=True)
class AdaptView(View):
    """What the tab shows.

    Attributes:
        curve: Points `(episode or gradient steps, return, name of the line)`.
        table: A row each, the means at the end.
        adapted: Name of the adapted policy.
    """

    curve: tuple[tuple[float, float, str], ...] = ()
    table: tuple[tuple[str, float, float, float], ...] = ()
    adapted: str | None = None


@with_errors_as_sentences(AdaptView)
def adapt(
    visitor: Visitor, name: str | None, method: str, task: str, form: Mapping[str, Any]
) -> Iterator[AdaptView]:
    """Adapts a policy of a visitor's.

    Args:
        visitor: Who has the policy, and is to have the adapted one.
        name: Of the policy.
        method: One of `METHODS`.
        task: One of `task_choices`.
        form: `OPTIONS` by name; what is not there is as the method has it.
    """
    policy = visitor.policy(name)
    folder = visitor.new_folder(KIND)
    options = options_of(policy, method, task, form, folder / "adapted.safetensors")
    view = AdaptView(Status("Starting ...", "busy"))
    yield view
    job = visitor.start(KIND, work, options)
    if job is None:
        yield AdaptView(Status("Stopped before it began.", "done"))
        return
    try:
        report: AdaptationReport | None = None
        notes: list[str] = []
        for batch in job.batches():
            for message in batch:
                if isinstance(message, AdaptationReport):
                    report = message
                elif isinstance(message, Note):
                    notes.append(message.text.replace(f"{policy.path} ", "the policy "))
                else:
                    text = f"{message[:1].upper()}{message[1:]} ..."
                    view = AdaptView(Status(text, "busy", notes=tuple(notes)))
            yield view
    finally:
        visitor.end(KIND)
    if report is None:
        yield replace(view, status=Status("Stopped; nothing has changed.", "done"))
        return
    where = place(task, report.env_id)
    label = f"{policy.name}, {method} in {where}"
    adapted = visitor.add_policy(options.out, label, report.env_id, task=task, is_new=True)
    status = Status(_summary(report, where), "done", notes=tuple(notes))
    yield AdaptView(status, _curve(report, method), _table(report, method), adapted.name)


def options_of(
    policy: StoredPolicy, method: str, task: str, form: Mapping[str, Any], out: Path
) -> Adapt:
    """The options of the command, checked.

    Raises:
        ValueError: The method is unknown or not for this policy, or a field is empty or out of range.
    """
    if method not in METHODS:
        raise ValueError(f"the method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "gradient" and not policy.has_steps:
        raise ValueError(
            f"gradient takes steps that meta_rl trains, and {policy.name} has learnt none: "
            "take a policy of meta_rl, or choose another method"
        )
    if policy.model != "ImprovedSSM":
        raise ValueError(
            f"{policy.name} is a {policy.model}, which has no critic: "
            "adapt one that improved or meta_rl has trained"
        )
    given = dict(_DEFAULTS[method])
    given |= {name: OPTIONS[name].checked(x) for name, x in form.items() if name in given}
    if task != USUAL_TASK:
        split, _, number = task.rpartition(" ")
        if split not in get_args(get_type_hints(Adapt)["split"]) or not number.isdecimal():
            raise ValueError(f"there is no task {task!r}")
        given |= {"split": split, "task": int(number)}
    options: dict[str, Any] = {"env": policy.env_id, "method": method, "out": out, **given}
    return Adapt(policy.path, **options)


def default_of(method: str, name: str, env_id: str = "", task: str = USUAL_TASK) -> float | None:
    """What an option comes to where it is not given; None if the method has no such option.

    Args:
        method: One of `METHODS`.
        name: One of `OPTIONS`.
        env_id: Of the policy.
        task: One of `task_choices`.
    """
    if name != "adapt_every" or method == "gradient":
        return _DEFAULTS[method].get(name)
    played = env_id if task == USUAL_TASK else FAMILY_OF.get(env_id, env_id)
    spec = gymnasium.registry.get(played)
    limit = None if spec is None else spec.max_episode_steps
    return default_adapt_every(_USUAL_LIMIT if limit is None else limit)


def first_method(policy: StoredPolicy, method: str) -> str:
    """The method to offer first for a policy, where another one was chosen before."""
    if policy.has_steps:
        return "gradient"
    return next(iter(METHODS)) if method == "gradient" else method


def first_task(policy: StoredPolicy) -> str:
    """The task to offer first: a held-out one for a policy that was not adapted to any."""
    choices = [value for _, value in task_choices(policy.env_id)]
    return choices[1] if policy.task == USUAL_TASK and len(choices) > 1 else policy.task


def work(send: Send, options: Adapt) -> None:
    """Adapts as the command does, in a child process: sends its stages, then its report."""
    send(adapt_policy(options, on_stage=send))


def task_choices(env_id: str) -> list[tuple[str, str]]:
    """What may be chosen as a task in an environment: `(label, value)`."""
    choices = [("as it was trained", USUAL_TASK)]
    try:
        family = get_family(FAMILY_OF.get(env_id, env_id))
    except ValueError:
        return choices
    for split in ("test", "out_of_range"):
        tasks = getattr(family, f"{split}_tasks")
        choices += [
            (place(f"{split} {i}", "") + _described(task), f"{split} {i}")
            for i, task in enumerate(tasks)
        ]
    return choices


def choice_of(env_id: str, task: Task) -> str | None:
    """What `task_choices` has for a task; None where it is none of them."""
    family = get_family(env_id)
    if task == family.default_task:
        return USUAL_TASK
    for split in ("test", "out_of_range"):
        tasks = getattr(family, f"{split}_tasks")
        if task in tasks:
            return f"{split} {tasks.index(task)}"
    return None


def place(task: str, env_id: str) -> str:
    """Where a policy plays, in words."""
    split, _, number = task.rpartition(" ")
    return env_id if task == USUAL_TASK else f"{split.replace('_', ' ')} task {number}"


def _described(task: Task) -> str:
    numbers = task.as_dict()
    if len(numbers) > _LONGEST_DESCRIPTION or any(isinstance(x, tuple) for x in numbers.values()):
        return ""
    return ": " + ", ".join(f"{name} {x:.3g}" for name, x in numbers.items())


def _curve(report: AdaptationReport, method: str) -> tuple[tuple[float, float, str], ...]:
    first = 0 if method == "gradient" else 1
    lines = {"not adapting": report.without, "adapting": report.adapting}
    return tuple(
        (i, value, name)
        for name, values in lines.items()
        for i, value in enumerate(values, start=first)
    )


def _table(report: AdaptationReport, method: str) -> tuple[tuple[str, float, float, float], ...]:
    name, first = ("after {} gradient steps", 0) if method == "gradient" else ("episode {}", 1)
    rows = [
        (name.format(i), *pair)
        for i, pair in enumerate(zip(report.without, report.adapting, strict=True), start=first)
    ]
    rows.append(("mean", _mean(report.without), _mean(report.adapting)))
    rows.append(("deterministic, before and after", _mean(report.before), _mean(report.after)))
    return tuple((what, round(a, 1), round(b, 1), round(b - a, 1)) for what, a, b in rows)


def _summary(report: AdaptationReport, where: str) -> str:
    before, after = _mean(report.before), _mean(report.after)
    return (
        f"Adapted to {where}. Deterministic return {before:.1f} before and {after:.1f} after, over "
        f"{len(report.before)} episodes that it did not learn from."
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
