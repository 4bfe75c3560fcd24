"""What all tests share."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

# Before JAX is imported, and for the processes that tests start. What runs once or
# twice is not worth optimising; test_programs.py looks at the programs that train.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "XLA_FLAGS" not in os.environ:
    # XLA's older code for fusions is compiled twice as fast. A version without it ends
    # a process that is started with the flag, so that another one is asked; the
    # workers of a session inherit its answer.
    asked = "import jax; jax.jit(lambda x: x).lower(0.0).compile({'%s': False})"
    flag = "xla_cpu_use_fusion_emitters"
    command = [sys.executable, "-c", asked % flag]
    done = subprocess.run(command, capture_output=True, check=False)
    os.environ["XLA_FLAGS"] = f"--{flag}=false" if done.returncode == 0 else ""

import jax
import pytest

# What a script starts in the background ignores Ctrl-C; so would all that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """One cache for the session, so that nothing of it outlives the tests."""
    folder = tmp_path_factory.getbasetemp().parent / "compilation"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory, worker_id):
    """A copy of a smoke run that nothing interrupted, and what it returned.

    It takes half a minute, so that the workers of a session share one.
    """
    # After the environment is set, and not for tests of other things.
    from configs import scenes
    from implicit_slots.training.run import run

    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent
    with (shared / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "smoke.json").exists():
            config = scenes.get_config("tokens-smoke")
            config.data.cache = ""
            command = "python -m implicit_slots.main"
            summary = run(config, shared / "smoke", command=command)
            (shared / "smoke.json").write_text(json.dumps(summary))
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    shutil.copytree(shared / "smoke", workdir)
    return workdir, json.loads((shared / "smoke.json").read_text())


@pytest.fixture
def strict_promotion():
    """No silent change of rank or dtype: for solver and model tests."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield
