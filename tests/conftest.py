"""What all tests share."""

import fcntl
import json
import os
import shutil

# Before JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """One cache for the session, so that nothing of it outlives the tests."""
    folder = tmp_path_factory.getbasetemp().parent / "compilation"
    jax.config.update("jax_compilation_cache_dir", str(folder))


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory, worker_id):
    """A copy of a smoke run that nothing interrupted, and what it returned.

    It takes half a minute, so that the workers of a session share one.
    """
    # After the environment is set, and not for tests of other things.
    from small_slate import compiled_quickly

    from configs import scenes
    from implicit_slots.training.run import run

    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent
    with (shared / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "smoke.json").exists():
            config = scenes.get_config("smoke")
            config.data.cache = ""
            command = "python -m implicit_slots.main"
            with compiled_quickly():
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
