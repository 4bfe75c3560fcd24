"""The folder of a run: how it is named, and that its paths stay right."""

import json

import pytest

from configs import dinosaur_scenes, folder
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.workdir import (
    absolute,
    get_config,
    is_same_place,
    read_config,
    workdirs,
)


@pytest.mark.parametrize(
    ("text", "there", "train", "compare"),
    [
        ("a", [], ["a"], ["a"]),
        ("lr=0.1,wd=0", [], ["lr=0.1,wd=0"], ["lr=0.1,wd=0"]),
        ("lr=0.1,wd=0", ["lr=0.1,wd=0"], ["lr=0.1,wd=0"], ["lr=0.1,wd=0"]),
        # A new run beside one whose name it begins with; one of two that is missing.
        ("lr=0.1,wd=0", ["lr=0.1"], ["lr=0.1,wd=0"], ["lr=0.1", "wd=0"]),
        ("a,b", ["a", "b"], ["a", "b"], ["a", "b"]),
        ("a,b,c,d", ["a,b", "c", "d"], ["a,b", "c", "d"], ["a,b", "c", "d"]),
        ("a,b", ["a", "b", "a,b"], ["a,b"], ["a,b"]),
        ("", [], [""], [""]),
        ("a,,b,", ["a", "b"], ["a", "b"], ["a", "b"]),
    ],
)
def test_commas_are_within_a_name_or_between_names(
    text, there, train, compare, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in there:
        (tmp_path / name).mkdir()
    assert workdirs(text, to_compare=False) == train
    assert workdirs(text, to_compare=True) == compare


def test_paths_are_recorded_as_they_are_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    config = folder.get_config("smoke").lock()
    config.data.path, config.data.cache = "imgs", "~/cache"
    found = absolute(config)
    assert found.data.path == str(tmp_path / "imgs")
    assert found.data.cache == "/home/me/cache" and found.evaluation.inception == ""
    assert config.data.path == "imgs"  # The caller's stays as it is.
    config.evaluation.inception = "gs://bucket/weights.pt"
    with pytest.raises(UserError, match="no folder of this machine"):
        absolute(config)


def test_data_are_in_the_same_place_or_were_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "imgs"
    here.mkdir()
    (tmp_path / "link").symlink_to(here)
    assert is_same_place("imgs", str(here)) and is_same_place("link", "imgs")
    assert not is_same_place("imgs", "/elsewhere/imgs")  # Both may be there.
    assert is_same_place("/gone/imgs", str(here))
    assert not is_same_place("/gone/others", str(here))
    assert is_same_place("", "") and not is_same_place("", "imgs")
    assert not is_same_place(None, "imgs")


def test_a_workdir_below_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = folder.get_config("smoke")
    (tmp_path / "config.json").write_text(config.to_json())
    assert json.loads(get_config("~").to_json()) == json.loads(config.to_json())
    with pytest.raises(ValueError, match="no folder of this machine"):
        get_config("gs://bucket/run")


def test_a_run_of_frozen_features_is_read_with_its_own_keys_alone(tmp_path):
    """It has no convolutions, whose keys older runs of other models lack."""
    config = dinosaur_scenes.get_config("smoke")
    (tmp_path / "config.json").write_text(config.to_json())
    found = read_config(tmp_path / "config.json")
    assert found.model.keys() == config.model.keys()


def test_keys_that_are_gone_are_left_out_and_those_that_are_new_mean_their_absence(
    tmp_path,
):
    model = {"name": "slate", "attention": "xla", "width": 3}
    old = {"name": "old", "model": model, "data": {"name": "scenes"}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = read_config(tmp_path / "config.json")
    assert "attention" not in config.model and config.model.width == 3
    assert config.model.tokenizer == "dvae" and config.optimize_programs is True
