"""The study of SLATE's options: every arm is a configuration, and the table pairs."""

import json

import pytest
from flax import nnx

from configs import scenes
from experiments.studies import options
from implicit_slots.models.build import build


@pytest.mark.parametrize("arm", options.ARMS)
def test_every_arm_is_a_model(arm):
    config = scenes.get_config()
    config.update_from_flattened_dict(options.ARMS[arm])
    model = nnx.eval_shape(lambda: build(config))
    assert model.slot_attention.num_slots == 5


def test_the_table_compares_seed_by_seed():
    def found(arm, *values):
        metrics = {name: list(values) for name in options.NAMES}
        return {"arm": arm, "seeds": [0, 1, 2], **metrics}

    names = list(options.ARMS)[:2]
    results = {
        names[0]: found(names[0], 0.5, 0.75, 0.25),
        names[1]: found(names[1], 0.75, 1.0, 0.25),
    }
    lines = options.table(results).splitlines()
    assert lines[2].startswith(f"| {names[0]} | 0.50, 0.75, 0.25 |")
    assert lines[3].startswith(f"| {names[1]} | +0.25 [+0.00, +0.25] |")


@pytest.mark.slow
def test_arms_are_trained_once(tmp_path, monkeypatch, capsys):
    """The second time they are read."""
    monkeypatch.setattr(scenes, "get_config", small)
    arms = ["as it is", "vanilla"]
    arguments = [f"--out={tmp_path}", "--steps=2", "--seeds=2", "--arms", *arms]
    options.main(arguments)
    first = capsys.readouterr().out
    assert "| vanilla |" in first and "as it is {" in first
    options.main(arguments)
    again = capsys.readouterr().out
    assert "| vanilla |" in again and "as it is {" not in again
    found = json.loads((tmp_path / "vanilla.json").read_text())
    assert found["seeds"] == [0, 1] and len(found["fg_ari"]) == 2


ORIGINAL = scenes.get_config


def small():
    config = ORIGINAL("smoke")
    config.data.cache = ""
    return config
