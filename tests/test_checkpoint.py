from __future__ import annotations

import json
import math
import os
import pickle
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_save
from torch import Tensor
from torch.nn.utils import prune

from ssm_fast.checkpoint import (
    load_inner_rates,
    load_model,
    read_metadata,
    save_model,
    write_atomic,
)
from ssm_fast.core import ImprovedSSM, StateSpaceModel

Model = ImprovedSSM | StateSpaceModel


def improved(seed: int = 0, **kwargs: Any) -> ImprovedSSM:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"state_dim": 6, "hidden_dim": 8}
    model = ImprovedSSM(5, 3, **options | kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if model.obs_norm is not None:
        model.obs_norm.update(torch.randn(20, 5) + 2.0)
    return model


def standard(seed: int = 0) -> StateSpaceModel:
    torch.manual_seed(seed)
    return StateSpaceModel(7, 4, 2, 9)


MODELS: dict[str, Callable[[], Model]] = {
    "standard": standard,
    "improved": improved,
    "discrete": lambda: improved(discrete=True),
    "obs_norm": lambda: improved(normalize_observations=True, norm="state"),
    "no_norm": lambda: improved(use_layer_norm=False, use_residual=False, num_layers=1),
    "float64": lambda: improved(log_std_init=0.3, normalize_observations=True).double(),
    "not_orthogonal": lambda: improved(orthogonal_init=False, num_layers=3),
}


def assert_equal(actual: Model, expected: Model) -> None:
    assert type(actual) is type(expected)
    assert actual.config() == expected.config()
    theirs = expected.state_dict()
    assert list(actual.state_dict()) == list(theirs)
    for name, value in actual.state_dict().items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


# Round trips


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_round_trip_rebuilds_the_model_from_the_file_alone(
    make: Callable[[], Model], tmp_path: Path
) -> None:
    model = make()
    path = tmp_path / "model.safetensors"
    model.save(path)
    state = torch.get_rng_state()
    for loaded in (load_model(path), load_model(str(path)), type(model).load(path)):
        assert_equal(loaded, model)
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        x = torch.randn(2, 4, model.input_dim, dtype=next(model.parameters()).dtype)
        torch.testing.assert_close(loaded(x)[0], model(x)[0], rtol=0, atol=0)
    torch.set_rng_state(state)
    load_model(path)
    assert torch.equal(torch.get_rng_state(), state)  # to load a model draws no random numbers
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_loaded_model_trains_and_is_tied_to_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    improved().save(path)
    model = ImprovedSSM.load(path)
    before = path.read_bytes()
    with path.open("r+b") as file:  # in place, through the very file that was read
        file.write(b"\0" * len(before))
    assert_equal(model, improved())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(2, 5, 5))[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.actor.weight, improved().actor.weight)


def test_the_file_is_plain_safetensors_with_its_configuration_in_the_header(tmp_path: Path) -> None:
    model, path = improved(), tmp_path / "model.safetensors"
    model.save(path, {"env_id": "HalfCheetah-v5"})
    tensors = load_file(path)
    assert set(tensors) == set(model.state_dict())
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert header["format"] == "ssm_fast"
    assert header["class"] == "ImprovedSSM"
    assert json.loads(header["config"]) == model.config()
    assert read_metadata(path) == {"env_id": "HalfCheetah-v5"}


def test_equal_models_have_equal_files(tmp_path: Path) -> None:
    metadata = {f"key {i}": str(i) for i in range(20)}
    files = []
    for i, order in enumerate((list(metadata), list(metadata)[::-1], list(metadata))):
        path = tmp_path / f"{i}.safetensors"
        save_model(path, improved(), {key: metadata[key] for key in order})
        files.append(path.read_bytes())
        assert read_metadata(path) == metadata
        assert_equal(load_model(path), improved())
    assert files[0] == files[1] == files[2]
    assert int.from_bytes(files[0][:8], "little") % 8 == 0


