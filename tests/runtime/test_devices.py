"""Devices that are not there, and too little memory."""

import jax
import numpy as np
import pytest

from implicit_slots.runtime.devices import find_devices, is_out_of_memory
from implicit_slots.runtime.errors import UserError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        # What JAX raises for JAX_PLATFORMS=cuda without its plugin, and for tpu.
        (AssertionError(), "JAX finds no device of JAX_PLATFORMS=cuda; unset"),
        (RuntimeError("no TPU\nhere"), r"of JAX_PLATFORMS=cuda \(no TPU\); unset"),
    ],
)
def test_a_platform_without_devices_is_one_sentence(error, reason, monkeypatch):
    def refuse():
        raise error

    find_devices()
    monkeypatch.setattr(jax, "devices", refuse)
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "cuda")
    try:
        with pytest.raises(UserError, match=reason) as refusal:
            find_devices()
    finally:
        jax.config.update("jax_platforms", before)
    assert "\n" not in str(refusal.value)


def test_too_little_memory_is_told_from_other_errors():
    with pytest.raises(MemoryError) as refusal:
        np.empty(2**59)
    assert is_out_of_memory(refusal.value)
    assert is_out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"))
    assert not is_out_of_memory(ValueError("out"))
