"""A configuration's model against the constructors that it is read from."""

import jax
import pytest
from flax import nnx
from small_slate import section

from configs import base
from implicit_slots import SLATE, Autoencoder, FeatureSlots, SetPredictor
from implicit_slots.fixed_point import (
    GMRES,
    Adaptive,
    Anderson,
    BiCGSTAB,
    Broyden,
    Dense,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Truncated,
    Unrolled,
)
from implicit_slots.models.build import (
    ADJOINTS,
    SOLVERS,
    build_adjoint,
    build_model,
    build_solver,
    defaults,
)

MODELS = {
    SLATE: base.get_config,
    Autoencoder: base.autoencoder,
    SetPredictor: base.set_prediction,
    FeatureSlots: base.feature_slots,
}


def described(make):
    """A model's structure, its settings, and the shapes of its parameters."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state))


@pytest.mark.parametrize("kind", MODELS)
def test_the_default_configuration_is_the_constructor_without_arguments(kind):
    config = MODELS[kind]("test", base.scenes()).model
    built = described(lambda: build_model(config, resolution=128, seed=0))
    assert built == described(lambda: kind(128, rngs=nnx.Rngs(params=0)))
    config.num_slots = 3
    changed = described(lambda: build_model(config, resolution=128, seed=0))
    assert changed != built


def test_a_section_without_a_key_has_the_models_own_default():
    """SLATE's slots, not those of slot attention alone."""
    section = base.model("slate")
    for key in ("num_slots", "slot_mlp_size"):
        del section[key]
    model = nnx.eval_shape(lambda: build_model(section, resolution=16, seed=0))
    assert model.slot_attention.num_slots == defaults("slate")["num_slots"] == 12


def test_config_names_every_solver_and_adjoint():
    config = section()
    fields = {"max_steps": 9, "rtol": 1e-3, "depth": 4, "ridge": 1e-5, "memory": 6}
    config.solver.update(fields)
    forward = {"max_steps": 9, "rtol": 1e-3}
    solvers = {
        "picard": Picard(**forward),
        "anderson": Anderson(**forward, depth=4, ridge=1e-5),
        "broyden": Broyden(**forward, memory=6),
    }
    assert solvers.keys() == SOLVERS.keys()
    for config.solver.name, want in solvers.items():
        assert build_solver(config.solver.to_dict()) == want
    config.adjoint.update(terms=3, steps=4, damping=0.5, max_terms=7, remat=True)
    config.adjoint.solver.update(max_steps=5, rtol=1e-4)
    adjoints = {
        "unrolled": Unrolled(remat=True),
        "truncated": Truncated(steps=4, damping=0.5, remat=True),
        "neumann": Neumann(terms=3),
        "phantom": Phantom(steps=4, damping=0.5),
        "adaptive": Adaptive(max_terms=7, rtol=1e-2),
        "implicit": Implicit(solver=GMRES(max_steps=5, rtol=1e-4)),
    }
    assert adjoints.keys() == ADJOINTS.keys()
    for config.adjoint.name, want in adjoints.items():
        assert build_adjoint(config.adjoint.to_dict()) == want
    linear = {
        "bicgstab": BiCGSTAB(max_steps=5, rtol=1e-4),
        "dense": Dense(),
        "broyden": Broyden(max_steps=5, rtol=1e-4),
    }
    for config.adjoint.solver.name, want in linear.items():
        assert build_adjoint(config.adjoint.to_dict()) == Implicit(solver=want)


@pytest.mark.parametrize(
    ("variant", "solver", "adjoint"),
    [
        ("implicit", Picard(max_steps=7), Neumann(terms=1)),
        ("vanilla", Picard(max_steps=7), Unrolled()),
        ("ib", Picard(max_steps=7), Implicit(solver=Broyden(max_steps=7))),
        ("bb", Broyden(max_steps=7), Implicit(solver=Broyden(max_steps=7))),
        ("bn", Broyden(max_steps=7), Neumann(terms=1)),
    ],
)
def test_variants_are_the_papers(variant, solver, adjoint):
    config = base.set_variant(base.get_config("test", base.scenes()), variant).model
    assert build_solver(config.solver.to_dict()) == solver
    assert build_adjoint(config.adjoint.to_dict()) == adjoint