def test_sizes_may_be_numpys_integers(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"state_dim": np.int64(3), "hidden_dim": np.uint8(5)}
    StateSpaceModel(**sizes).save(tmp_path / "model.safetensors")
    assert StateSpaceModel.load(tmp_path / "model.safetensors").config()["hidden_dim"] == 5


def test_views_of_one_storage_are_saved_as_tensors_of_their_own(tmp_path: Path) -> None:
    model = standard()
    stacked = torch.stack([model.A.detach(), model.A.detach() + 1.0])
    model.A = torch.nn.Parameter(stacked[0])
    model.B = torch.nn.Parameter(stacked[1].t()[:, :4])
    model.save(tmp_path / "m.safetensors")
    assert_equal(StateSpaceModel.load(tmp_path / "m.safetensors"), model)


def test_inner_rates_are_kept_beside_the_weights(tmp_path: Path) -> None:
    model = improved().double()
    rates = {
        name: torch.rand_like(p).requires_grad_()
        for name, p in model.named_parameters()
        if name.startswith("actor")
    }
    path = tmp_path / "m"
    save_model(path, model, inner_rates=rates)
    assert_equal(load_model(path), model)
    loaded = load_inner_rates(path)
    assert loaded.keys() == rates.keys()
    for name, rate in loaded.items():
        assert torch.equal(rate, rates[name])
        assert not rate.requires_grad
    model.save(path)
    assert load_inner_rates(path) == {}


@pytest.mark.parametrize(
    ("name", "rate", "message"),
    [
        ("nobody", torch.ones(3), "the inner rate nobody belongs to no weight of the model"),
        ("actor.bias", torch.ones(4), r"actor.bias must have shape and dtype \(\[3\], "),
        ("actor.bias", torch.ones(3, dtype=torch.float64), "must have shape and dtype"),
        ("actor.bias", torch.tensor([1.0, math.inf, 0.0]), "must be finite and not negative"),
        ("actor.bias", torch.tensor([1.0, -0.5, 0.0]), "must be finite and not negative"),
    ],
)
def test_inner_rates_that_do_not_fit(name: str, rate: Tensor, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(ValueError, match=message):
        save_model(path, improved(), inner_rates={name: rate})
    assert not path.exists()
    write(path, improved(), tensors_of(improved()) | {f"inner_rates.{name}": rate})
    with pytest.raises(ValueError, match=message) as caught:
        load_inner_rates(path)
    assert str(path) in str(caught.value)


def test_metadata_must_be_strings_and_leave_the_formats_keys_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(TypeError, match="metadata must map strings to strings, got 'steps': 3"):
        save_model(path, standard(), {"steps": 3})
    with pytest.raises(ValueError, match=r"metadata must not use the keys .*, got 'config'"):
        save_model(path, standard(), {"config": "{}"})
    with pytest.raises(ValueError, match="metadata must be smaller than 524288 bytes"):
        save_model(path, standard(), {"notes": "x" * 2**20})
    assert not path.exists()
    save_model(path, standard(), {"notes": "é" * 2**17, "": ""})
    assert read_metadata(path) == {"notes": "é" * 2**17, "": ""}


def test_other_models_are_refused(tmp_path: Path) -> None:
    class Mine(StateSpaceModel):
        pass

    for model in (torch.nn.Linear(2, 2), Mine()):
        with pytest.raises(TypeError, match="model must be one of"):
            save_model(tmp_path / "m", model)
    with pytest.raises(TypeError, match="cls must be one of"):
        load_model(tmp_path / "m", torch.nn.Linear)


def _with_relu(model: StateSpaceModel) -> None:
    model.C[1] = torch.nn.ReLU()


def _with_another_eps(model: StateSpaceModel) -> None:
    model.C.append(torch.nn.LayerNorm(2, 1e-3, elementwise_affine=False))


def _pruned(model: StateSpaceModel) -> None:
    prune.random_unstructured(model, "A", 0.5)


def _of_two_dtypes(model: StateSpaceModel) -> None:
    model.C.double()


def _wider(model: StateSpaceModel) -> None:
    model.D = torch.nn.Parameter(torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_relu, r"C.1 must be Tanh\(\), got ReLU\(\)"),
        (_with_another_eps, r"C.3 must be None, got LayerNorm\(\(2,\), eps=0.001"),
        (_pruned, r"tensors missing: \['A'\], not expected: \['A_mask', 'A_orig'\]"),
        (_of_two_dtypes, "C.0.weight has dtype torch.float64, others torch.float32"),
        (_wider, r"D must have shape \[2, 4\], got \[3, 4\]"),
    ],
)
def test_a_model_whose_file_would_be_another_one_is_refused(
    change: Callable[[StateSpaceModel], None], message: str, tmp_path: Path
) -> None:
    model = StateSpaceModel()
    change(model)
    with pytest.raises(ValueError, match=rf"must be as StateSpaceModel\(.*{message}"):
        model.save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_never_replaces_a_good_file(bad: float, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    good = improved()
    good.save(path)
    broken = improved()
    with torch.no_grad():
        broken.layers[1].get_parameter("A")[2, 3] = bad
    with pytest.raises(ValueError, match=r"layers.1.A of the model must be finite to be saved"):
        broken.save(path)
    assert_equal(ImprovedSSM.load(path), good)


def test_the_class_must_be_the_one_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    standard().save(path)
    with pytest.raises(ValueError, match="it holds a StateSpaceModel, not ImprovedSSM"):
        ImprovedSSM.load(path)


# Hostile and damaged files


def tensors_of(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def write(
    path: Path,
    model: Model,
    tensors: dict[str, Tensor] | None = None,
    **header: str | None,
) -> None:
    """A file of ``model`` with other tensors or header entries; ``None`` drops one."""
    entries = {
        "format": "ssm_fast",
        "version": "1",
        "class": type(model).__name__,
        "config": json.dumps(model.config()),
    } | header
    kept = {key: value for key, value in entries.items() if value is not None}
    path.write_bytes(safetensors_save(tensors_of(model) if tensors is None else tensors, kept))


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_the_writer_of_these_tests_writes_what_is_accepted(tmp_path: Path) -> None:
    write(tmp_path / "m", improved())
    assert_equal(load_model(tmp_path / "m"), improved())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": None}, "not an ssm_fast checkpoint: format is None"),
        ({"format": "pt"}, "not an ssm_fast checkpoint: format is 'pt'"),
        ({"class": None}, r"the header lacks \['class'\]"),
        ({"config": None}, r"the header lacks \['config'\]"),
        ({"version": "2"}, "format version '2', this package reads 1"),
        ({"class": "os.system"}, "unknown class 'os.system', expected one of"),
        ({"class": "Module"}, "unknown class 'Module'"),
        ({"config": "{"}, "config is not valid JSON"),
        ({"config": "[" * 200_000}, "config is not valid JSON"),
        ({"config": "[1]"}, "config must be a JSON object"),
        ({"config": "{}"}, "config is not one of a ImprovedSSM .*input_dim"),
    ],
)
def test_a_header_of_another_kind(
    header: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "m", improved(), None, **header)
    refused(tmp_path / "m", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"__class__": 1}, "config has an unknown key '__class__'"),
        ({"self": 1}, "config has an unknown key 'self'"),
        ({"input_dim": "5"}, "config 'input_dim' must be int, got str"),
        ({"input_dim": 5.0}, "config 'input_dim' must be int, got float"),
        ({"input_dim": True}, "config 'input_dim' must be int, got bool"),
        ({"input_dim": 0}, "input_dim must be at least 1"),
        ({"input_dim": -(2**70)}, "config 'input_dim' must be at most 1048576, got"),
        ({"discrete": 1}, "config 'discrete' must be bool, got int"),
        ({"norm": "batch"}, "norm must be 'output' or 'state', got 'batch'"),
        ({"norm": ["output"]}, "config 'norm' must be str, got list"),
        ({"log_std_init": float("nan")}, "log_std_init must be finite, got nan"),
        ({"state_dim": 2**62}, "config 'state_dim' must be at most 1048576"),
        ({"state_dim": 10**4000}, "config"),
        ({"state_dim": 40_000}, "must have shape"),
        ({"state_dim": 2**20, "hidden_dim": 2**20}, "must have shape"),
        ({"num_layers": 10**6}, "config asks for 1000000 layers, the file has 2. tensors"),
        ({"num_layers": 3}, r"tensors missing: \['layers.2"),
        ({"num_layers": 1}, r"not expected: \['layers.1"),
        ({"action_dim": 4}, r"actor.weight must have shape \[4, 8\], got \[3, 8\]|log_std"),
        ({"normalize_observations": True}, r"tensors missing: \['obs_norm.count'"),
    ],
)
def test_a_configuration_that_does_not_fit_allocates_nothing(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = improved()
    if change.get("state_dim") == 10**4000:
        config = json.dumps(model.config()).replace('"state_dim": 6', f'"state_dim": 1{"0" * 4000}')
    else:
        config = json.dumps(model.config() | change)
    write(tmp_path / "m", model, config=config)
    start, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "m", message)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kB
    assert time.perf_counter() - start < 20.0


