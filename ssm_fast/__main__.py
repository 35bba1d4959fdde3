"""`python -m ssm_fast` is the command line `ssm-fast`."""

from __future__ import annotations

from ssm_fast.cli import run

run()
