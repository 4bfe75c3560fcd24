"""Paths as users give them, and locks."""

import os
import pathlib

import pytest

from implicit_slots.runtime.errors import InvalidValue
from implicit_slots.runtime.files import expand

ADDRESSES = ("gs://bucket/run", "s3://bucket", "gs:/bucket/run", "file:///data")


@pytest.mark.parametrize("path", [*ADDRESSES, pathlib.Path("gs://bucket/run")])
def test_the_address_of_a_bucket_is_no_folder(path):
    with pytest.raises(InvalidValue, match="is no folder of this machine: mount the"):
        expand(path)


def test_the_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("~") == pathlib.Path("/home/me")
    assert expand("~/a b") == pathlib.Path("/home/me/a b")
    for path in ("C:/data", "a~b/c", "2026-11-27T10:00", "a:b/c"):
        assert expand(path) == pathlib.Path(path)


def test_a_name_that_is_no_text_is_a_sentence():
    with pytest.raises(InvalidValue, match=r"the name b'\\xe9' is not UTF-8"):
        expand(os.fsdecode(b"\xe9"))


def test_without_a_home_folder_there_is_a_sentence(monkeypatch):
    """As in a container whose user has no entry: the path comes back as it was."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(InvalidValue, match="there is no home folder for ~/x"):
        expand("~/x")
    assert expand("./~/x") == pathlib.Path("~/x")
