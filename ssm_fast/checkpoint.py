"""Checkpoints: weights as safetensors, configuration in the header, files written whole.

A checkpoint from a stranger runs no code and cannot make the process allocate more than its own
size: the class is looked up in a fixed table, the model is first built without memory (on the
meta device), and every tensor's name, shape and dtype is compared with it before data are read.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "ssm_fast"
VERSION = 1

# The classes of files, and their modules: these import this one.
_MODULES = {
    "ImprovedSSM": "ssm_fast.core.improved_ssm",
    "StateSpaceModel": "ssm_fast.core.ssm",
}
_RESERVED = ("format", "version", "class", "config")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_JSON_TYPES = {  # by annotation; else str
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "bool": (bool,),
}
_RATE = "inner_rates."  # how the names of tensors begin that are not the model's
_MAX_FILE_BYTES = 2**31
_MAX_HEADER_BYTES = 2**20
_MAX_SIZE = 2**20  # of one dimension


class Model(nn.Module):
    """A module that its configuration and its weights rebuild."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON has them."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write configuration and weights to one file; see `ssm_fast.checkpoint.save_model`."""
        save_model(path, self, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Rebuild a model from its file alone; see `ssm_fast.checkpoint.load_model`."""
        return load_model(path, cls)


M = TypeVar("M", bound=Model)


def _class_of(name: str) -> type[Model]:
    """The class of a file, which is one of the table."""
    return cast("type[Model]", getattr(importlib.import_module(_MODULES[name]), name))


