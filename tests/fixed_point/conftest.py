"""What the tests of the solver core share."""

import pytest
from small_slate import compiled_quickly


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Hundreds of small programs that run once: their compilation is the time."""
    with compiled_quickly():
        yield
