from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.experience.experience_buffer import ExperienceBuffer


def step(i: int) -> tuple[Tensor, Tensor]:
    """The i-th observation and target, which tell each other's number."""
    return torch.tensor([i, -i], dtype=torch.float32), torch.tensor(2.0 * i)


def steps(first: int, last: int) -> tuple[Tensor, Tensor]:
    pairs = [step(i) for i in range(first, last)]
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def stored(buffer: ExperienceBuffer) -> list[int]:
    """The numbers of the steps that can be sampled."""
    observations, targets = buffer.get_batch(2000)
    assert torch.equal(targets, 2 * observations[:, 0])
    assert torch.equal(observations[:, 1], -observations[:, 0])
    return sorted({int(i) for i in observations[:, 0]})


class TestSteps:
    def test_keeps_the_last_ones(self) -> None:
        buffer = ExperienceBuffer(5, seed=0)
        for i in range(13):
            buffer.add(*step(i))
            assert len(buffer) == min(i + 1, 5)
            assert stored(buffer) == list(range(max(0, i - 4), i + 1))

    @pytest.mark.parametrize(
        "sizes", [(3, 1, 4, 2), (5, 5), (12,), (4, 11, 3), (1,) * 9, (2, 0, 3)]
    )
    def test_batched_insert_equals_single_ones(self, sizes: tuple[int, ...]) -> None:
        one, other = ExperienceBuffer(5, seed=0), ExperienceBuffer(5, seed=0)
        one.add(*step(0))
        other.add(*step(0))
        first = 1
        for size in sizes:
            x, y = steps(first, first + size) if size else (torch.empty(0, 2), torch.empty(0))
            one.extend(x, y, continues=True)
            for i in range(first, first + size):
                other.add(*step(i))
            first += size
        assert stored(one) == stored(other) == list(range(max(0, first - 5), first))
        for L in range(1, len(one) + 1):
            assert torch.equal(
                one.sample_sequences(50, L)["targets"].unique(dim=0),
                other.sample_sequences(50, L)["targets"].unique(dim=0),
            )

    def test_what_is_stored_in_inference_mode_is_good_outside(self) -> None:
        buffer = ExperienceBuffer(5, seed=0)
        with torch.inference_mode():
            buffer.add(*step(0))
        buffer.add(*step(1))
        assert stored(buffer) == [0, 1]
        assert not buffer.get_batch(3)[0].is_inference()

    def test_draws_uniformly(self) -> None:
        buffer = ExperienceBuffer(10, seed=0)
        buffer.extend(*steps(0, 13))
        counts = torch.bincount(buffer.get_batch(20_000)[0][:, 0].long(), minlength=13)
        assert torch.equal(counts[:3], torch.zeros(3, dtype=torch.int64))
        assert ((counts[3:] - 2000).abs() < 5 * 2000**0.5).all()

    def test_seed(self) -> None:
        buffers = [ExperienceBuffer(10, seed=seed) for seed in (3, 3, 4)]
        for buffer in buffers:
            buffer.extend(*steps(0, 10))
        draws = [torch.stack([b.get_batch(8)[1] for _ in range(3)]) for b in buffers]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_any_field(self) -> None:
        buffer = ExperienceBuffer(4, seed=0)
        buffer.add(np.zeros(3, np.float32), 1.5, actions=torch.tensor(7), image=torch.ones(2, 2))
        sample = buffer.sample(6)
        assert {n: list(x.shape) for n, x in sample.items()} == {
            "observations": [6, 3], "targets": [6], "actions": [6], "image": [6, 2, 2],
        }  # fmt: skip
        assert sample["actions"].dtype == torch.int64

    def test_keeps_copies_and_gives_copies(self) -> None:
        buffer, x = ExperienceBuffer(4, seed=0), torch.ones(2, requires_grad=True)
        buffer.add(x, torch.tensor(0.0))
        with torch.no_grad():
            x.zero_()
        observations, _ = buffer.get_batch(3)
        assert torch.equal(observations, torch.ones(3, 2))
        assert not observations.requires_grad
        observations.zero_()
        assert torch.equal(buffer.get_batch(1)[0], torch.ones(1, 2))

    def test_memory_is_taken_once(self) -> None:
        buffer = ExperienceBuffer(4)
        buffer.add(*step(0))
        address = buffer._fields["observations"].data_ptr()
        buffer.extend(*steps(1, 11))
        assert buffer._fields["observations"].data_ptr() == address


def collect(seed: int, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Steps of one environment, with the states that a model had before each of them."""
    torch.manual_seed(0)
    model = StateSpaceModel(4, 2, 1, 8).double()
    torch.manual_seed(seed)
    M = sum(lengths)
    reset = torch.zeros(M, dtype=torch.bool)
    for i in range(len(lengths)):
        reset[sum(lengths[:i])] = True
    x, h = torch.randn(M, 2).double(), torch.zeros(1, 4).double()
    states, outputs = [], []
    with torch.no_grad():
        for t in range(M):
            states.append(h[0])
            y, h = model(x[t : t + 1], h, reset[t : t + 1])
            outputs.append(y[0])
    return {
        "observations": x, "targets": torch.stack(outputs), "reset": reset,
        "state": torch.stack(states),
    }  # fmt: skip


class TestSequences:
    def test_replay_from_the_stored_state_gives_the_same_outputs(self) -> None:
        """Over ends of episodes and the end of the memory, from the middle of episodes."""
        buffer = ExperienceBuffer(50, seed=0)
        for seed in range(3):  # three environments
            buffer.extend(**collect(seed, (7, 5, 12)))
        torch.manual_seed(0)
        model = StateSpaceModel(4, 2, 1, 8).double()
        for L in (1, 2, 11, 24):
            batch = buffer.sample_sequences(64, L)
            assert batch["observations"].shape == (64, L, 2)
            assert batch["initial_state"].shape == (64, 4)
            assert "state" not in batch
            with torch.no_grad():
                y, _ = model(batch["observations"], batch["initial_state"], batch["reset"])
            torch.testing.assert_close(y, batch["targets"])
            assert L == 1 or batch["reset"][:, 1:].any()

    def test_never_crosses_a_gap(self) -> None:
        buffer = ExperienceBuffer(100, seed=0)
        for first in (0, 10, 20):
            buffer.extend(*steps(first, first + 4))
        buffer.add(*step(24))
        buffer.add(*step(40), continues=False)
        numbers = buffer.sample_sequences(500, 3)["observations"][:, :, 0]
        assert torch.equal(numbers - numbers[:, :1], torch.arange(3.0).expand(500, 3))
        assert sorted(set(numbers[:, 0].tolist())) == [0, 1, 10, 11, 20, 21, 22]
        assert sorted(set(buffer.sample_sequences(50, 5)["targets"][:, 0].tolist())) == [40]
        with pytest.raises(ValueError, match="no 6 consecutive steps are stored"):
            buffer.sample_sequences(1, 6)
        assert buffer.longest_sequence() == 5

    def test_crosses_to_the_first_step_of_an_episode(self) -> None:
        buffer = ExperienceBuffer(100, seed=0)
        for first in (0, 10):
            reset = torch.tensor([True, False, False, False])
            buffer.extend(*steps(first, first + 4), reset=reset)
        batch = buffer.sample_sequences(10, 8)
        assert batch["targets"][0].tolist() == [0, 2, 4, 6, 20, 22, 24, 26]
        assert batch["reset"][0].tolist() == [True, False, False, False] * 2

    def test_never_crosses_the_oldest_step(self) -> None:
        buffer = ExperienceBuffer(7, seed=0)
        for i in range(24):
            buffer.add(*step(i))
        numbers = buffer.sample_sequences(300, 5)["observations"][:, :, 0]
        assert torch.equal(numbers - numbers[:, :1], torch.arange(5.0).expand(300, 5))
        assert sorted(set(numbers[:, 0].tolist())) == [17, 18, 19]
        assert not buffer.sample_sequences(2, 5)["reset"].any()
        assert buffer.longest_sequence() == 7
        assert ExperienceBuffer(7).longest_sequence() == 0

    def test_draws_uniformly(self) -> None:
        buffer = ExperienceBuffer(100, seed=0)
        for first in (0, 10, 20):  # few draws fit: half of the draws come from the list
            buffer.extend(*steps(first, first + 4))
        buffer.extend(*steps(30, 36))
        first = torch.cat(
            [buffer.sample_sequences(10, 4)["observations"][:, 0, 0] for _ in range(900)]
        )
        values, counts = first.unique(return_counts=True)
        assert values.tolist() == [0, 10, 20, 30, 31, 32]
        assert ((counts - 1500).abs() < 5 * 1500**0.5).all()


class TestFile:
    @pytest.mark.parametrize("count", [3, 24])
    def test_goes_on_as_the_saved_one(self, tmp_path: Path, count: int) -> None:
        path = tmp_path / "experience.safetensors"
        buffer = ExperienceBuffer(20, seed=5)
        data = collect(0, (7, 5, 12))
        buffer.extend(**{name: x[:count] for name, x in data.items()})
        buffer.get_batch(3)
        buffer.save(path)
        other = ExperienceBuffer.load(path)
        assert (len(other), other.max_size) == (len(buffer), 20)
        more = {name: x[:4] for name, x in collect(1, (7, 5, 12)).items()}
        for _ in range(3):
            expected = buffer.sample_sequences(9, 3)
            for name, x in other.sample_sequences(9, 3).items():
                assert torch.equal(x, expected[name])
            buffer.extend(**more)
            other.extend(**more)
            assert len(other) == len(buffer)
        assert list(tmp_path.iterdir()) == [path]

    def test_same_samples(self, tmp_path: Path) -> None:
        path = tmp_path / "experience.safetensors"
        for count in (6, 20, 33):
            buffer = ExperienceBuffer(20, seed=5)
            buffer.extend(*steps(0, count // 2))
            buffer.extend(*steps(100, 100 + count - count // 2))
            buffer.save(path)
            other = ExperienceBuffer.load(path)
            for _ in range(3):
                assert torch.equal(buffer.get_batch(8)[0], other.get_batch(8)[0])
                one, two = buffer.sample_sequences(8, 3), other.sample_sequences(8, 3)
                assert torch.equal(one["observations"], two["observations"])
            buffer.add(*step(7))
            other.add(*step(7))
            assert stored(buffer) == stored(other)

    def test_empty(self, tmp_path: Path) -> None:
        ExperienceBuffer(20).save(tmp_path / "e.safetensors")
        buffer = ExperienceBuffer.load(tmp_path / "e.safetensors")
        assert len(buffer) == 0
        buffer.add(*step(1))
        assert stored(buffer) == [1]

    def test_refuses_other_files(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(b"no such file")
        with pytest.raises(ValueError, match="is not an experience buffer"):
            ExperienceBuffer.load(path)
        save_file({"x": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match="its format must be"):
            ExperienceBuffer.load(path)
        good: dict[str, Any] = {
            "observations": torch.zeros(3, 2), "targets": torch.zeros(3),
            "_run": torch.arange(1, 4), "_generator": torch.Generator().get_state(),
        }  # fmt: skip
        header = {
            "format": "ssm_fast.experience", "version": "1", "max_size": "5",
            "fields": json.dumps(["observations", "targets"]),
        }  # fmt: skip
        save_file(good, path, header)
        assert len(ExperienceBuffer.load(path)) == 3
        cases: list[tuple[dict[str, Any], dict[str, str], str]] = [
            ({}, {"max_size": "2"}, "at most max_size"),
            ({}, {"max_size": "1e99"}, "max_size must lie in"),
            ({}, {"max_size": "5000000000000"}, "max_size must lie in"),
            ({}, {"fields": "[]"}, "its tensors must be"),
            ({}, {"fields": '[["a"]]'}, "fields must be a list of names"),
            ({}, {"fields": '{"a": 1}'}, "fields must be a list of names"),
            ({}, {"fields": '["observations", "targets", "_run"]'}, "its tensors must be"),
            ({"_run": torch.full((3,), 2**63 - 1)}, {}, "_run must be positive, at most"),
            ({}, {"fields": '["targets", "targets"]'}, "its tensors must be"),
            ({"targets": torch.zeros(2)}, {}, "same number of steps"),
            ({"_run": torch.zeros(3, dtype=torch.int64)}, {}, "_run must be positive"),
            ({"_generator": torch.zeros(3, dtype=torch.uint8)}, {}, ""),
        ]
        for tensors, entries, match in cases:
            save_file(good | tensors, path, header | entries)
            with pytest.raises(ValueError, match=f"is not an experience buffer: .*{match}"):
                ExperienceBuffer.load(path)
        save_file(
            {name: good[name] for name in ("_run", "_generator")}, path, header | {"fields": "[]"}
        )
        with pytest.raises(ValueError, match="is not an experience buffer: its steps must have"):
            ExperienceBuffer.load(path)


class TestBadInput:
    def test_insert(self) -> None:
        buffer = ExperienceBuffer(4, seed=0)
        with pytest.raises(TypeError, match="reset must be one boolean a step"):
            buffer.add(*step(0), reset=torch.tensor(1.0))
        with pytest.raises(ValueError, match="no field can have the name 'initial_state'"):
            buffer.add(*step(0), initial_state=torch.tensor(1.0))
        buffer.add(*step(0))
        x, y = step(1)
        with pytest.raises(
            ValueError, match=r"observations must have shape \[2\] a step, .* \[1\]"
        ):
            buffer.add(x[:1], y)
        with pytest.raises(TypeError, match=r"targets must have dtype torch\.float32, .*float64"):
            buffer.add(x, y.double())
        with pytest.raises(ValueError, match="the fields must be"):
            buffer.add(x, y, actions=torch.tensor(1))
        with pytest.raises(ValueError, match=r"targets must have shape \[2, \.\.\.\], got \[1\]"):
            buffer.extend(torch.stack([x, x]), y.unsqueeze(0))
        with pytest.raises(TypeError, match="observations must be a tensor, array or number"):
            buffer.add("text", y)
        assert stored(buffer) == [0]

    def test_sampling(self) -> None:
        buffer = ExperienceBuffer(4)
        with pytest.raises(ValueError, match="the buffer is empty"):
            buffer.get_batch(1)
        with pytest.raises(ValueError, match="length must be at most the 0 steps stored, got 1"):
            buffer.sample_sequences(1, 1)
        buffer.add(*step(0))
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            buffer.get_batch(0)
        with pytest.raises(TypeError, match="n must be an int, got float"):
            buffer.sample(2.0)

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="max_size must be at least 1, got 0"):
            ExperienceBuffer(0)
        with pytest.raises(ValueError, match="seed must be at least 0"):
            ExperienceBuffer(1, seed=-1)