def test_tensors_that_are_not_exactly_the_models(tmp_path: Path) -> None:
    path, model = tmp_path / "m", improved(normalize_observations=True)

    def with_(**changes: Tensor | None) -> None:
        tensors: dict[str, Any] = tensors_of(model)
        for name, value in changes.items():
            tensors[name.replace("__", ".")] = value
        write(path, model, {name: value for name, value in tensors.items() if value is not None})

    with_(critic__bias=None)
    refused(path, r"tensors missing: \['critic.bias'\], not expected: \[\]")
    with_(extra=torch.zeros(3))
    refused(path, r"tensors missing: \[\], not expected: \['extra'\]")
    with_(critic__bias=torch.zeros(1, 1))
    refused(path, r"critic.bias must have shape \[1\], got \[1, 1\]")
    with_(actor__weight=torch.zeros(8, 3))
    refused(path, r"actor.weight must have shape \[3, 8\], got \[8, 3\]")
    with_(critic__bias=torch.zeros(1, dtype=torch.float64))
    refused(path, "critic.bias has dtype torch.float64, others torch.float32")
    with_(encoder__weight=torch.zeros(8, 5, dtype=torch.int32))
    refused(path, "torch.int32")
    with_(obs_norm__mean=torch.zeros(5))
    refused(path, r"obs_norm.mean must have dtype torch.float64, got torch.float32")
    with_(obs_norm__count=torch.zeros((), dtype=torch.float64))
    refused(path, "obs_norm.count must have dtype torch.int64")
    with_(obs_norm__count=torch.tensor(-1))
    refused(path, "obs_norm.count must not be negative")
    with_(obs_norm__var=torch.tensor([1.0, 1.0, -1e-3, 1.0, 1.0], dtype=torch.float64))
    refused(path, "obs_norm.var must not be negative")
    for bad in (float("nan"), float("inf")):
        with_(log_std=torch.tensor([0.0, bad, 0.0]))
        refused(path, "log_std holds NaN or Inf")


def raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    n = len(header) if length is None else length
    path.write_bytes(n.to_bytes(8, "little") + header + data)


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "m"
    refused(path, "cannot be read .*No such file")
    refused(tmp_path, "not a regular file")
    path.write_bytes(b"")
    refused(path, "truncated, or not a safetensors file")
    path.write_bytes(b"\x10\0\0")
    refused(path, "truncated, or not a safetensors file")
    raw(path, b"{}", length=2**62)
    refused(path, "truncated, or not a safetensors file")
    raw(path, b"{}")
    refused(path, "not an ssm_fast checkpoint")
    raw(path, b"[" * 100_000)
    refused(path, "not a valid safetensors file")
    raw(path, b"\xff\xfe{}")
    refused(path, "not a valid safetensors file")
    raw(path, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"\0" * 12)
    refused(path, "not a valid safetensors file")
    raw(
        path, b'{"a":{"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]}}', b"\0" * 4
    )
    refused(path, "not a valid safetensors file")
    raw(path, b" " * (2**20 + 1))
    refused(path, "a header of 1048577 bytes, more than the 1048576 allowed")


def test_a_file_beyond_the_size_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # sparse
    refused(path, "2147483649 bytes, more than the 2147483648 allowed")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    refused(tmp_path / "m", "not a regular file")


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    path, witness = tmp_path / "m", tmp_path / "witness"

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(witness),)

    path.write_bytes(pickle.dumps(Touch()))
    refused(path, "safetensors file")
    torch.save({"model": Touch()}, path)
    refused(path, "safetensors file")
    assert not witness.exists()


def test_no_mutation_of_a_file_does_more_than_raise_value_error(tmp_path: Path) -> None:
    path = tmp_path / "m"
    model = improved(num_layers=1)
    model.save(path, {"env_id": "x"})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    outcomes = set()
    for i in range(400):
        damaged = bytearray(whole)
        if i % 4 == 0:
            damaged = damaged[: generator.randrange(len(whole))]
        else:
            end = header if i % 4 < 3 else len(whole)
            for _ in range(generator.randrange(1, 4)):
                damaged[generator.randrange(end)] = generator.randrange(256)
        path.write_bytes(damaged)
        message = None
        try:
            load_model(path)
        except ValueError as error:
            message = str(error)
        assert message is None or str(path) in message
        outcomes.add(message is None)
    assert outcomes == {True, False}


# Writing


def test_write_atomic_writes_new_and_replaces_old(tmp_path: Path) -> None:
    path = tmp_path / "folder.x" / "data.json"
    path.parent.mkdir()
    suffixes = []
    for text in (b"first", b"second"):

        def writer(temporary: Path, text: bytes = text) -> None:
            suffixes.append(temporary.suffix)
            temporary.write_bytes(text)

        write_atomic(str(path), writer)
        assert path.read_bytes() == text
        assert os.listdir(path.parent) == ["data.json"]
    assert suffixes == [".json", ".json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_write_atomic_never_touches_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("old")
    with path.open() as reader:
        write_atomic(path, lambda temporary: temporary.write_text("new and longer"))
        assert reader.read() == "old"
    assert path.read_text() == "new and longer"


def test_write_atomic_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_writer_that_raises_leaves_the_old_file(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "data"
    path.write_text("old")

    def writer(temporary: Path) -> None:
        temporary.write_text("half")
        raise error("stop")

    with pytest.raises(error, match="stop"):
        write_atomic(path, writer)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["data"]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        standard().save(tmp_path / "missing" / "m")
    (tmp_path / "m").mkdir()
    with pytest.raises(OSError, match="directory"):
        standard().save(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]


KILLED = """
import os, signal, sys
from ssm_fast.checkpoint import write_atomic

def writer(temporary):
    with open(temporary, "wb") as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

write_atomic(sys.argv[1], writer)
"""


def test_a_process_killed_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = improved()
    model.save(path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    leftovers = [entry for entry in tmp_path.iterdir() if entry != path]
    assert [entry.read_bytes() for entry in leftovers] == [b"half"]
    assert_equal(ImprovedSSM.load(path), model)
    improved(seed=1).save(path)
    assert_equal(ImprovedSSM.load(path), improved(seed=1))
