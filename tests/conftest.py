"""What holds for every test: a seed of its own, and Triton interpreted where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models as small as those of the tests lose by a second thread, most where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test draws the same numbers alone and after any others."""
    torch.manual_seed(0)
