"""A configuration's model against the constructors that it is read from."""

import jax
import pytest
from flax import nnx

from configs import base
from implicit_slots import SLATE, Autoencoder, SetPredictor
from implicit_slots.models.build import build_model

MODELS = {
    SLATE: base.get_config,
    Autoencoder: base.autoencoder,
    SetPredictor: base.set_prediction,
}


def described(make):
    """A model's structure, its settings, and the shapes of its parameters."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state))


@pytest.mark.parametrize("kind", MODELS)
def test_the_default_configuration_is_the_constructor_without_arguments(kind):
    section = MODELS[kind]("test", base.scenes()).model
    built = described(lambda: build_model(section, resolution=128, seed=0))
    assert built == described(lambda: kind(128, rngs=nnx.Rngs(params=0)))
    section.num_slots = 3
    changed = described(lambda: build_model(section, resolution=128, seed=0))
    assert changed != built
