"""Whether MuJoCo can draw on this machine, for the tests of films."""

from __future__ import annotations

import os
import subprocess
import sys


def draws_off_screen() -> bool:
    """Whether MuJoCo finds an OpenGL to draw with here."""
    code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    return any(
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"MUJOCO_GL": backend},
            capture_output=True,
            check=False,
        ).returncode
        == 0
        for backend in ("egl", "osmesa")
    )
