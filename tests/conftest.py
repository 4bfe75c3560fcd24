"""What all tests share."""

import os

# Before JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """One cache for the session, so that nothing of it outlives the tests."""
    folder = tmp_path_factory.getbasetemp().parent / "compilation"
    jax.config.update("jax_compilation_cache_dir", str(folder))


@pytest.fixture
def strict_promotion():
    """No silent change of rank or dtype: for solver and model tests."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield
