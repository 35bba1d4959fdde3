"""The tab Load: a checkpoint of the visitor's, or a policy that comes with the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssm_fast.app.adapting import USUAL_TASK, choice_of, place
from ssm_fast.app.status import Status, View, with_errors_as_sentences
from ssm_fast.app.training import checked_env_id
from ssm_fast.app.visitors import Visitor
from ssm_fast.checkpoint import read_metadata
from ssm_fast.cli.environments import environment_of, stored_task

LARGEST_UPLOAD = 64 * 2**20  # bytes; the largest model that can be trained here has about 10
PRETRAINED = Path(__file__).parent / "pretrained"


@dataclass(frozen=True)
class LoadView(View):
    """What the tab shows.

    Attributes:
        policy: Name of the policy that was added.
    """

    policy: str | None = None


def pretrained_names(folder: Path = PRETRAINED) -> list[str]:
    """The policies that come with the package, by the names of their folders."""
    return sorted(path.parent.name for path in folder.glob("*/policy.safetensors"))


@with_errors_as_sentences(LoadView)
def load_pretrained(
    visitor: Visitor, name: str | None, folder: Path = PRETRAINED
) -> Iterator[LoadView]:
    """Gives a visitor a policy that comes with the package."""
    if name not in pretrained_names(folder):
        raise ValueError("choose one of the pretrained policies")
    yield _loaded(visitor, folder / str(name) / "policy.safetensors", str(name), None)


@with_errors_as_sentences(LoadView)
def load_upload(visitor: Visitor, uploaded: str | None, env_id: str | None) -> Iterator[LoadView]:
    """Takes a file that a visitor uploaded. It is checked, and runs no code.

    Args:
        visitor: Who is to have it.
        uploaded: The file.
        env_id: Where the file does not name its environment, this one.
    """
    if uploaded is None:
        raise ValueError("choose a file first")
    path = Path(uploaded)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"the file {path.name} is no .safetensors file, and no other is opened here"
        )
    if path.stat().st_size > LARGEST_UPLOAD:
        raise ValueError(f"the file {path.name} is larger than {LARGEST_UPLOAD // 2**20} MB")
    try:
        yield _loaded(visitor, path, path.stem, env_id)
    except ValueError as error:
        message = str(error)
        for server_name in (repr(str(path)), str(path)):
            message = message.replace(server_name, f"the file {path.name}")
        raise ValueError(message) from error


def _loaded(visitor: Visitor, path: Path, name: str, env_id: str | None) -> LoadView:
    named = "env_id" in read_metadata(path)
    if not named and not (env_id or "").strip():
        raise ValueError(f"{path} does not say which environment it is for: type its id below")
    chosen = checked_env_id(environment_of(path, None if named else checked_env_id(env_id)))
    stored = stored_task(path, chosen)
    task = USUAL_TASK if stored is None else choice_of(chosen, stored)
    policy = visitor.add_policy(path, name, chosen, task=task or USUAL_TASK)
    where = f"{chosen}, {place(task, chosen)}" if task else chosen
    text = f"Loaded {policy.name}: {policy.model}, {policy.parameters:,} weights, for {where}."
    if policy.has_steps and not policy.is_adapted:
        text += " It has learnt gradient steps, which Adapt takes."
    if task is None:
        text += " It was adapted to a task that cannot be chosen here."
    return LoadView(Status(text, "done"), policy.name)
