"""`python -m ssm_fast` is the command line `ssm-fast`."""

from __future__ import annotations

import sys

from ssm_fast.cli import main

sys.exit(main())
