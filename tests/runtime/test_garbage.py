"""Garbage is not looked for until the first step, and then among new objects alone."""

import gc

import pytest

from implicit_slots.runtime import garbage


@pytest.fixture(autouse=True)
def as_before():
    yield
    gc.enable()
    gc.unfreeze()


def test_what_is_made_meanwhile_is_not_looked_through():
    garbage.leave_out()
    assert not gc.isenabled()
    before = gc.get_freeze_count()
    kept = [[]]
    garbage.look_for_it()
    assert gc.isenabled() and gc.get_freeze_count() > before
    assert not any(found is kept for found in gc.get_objects())


def test_a_program_that_switched_it_off_is_left_alone():
    gc.disable()
    garbage.leave_out()
    garbage.look_for_it()
    assert not gc.isenabled()
