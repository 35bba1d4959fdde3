"""What holds for every test: a seed of its own, and Triton interpreted where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test draws the same numbers alone and after any others."""
    torch.manual_seed(0)
