"""Kinds of values: what each takes, and what is said of the rest."""

import math

import pytest

from implicit_slots.runtime.values import (
    Flag,
    Name,
    Number,
    OneOf,
    Place,
    Text,
    Whole,
    Wholes,
    check_values,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Whole(1), (1, 2**31 - 1), (0, -1, 2**31, 1.0, NAN, INF, True, None, "1", ())),
        (Number(), (0, 0.0, 1e38), (-1e-3, NAN, INF, True, None, "1", [1.0], 1e39)),
        (Number(closed=""), (1e-30,), (0, 0.0, -1.0, INF, NAN)),
        (Number(closed="[]"), (0.0, INF), (-1.0, -INF, NAN, 10**400)),
        (Number(0.0, 1.0), (0, 0.5), (1, 1.5, -0.1, NAN)),
        (Number(0.0, 1.0, closed="]"), (1, 0.5), (0, 1.5)),
        (Flag(), (True, False), (0, 1, None, "False", ())),
        (OneOf(("a", "b")), ("a",), ("", "c", None, 1, ("a",))),
        (Text(), ("", "a"), (None, 1, True, ("a",))),
        (
            Name(),
            ("a b=1,c", "é"),
            ("", " ", ".", "..", "a/b", "a\\b", "a\n", "None", 1),
        ),
        (
            Place(),
            ("", "a/b", "../x", "é b"),
            (None, 1, "None", "null", "gs://b", "\n"),
        ),
        (Wholes(1), ((1,), [2, 1]), ((), [], (0,), (1.0,), (True,), 3, "1", None)),
    ],
)
def test_a_kind_takes_what_it_says(kind, good, bad):
    for value in good:
        assert kind.fault(value) == "", value
    for value in bad:
        assert kind.fault(value), value


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        (Whole(1), 0, "config.key must be at least 1, got 0"),
        (Whole(0), -1, "config.key must not be negative, got -1"),
        (Whole(1, 1_000), 1_001, "config.key must be at most 1,000, got 1001"),
        (Whole(1), 1.5, "config.key must be a whole number, got 1.5"),
        (Number(), -1e-3, "config.key must not be negative, got -0.001"),
        (Number(), INF, "config.key must be finite, got inf"),
        (Number(closed=""), 0.0, "config.key must be positive, got 0.0"),
        (Number(0.0, 1.0), 1, "config.key must be in [0, 1), got 1"),
        (Flag(), 1, "config.key must be True or False, got 1"),
        (OneOf(("a", "b")), "c", "config.key must be one of a, b, got 'c'"),
        (Wholes(1), (), "config.key must be whole numbers from 1, at least one, as in"),
    ],
)
def test_what_is_said_names_key_range_and_value(kind, value, sentence):
    with pytest.raises(ValueError) as refusal:
        check_values({"other": value, "key": value}, {"key": kind})
    assert str(refusal.value).startswith(sentence)