def write_atomic(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> None:
    """Write a file whole or not at all.

    ``writer`` writes a temporary file in the same folder, which then is flushed to the disk and
    renamed. Whenever the process dies, ``path`` holds either the old contents or the new ones.

    Args:
        path: The file to write; a symbolic link is followed.
        writer: Called with the temporary path, which has the suffix of ``path``.

    Raises:
        OSError: If the folder is missing or not writable. The old file is then untouched, as it
            is when ``writer`` raises.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(8)}.tmp{target.suffix}")
    try:
        with named_in_errors(target):
            writer(temporary)
            _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync(target.parent)


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Gives an error of writing, as of a full disk, the name of the file, which Python leaves out."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def read_limited(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Args:
        path: The file; a symbolic link is followed.
        limit: No more bytes than this and one are read, whatever the file does meanwhile.

    Raises:
        ValueError: If it is a pipe, a device or a folder, or larger.
        OSError: If it cannot be read.
    """
    # Without O_NONBLOCK, to open a pipe could wait for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{os.fspath(path)} is not a regular file")
        contents = file.read(min(info.st_size, limit) + 1)
    if len(contents) > limit:
        size = max(info.st_size, len(contents))
        raise ValueError(f"{os.fspath(path)} must be at most {limit} bytes, got {size}")
    return contents


def save_model(
    path: str | os.PathLike[str],
    model: Model,
    metadata: Mapping[str, str] | None = None,
    inner_rates: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model's configuration and weights to one safetensors file, atomically.

    Equal models with equal metadata give equal files.

    Args:
        path: The file to write.
        model: A `StateSpaceModel` or an `ImprovedSSM`.
        metadata: More strings for the header, such as ``{"env_id": "HalfCheetah-v5"}``;
            `read_metadata` returns them.
        inner_rates: The rates of the gradient steps by which a policy of `MetaRLTrainer` adapts, by
            the names of the weights, each of the shape and dtype of its weight;
            `load_inner_rates` returns them.

    Raises:
        TypeError: If ``model`` is of another class, or ``metadata`` holds something but strings.
        ValueError: If a weight is not finite, the model is not as its configuration makes it (a
            module or a weight in another's place would be lost), ``metadata`` uses a key of the
            format itself, or an inner rate does not fit its weight, is not finite or is negative.
            The old file is then untouched.
        OSError: If the file cannot be written.
    """
    from safetensors.torch import save

    name = type(model).__name__
    if name not in _MODULES or _class_of(name) is not type(model):
        raise TypeError(f"model must be one of {sorted(_MODULES)}, got {name}")
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "class": name,
        "config": json.dumps(model.config()),
    }
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
        if key in _RESERVED:
            raise ValueError(f"metadata must not use the keys {list(_RESERVED)}, got {key!r}")
        header[key] = value
    if (size := sum(len(text.encode()) for item in header.items() for text in item)) > 2**19:
        raise ValueError(f"metadata must be smaller than {2**19} bytes, got {size}")
    weights = model.state_dict()
    made = _skeleton(type(model), header["config"], len(weights))
    try:
        _check_modules(model, made)
        _check_shapes({key: list(tensor.shape) for key, tensor in weights.items()}, made)
        _check_dtypes({key: tensor.dtype for key, tensor in weights.items()}, made)
    except ValueError as error:
        message = f"the model must be as {name}({header['config']}) makes it to be saved: {error}"
        raise ValueError(message) from error
    tensors: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key} of the model must be finite to be saved, got NaN or Inf")
        # A copy of its own: parameters may be views of one storage, which the format refuses.
        tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
    rates = dict(inner_rates or {})
    _check_rates(rates, model)
    for key, rate in rates.items():
        tensors[_RATE + key] = rate.detach().to("cpu", copy=True).contiguous()
    contents = _with_sorted_header(save(tensors, header))
    write_atomic(path, lambda temporary: temporary.write_bytes(contents))


def _with_sorted_header(contents: bytes) -> bytes:
    """The file that equal models have: safetensors writes the metadata in the order of a hash map."""
    end = 8 + int.from_bytes(contents[:8], "little")
    header = json.dumps(json.loads(contents[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + contents[end:]


@overload
def load_model(path: str | os.PathLike[str], cls: None = None) -> Model: ...


@overload
def load_model(path: str | os.PathLike[str], cls: type[M]) -> M: ...


def load_model(path: str | os.PathLike[str], cls: type[Any] | None = None) -> Model:
    """Rebuild a model from a file of `save_model`, on the CPU.

    Args:
        path: The file.
        cls: The class that it must hold; any known one when ``None``.

    Returns:
        The model.

    Raises:
        ValueError: If the file is missing, unreadable, damaged, too large, of another format or
            class, or its tensors are not exactly the finite ones that its configuration calls
            for. The message names the file and what is wrong.
        TypeError: If ``cls`` is not a class that `save_model` writes.
    """
    if cls is not None and cls not in map(_class_of, _MODULES):
        raise TypeError(f"cls must be one of {sorted(_MODULES)}, got {cls!r}")
    model, _ = load_checkpoint(path)
    if cls is not None and type(model) is not cls:
        raise ValueError(f"{_shown(path)}: it holds a {type(model).__name__}, not {cls.__name__}")
    return model


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[Model, dict[str, str]]:
    """A model and the ``metadata`` that it was saved with, from one reading of its file.

    Args:
        path: A file of `save_model`.

    Returns:
        What `load_model` and `read_metadata` return.

    Raises:
        ValueError: As `load_model`.
    """
    with _opened(path) as file:
        header = _header(file)
        name = header["class"]
        if name not in _MODULES:
            raise ValueError(f"unknown class {name!r}, expected one of {sorted(_MODULES)}")
        names = [name for name in file.keys() if not name.startswith(_RATE)]  # noqa: SIM118
        model = _skeleton(_class_of(name), header["config"], len(names))
        tensors = _tensors(file, names, model)
    model.load_state_dict(tensors, assign=True)
    return model, _metadata(header)


def load_inner_rates(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The rates of the gradient steps by which a policy of `MetaRLTrainer` adapts.

    Args:
        path: A file of `save_model`.

    Returns:
        The rates, by the names of the weights. Empty if the file holds none: the policy takes no
        such steps, or an earlier version wrote the file.

    Raises:
        ValueError: As `load_model`, and if a rate does not fit its weight, is not finite or is
            negative.
    """
    model, _ = load_checkpoint(path)
    with _opened(path) as file:
        names = [name for name in file.keys() if name.startswith(_RATE)]  # noqa: SIM118
        rates = {name.removeprefix(_RATE): file.get_tensor(name).clone() for name in names}
        _check_rates(rates, model)
    return rates


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The ``metadata`` that a checkpoint was saved with.

    Args:
        path: A file of `save_model`.

    Returns:
        The strings, without the keys of the format itself.

    Raises:
        ValueError: If the file is missing, unreadable, damaged or of another format.
    """
    with _opened(path) as file:
        return _metadata(_header(file))


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A checked safetensors file; what goes wrong inside becomes a ValueError naming ``path``."""
    from safetensors import SafetensorError, safe_open

    try:
        # Before anything opens it: to open a pipe could wait for ever.
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a regular file")
        if info.st_size > _MAX_FILE_BYTES:
            raise ValueError(f"{info.st_size} bytes, more than the {_MAX_FILE_BYTES} allowed")
        with open(path, "rb") as raw:
            start = raw.read(8)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or header_bytes > info.st_size - 8:
            raise ValueError("truncated, or not a safetensors file")
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(
                f"a header of {header_bytes} bytes, more than the {_MAX_HEADER_BYTES} allowed"
            )
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{_shown(path)}: not a valid safetensors file ({error})") from error
    except OSError as error:
        raise ValueError(f"{_shown(path)}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{_shown(path)}: {error}") from error


def _header(file: Any) -> dict[str, str]:
    """The strings of the header, with the format's own keys present."""
    header = cast("dict[str, str] | None", file.metadata()) or {}
    if header.get("format") != FORMAT:
        raise ValueError(f"not an {FORMAT} checkpoint: format is {header.get('format')!r}")
    missing = [key for key in _RESERVED if key not in header]
    if missing:
        raise ValueError(f"the header lacks {missing}")
    if header["version"] != str(VERSION):
        raise ValueError(f"format version {header['version']!r}, this package reads {VERSION}")
    return header


def _metadata(header: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in header.items() if key not in _RESERVED}


def _skeleton(cls: type[Model], config: str, num_tensors: int) -> Model:
    """The model that ``config`` describes, on the meta device: shapes without memory."""
    try:
        arguments = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config is not valid JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise ValueError("config must be a JSON object")  # noqa: TRY004 (the file's fault)
    parameters = inspect.signature(cls).parameters
    for key, value in arguments.items():
        if key not in parameters:
            raise ValueError(f"config has an unknown key {key!r}")
        expected = _JSON_TYPES.get(str(parameters[key].annotation), (str,))
        if type(value) not in expected:
            kinds = " or ".join(kind.__name__ for kind in expected)
            raise ValueError(f"config {key!r} must be {kinds}, got {type(value).__name__}")
        if type(value) is int and abs(value) > _MAX_SIZE:
            raise ValueError(f"config {key!r} must be at most {_MAX_SIZE}, got {value}")
    # Time and memory to build it are those of the file's own tensors: A, B, C, D, bias a layer.
    if 5 * arguments.get("num_layers", 1) > max(num_tensors, 5):
        raise ValueError(
            f"config asks for {arguments['num_layers']} layers, the file has {num_tensors} tensors"
        )
    try:
        with torch.device("meta"):
            return cls(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"config is not one of a {cls.__name__} ({error})") from error


def _check_modules(model: Model, made: Model) -> None:
    """Raise unless two models have the same modules, with the same options."""
    own, expected = dict(model.named_modules()), dict(made.named_modules())
    for name in reversed(own | expected):  # what lies within others first
        if name and repr(own.get(name)) != repr(expected.get(name)):
            raise ValueError(f"{name} must be {expected.get(name)}, got {own.get(name)}")


def _check_shapes(shapes: Mapping[str, list[int]], made: Model) -> None:
    """Raise unless tensors have the names and shapes of those of a model."""
    expected = made.state_dict()
    missing, extra = sorted(expected.keys() - shapes), sorted(shapes.keys() - expected)
    if missing or extra:
        raise ValueError(f"tensors missing: {missing[:8]}, not expected: {extra[:8]}")
    for name, wanted in expected.items():
        if shapes[name] != list(wanted.shape):
            raise ValueError(f"{name} must have shape {list(wanted.shape)}, got {shapes[name]}")


def _check_dtypes(dtypes: Mapping[str, torch.dtype], made: Model) -> None:
    """Raise unless the weights have one dtype, and the statistics theirs."""
    parameters = dict(made.named_parameters())
    weights: torch.dtype | None = None
    for name, wanted in made.state_dict().items():
        dtype = dtypes[name]
        if name in parameters:
            weights = weights or dtype
            if dtype != weights or weights not in _DTYPES:
                raise ValueError(f"{name} has dtype {dtype}, others {weights}")
        elif dtype != wanted.dtype:
            raise ValueError(f"{name} must have dtype {wanted.dtype}, got {dtype}")


def _check_rates(rates: Mapping[str, Tensor], model: Model) -> None:
    """Raise unless every inner rate fits a weight of the model, is finite and not negative."""
    weights = dict(model.named_parameters())
    for name, rate in rates.items():
        if name not in weights:
            raise ValueError(f"the inner rate {name} belongs to no weight of the model")
        expected = list(weights[name].shape), weights[name].dtype
        if (list(rate.shape), rate.dtype) != expected:
            raise ValueError(
                f"the inner rate {name} must have shape and dtype {expected}, "
                f"got {(list(rate.shape), rate.dtype)}"
            )
        if not bool(torch.isfinite(rate).all()) or bool((rate < 0).any()):
            raise ValueError(f"the inner rate {name} must be finite and not negative")


def _tensors(file: Any, names: list[str], made: Model) -> dict[str, Tensor]:
    """The tensors of a file, exactly those of a model that was made without memory."""
    _check_shapes({name: list(file.get_slice(name).get_shape()) for name in names}, made)
    mapped: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    _check_dtypes({name: tensor.dtype for name, tensor in mapped.items()}, made)
    tensors: dict[str, Tensor] = {}
    for name, tensor in mapped.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or Inf")
        if name.endswith(("obs_norm.var", "obs_norm.count")) and bool((tensor < 0).any()):
            raise ValueError(f"{name} must not be negative")
        tensors[name] = tensor.clone()  # the file is mapped, not read: keep no tie to it
    return tensors


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shown(path: str | os.PathLike[str]) -> str:
    return repr(os.fspath(path))
