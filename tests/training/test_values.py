"""Every key of every configuration has a type and a range."""

import importlib
import inspect
import json
import math
import pathlib
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import autoencoder_scenes, scenes
from implicit_slots.data.registry import SOURCES, USAGE, request
from implicit_slots.data.source import DataError
from implicit_slots.runtime.config import flat
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.values import Flag, Number, Wholes
from implicit_slots.training.checks import check, check_same_run
from implicit_slots.training.values import KINDS

ROOT = pathlib.Path(__file__).parents[2]
VARIANTS = (None, "learned", "bb", "smoke", "image", "tokens", "full")
NO_MODELS = ("__init__", "base", "image_input", "smoke")
FILES = [f.stem for f in (ROOT / "configs").glob("*.py") if f.stem not in NO_MODELS]


def configurations():
    for name in FILES:
        for variant in VARIANTS:
            try:
                yield importlib.import_module(f"configs.{name}").get_config(variant)
            except ValueError as error:  # It has no such variant.
                assert "there is no variant" in str(error)


def changed(config, key, value) -> Any:
    """A copy, whatever type the key has."""
    found = config.to_dict()
    section = found
    *sections, name = key.split(".")
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    return ConfigDict(found)


def test_every_key_is_declared_once_and_every_configuration_is_right():
    used = set()
    for config in configurations():
        check(config, "train")
        used |= flat(config.to_dict()).keys()
    assert used == KINDS.keys()


def test_a_run_goes_on_that_has_a_key_of_older_versions(tmp_path):
    config = scenes.get_config("smoke")
    old = config.to_dict()
    old["model"]["attention"] = "xla"
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_same_run(config, tmp_path)
    config.model.width = 9
    with pytest.raises(UserError, match=r"its model\.width is 16, .* is 9; choose"):
        check_same_run(config, tmp_path)


def test_every_option_of_a_reader_is_declared():
    for data_set in SOURCES.values():
        options = inspect.signature(data_set.reader).parameters.keys()
        # An evaluation gives the last one.
        for option in {*options, *USAGE} - {"split", "keys", "splits", "shift"}:
            assert f"data.{option}" in KINDS, option


@pytest.mark.parametrize("module", [scenes, autoencoder_scenes])
def test_no_key_takes_what_it_cannot_hold(module):
    config = module.get_config("smoke")
    for key in flat(config.to_dict()):
        bad = [None, math.nan, {"a": 1}, [None]]
        if not isinstance(KINDS[key], Flag | Wholes):
            bad += [True, (), [1, 2]]
        if isinstance(KINDS[key], Number) or not hasattr(KINDS[key], "low"):
            bad += [-math.inf]
        if hasattr(KINDS[key], "low"):
            bad += ["", "x", "1", -1, 10**400]
        for value in bad:
            with pytest.raises(UserError, match=rf"config\.{key}\b"):
                check(changed(config, key, value), "train")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("optimizer.learning_rate", -1e-3, "learning_rate must not be negative, got"),
        ("data.cache", "None", "cache must be a path, or empty for none"),
        ("model.encoder_strides", (), "encoder_strides must be whole numbers from 1"),
        ("name", "", "config.name must be a folder's name, got ''"),
        ("seed", 2**32, "config.seed must be at most 4,294,967,295"),
        (
            "data.path",
            "gs://bucket/imgs",
            "data.path is no folder of this machine: mount",
        ),
        ("alarms.patience", 1.5, "patience must be a whole number, got 1.5"),
        ("model.remat", "False", "remat must be True or False, got 'False'"),
        ("model.adjoint.solver.name", "x", "solver.name must be one of picard,"),
        ("optimizer.learningrate", 1.0, "optimizer.learningrate is no key;"),
        ("model.head_size", 16, "config.model.head_size is no key of slate"),
        ("data.no_option", 1, None),
    ],
)
def test_what_is_outside_is_one_sentence(key, value, sentence):
    config = changed(scenes.get_config("smoke"), key, value)
    if sentence is None:  # Its reader knows its options.
        check(config, "train")
        with pytest.raises(UserError, match="'scenes' has no option no_option"):
            request(config.data, "train")
        return
    with pytest.raises(UserError) as refusal:
        check(config, "train")
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["log_every", "evaluation.masks.every", "model.width"])
def test_a_key_that_is_missing_is_one_sentence(key):
    config = scenes.get_config("smoke").to_dict()
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    del section[name]
    with pytest.raises(UserError, match=f"config.{key} is missing"):
        check(ConfigDict(config), "train")


def test_the_data_commands_refuse_the_same_values():
    config = changed(scenes.get_config("smoke"), "data.resolution", "x")
    with pytest.raises(DataError, match=r"data\.resolution must be a whole number"):
        request(config.data, "train")
