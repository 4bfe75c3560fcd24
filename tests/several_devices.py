"""A function of a test module, run in a process that has several devices."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def run_on_devices(count: int, module: str, function: str) -> None:
    """Runs a function without arguments of tests/models/MODULE on CPU devices."""
    flag = f"--xla_force_host_platform_device_count={count}"
    paths = HERE.parent, HERE, HERE / "models"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    call = f"import {module}; {module}.{function}()"
    subprocess.run([sys.executable, "-c", call], env=environment, check=True)
