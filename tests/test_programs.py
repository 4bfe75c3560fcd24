"""The programs that train, optimised as `main` compiles them, against float64 ones.

All other tests leave out XLA's optimisations; see conftest.py. What an optimisation
breaks, as in github.com/jax-ml/jax/issues/39103, only these see. Models are compared
with themselves in float64, compiled without optimisations; the renderer with itself
without them; the score with scikit-learn.
"""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import FLOAT32
from sklearn.metrics import adjusted_rand_score

from configs import (
    autoencoder_scenes,
    base,
    dinosaur_scenes,
    scenes,
    set_prediction_scenes,
)
from implicit_slots.data.scenes import rendering
from implicit_slots.evaluation.metrics.segmentation import score_masks
from implicit_slots.models import noise
from implicit_slots.models.build import build, split_model
from implicit_slots.models.set_prediction import CLASSES
from implicit_slots.models.token_decoder import with_bos
from implicit_slots.runtime import compiling, devices
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps

HERE = pathlib.Path(__file__).parent
MODELS = {
    "slate": scenes,
    "autoencoder": autoencoder_scenes,
    "set_prediction": set_prediction_scenes,
    "feature_slots": dinosaur_scenes,
    "autoregressive": dinosaur_scenes,
}
GRADIENTS = ("one_term", "gmres", "unrolled")
# Relative, of float32 against float64 through a whole step, there and back.
TOLERANCE = FLOAT32
# A pre-activation this near to zero, relative to the others of its layer, may be on
# the other side of the ReLU's kink in float32, which changes the gradient rightly.
NEAR = 2e-6
# Of pixels that may lie on the other side of an edge: three of 27,648.
SHARE = 1.2e-4
# The step that is compared: amid warm-up, decay and annealing, and so late that what
# Adam corrects for having begun at zero, 1 − 0.999^AT, is exact in float32.
AT, STEPS = 10_000, 25_000


def optimised() -> dict[str, Any]:
    """The compiler's options as they are where nothing is set."""
    options: dict[str, Any] = {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    }
    emitters = {"xla_cpu_use_fusion_emitters": True}
    return options | emitters if compiling.knows(**emitters) else options


@pytest.fixture(autouse=True, scope="module")
def as_main():
    """JAX as it is without the environment of the tests."""
    before = compiling.without_optimisations()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def compiled(function, *arguments):
    """What a jitted function returns, compiled with the optimisations."""
    return function.lower(*arguments).compile(optimised())(*arguments)


def test_the_options_reach_the_compiler():
    """The code is as long as with no options, and not as long as without optimisation.

    The executable also holds the options, which are some hundred bytes.
    """
    x = np.ones((64, 64), np.float32)
    # No cache has a program with this: an executable from there has lost its code.
    number = time.time_ns() % 2**24

    def loss(weights, x):
        hidden = x @ weights
        return number * jnp.tanh(hidden).sum() + jnp.exp(-(hidden**2)).mean()

    def size(options):
        function = jax.jit(jax.grad(loss))
        executable: Any = function.lower(x, x).compile(options).runtime_executable()
        return len(executable.serialize())

    given = optimised()
    unset = size({name: on for name, on in given.items() if "emitters" in name} or None)
    assert abs(size(given) - unset) < 200
    assert abs(size(given) - size(compiling.runs_once())) > 500


class Case(NamedTuple):
    """One model and one gradient."""

    model: str
    gradient: str

    @property
    def batch(self) -> int:
        """Few images; where that costs little, so many that an array exceeds 1 MiB.

        From there on XLA divides some loops otherwise.
        """
        if self.gradient == "dense":
            return 64
        return 16 if self.model == "autoencoder" else 4

    @property
    def gain(self) -> float:
        """See `draw_params`: where a system is solved, it is to be well conditioned."""
        return 0.5 if self.gradient == "dense" else 1.0

    def config(self):
        """The smoke variant with this gradient, two iterations and large rates."""
        tokens = "tokens-" if self.model == "slate" else ""  # As published.
        config = MODELS[self.model].get_config(f"{tokens}smoke")
        config.update(batch_size=self.batch, num_steps=STEPS, optimize_programs=True)
        config.model.solver.max_steps = 2
        if self.model == "autoencoder":
            config.model.decoder_features = 32
        if self.model == "autoregressive":
            config.model.update(decoder=self.model, decoder_order="permuted")
        if self.gradient in ("gmres", "dense"):
            config.model.adjoint.name = "implicit"
            config.model.adjoint.solver = base.solver(self.gradient, max_steps=3)
        elif self.gradient == "unrolled":
            config.model.adjoint.name = "unrolled"
        # So large that the parameters' own rounding is little beside their change.
        config.optimizer.update(learning_rate=10.0, warmup_steps=STEPS)
        if self.model == "slate":
            config.optimizer.dvae_learning_rate = 10.0
            config.temperature.steps = STEPS
        return config


@functools.cache
def structure(case: Case):
    """The model's structure and the shapes of its parameters."""
    return split_model(nnx.eval_shape(lambda: build(case.config())))


def named(tree) -> dict[str, np.ndarray]:
    """The leaves by their paths."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def draw_params(shapes, rng, gain=1.0):
    """Scales about one, kernels that change sizes by about a factor of `gain`."""

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        if jax.tree_util.keystr(path).endswith("['scale']"):
            return np.float32(1 + 0.2 * drawn)
        if len(leaf.shape) < 2:
            return np.float32(0.2 * drawn)
        return np.float32(gain * drawn / np.sqrt(np.prod(leaf.shape[:-1])))

    return jax.tree.map_with_path(draw, shapes)


def draw_batch(config, rng) -> dict[str, Any]:
    side = config.data.resolution
    image = rng.uniform(size=(config.batch_size, side, side, 3)).astype(np.float32)
    if config.model.name != "set_prediction":
        return {"image": image}
    shape = config.batch_size, config.data.max_objects
    objects = {
        "present": rng.uniform(size=shape) < 0.7,
        "position": rng.uniform(-3, 3, size=(*shape, 3)).astype(np.float32),
        **{
            name: rng.integers(size, size=shape, dtype=np.int32)
            for name, size in CLASSES.items()
        },
    }
    return {"image": image, "objects": objects}


def is_adam(node) -> bool:
    """Whether a node of an optimiser's state is Adam's, with both moments."""
    return isinstance(node, optax.ScaleByAdamState)


def prepared(case: Case, seed: int, squares=None) -> Any:
    """The model's structure, its optimiser, a state in midst of training, a batch.

    Args:
      case: whose.
      seed: of parameters and images.
      squares: Adam's second moments by the parameters' paths; ones if not given.
    """
    config = case.config()
    graphdef, shapes = structure(case)
    rng = np.random.default_rng(seed)
    params, batch = draw_params(shapes, rng, case.gain), draw_batch(config, rng)
    optimizer = build_optimizer(config.optimizer, params, num_steps=STEPS)
    state = initial_state(params, optimizer, config.optimizer)

    def square(path, leaf):
        name = jax.tree_util.keystr(path)
        number = 1.0 if squares is None else squares[name]
        return np.float32(number * rng.uniform(0.5, 1.5, leaf.shape))

    def midst(node):
        if is_adam(node):
            nu = jax.tree.map_with_path(square, node.nu)
            return node._replace(count=jnp.int32(AT), nu=nu)
        return jnp.int32(AT)  # The schedule's count.

    opt_state = jax.tree.map(midst, state.opt_state, is_leaf=is_adam)
    state = state._replace(step=jnp.int32(AT), opt_state=opt_state)
    return config, graphdef, optimizer, state, batch


def outcome(before, after, logged) -> dict[str, np.ndarray]:
    """What a step does: to the parameters their change, and all else as it is.

    Adam's first moment, which was zero, is a tenth of the clipped gradient.
    """
    change = jax.tree.map(
        lambda one, other: np.float64(other) - np.float64(one),
        before.params,
        after.params,
    )
    return named(after._replace(params=change)) | named(
        jax.device_get(logged).compute()
    )


@contextlib.contextmanager
def double(near=NEAR):
    """Float64, with the noise of float32, and NaN where a ReLU's kink is near."""

    def drawn_by(draw):
        def drawn(key, shape, dtype=None):
            del dtype
            return draw(key, shape, jnp.float32).astype(jnp.float64)

        return drawn

    def gumbel(key, shape):
        words = noise.random_bits(key, shape) >> 9
        return -jnp.log(-jnp.log((words.astype(jnp.float64) + 0.5) * 2.0**-23))

    def relu(x):
        at_kink = jnp.abs(x) < near * jnp.sqrt(jnp.mean(x**2))
        return jnp.where(at_kink, jnp.nan, jnp.maximum(x, 0))

    with jax.enable_x64(True), pytest.MonkeyPatch().context() as patch:
        patch.setattr(noise, "gumbel", gumbel)
        patch.setattr(jax.random, "normal", drawn_by(jax.random.normal))
        patch.setattr(jax.random, "uniform", drawn_by(jax.random.uniform))
        patch.setattr(nnx, "relu", relu)
        yield


def widened(tree):
    """The same numbers in float64."""

    def widen(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf

    return jax.tree.map(widen, tree)


@functools.cache
def expected(case: Case):
    """A seed of parameters and images, Adam's second moments, and the step from there.

    It is the first seed with no pre-activation near a kink. The second moments are as
    if the gradients before had been as large as this one: then each parameter's change
    is as precise as its gradient.
    """
    config, graphdef, optimizer, state, batch = prepared(case, 0)
    with double():
        train = build_steps(graphdef, optimizer, config).train
        traced = train.trace(widened(state), widened(batch))
        step = traced.lower().compile(compiling.runs_once())

    def run(seed, squares=None):
        *_, state, batch = prepared(case, seed, squares)
        with double():
            after, logged = step(train.given, widened(state), widened(batch))
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(after.params))
        found = None if after.faults.skipped else outcome(state, after, logged)
        return state, after, found

    for seed in range(20):
        state, after, found = run(seed)
        if found is not None:
            break
    else:
        pytest.fail("all seeds have a pre-activation near a kink")
    gradients = {}
    for node in jax.tree.leaves(after.opt_state, is_leaf=is_adam):
        if is_adam(node):
            gradients |= {name: 10 * leaf for name, leaf in named(node.mu).items()}
    # Some gradients are exactly zero: those of initial slots, of implicit adjoints.
    squares = {
        name: float(np.mean(gradients[beside(name)] ** 2)) or 1.0
        for name in named(state.params)
        if beside(name) in gradients  # A frozen part has none.
    }
    return seed, squares, run(seed, squares)[2]


def beside(name: str) -> str:
    """The array beside whose size an array's error is measured: mostly itself.

    The slots' softmax does not see a bias of what makes the queries: the gradient of
    that norm's bias is nothing but rounding, beside that of its scale.
    """
    bias = "['norm_slots']['bias']"
    return name.replace("bias", "scale") if name.endswith(bias) else name


def check(got, want):
    """Compares integers exactly, all else by the size of the error of each array."""
    assert got.keys() == want.keys()
    errors = {}
    for name, wanted in want.items():
        if wanted.dtype.kind in "iub":
            assert np.array_equal(got[name], wanted), name
        else:
            size = max(np.linalg.norm(want[beside(name)]), 1e-30)
            # Residuals are relative already, and rounding where a solve is exact.
            size = 1.0 if "residual" in name else size
            error = np.linalg.norm(np.float64(got[name]) - wanted)
            errors[name] = float(error / size)
    worst = sorted(errors, key=lambda name: -errors[name])[:5]
    # NumPy's maximum, which is not finite if anything is not.
    largest = np.max(list(errors.values()))
    assert largest < TOLERANCE, {name: errors[name] for name in worst}


def cases():
    """Each model with each gradient, and what jaxlib 0.10.2 computes wrongly."""
    for model in MODELS:
        for gradient in GRADIENTS:
            yield pytest.param(Case(model, gradient), id=f"{model}-{gradient}")
    yield pytest.param(Case("set_prediction", "dense"), id="set_prediction-dense")


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases()))
def test_a_whole_step_does_what_it_does_in_float64(case):
    seed, squares, want = expected(case)
    config, graphdef, optimizer, state, batch = prepared(case, seed, squares)
    train = build_steps(graphdef, optimizer, config).train
    step = train.trace(state, batch).lower().compile(optimised())
    after, logged = step(train.given, jax.tree.map(jnp.copy, state), batch)
    check(outcome(state, after, logged), want)


LAYOUTS = ("replicated", "fsdp")


def train_on_two_devices(folder: str) -> None:
    """What a process of its own does: one step in each layout, written to files."""
    assert not compiling.without_optimisations() and jax.device_count() == 2
    devices.SMALLEST_SPLIT = 64
    case = Case("slate", "one_term")
    seed, squares = json.loads((pathlib.Path(folder) / "point.json").read_text())
    config, graphdef, optimizer, state, batch = prepared(case, seed, squares)
    mesh = devices.build_mesh(case.batch)
    for layout in LAYOUTS:
        config.sharding = layout
        train = build_steps(graphdef, optimizer, config, mesh).train
        placed = jax.tree.map(jnp.copy, state)  # It is given up.
        placed = jax.device_put(placed, devices.state_sharding(state, mesh, layout))
        shared = devices.shard_batch(batch, mesh)
        after, logged = train.compile(placed, shared)(train.given, placed, shared)
        split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(after)]
        found: Any = outcome(state, after, logged) | {"split": np.sum(split)}
        np.savez(pathlib.Path(folder) / layout, **found)


@pytest.mark.slow
def test_a_step_on_two_devices_does_what_it_does_in_float64(tmp_path):
    """In a process without what makes the tests quick: as `main` runs it."""
    seed, squares, want = expected(Case("slate", "one_term"))
    (tmp_path / "point.json").write_text(json.dumps([seed, squares]))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parent)))
    call = (
        f"import test_programs; test_programs.train_on_two_devices({str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", call], env=environment, check=True)
    for layout, least, most in zip(LAYOUTS, (0, 50), (0, np.inf), strict=True):
        found = dict(np.load(tmp_path / f"{layout}.npz"))
        assert least <= found.pop("split") <= most
        check(found, want)


def test_the_most_probable_tokens_are_those_of_float64():
    graphdef, shapes = structure(Case("slate", "one_term"))
    rng = np.random.default_rng(0)
    params = draw_params(shapes, rng)
    slots = np.float32(2 * rng.normal(size=(8, 3, 16)))

    def generate(params, slots):
        return nnx.merge(graphdef, params).generate(slots)

    def decode(params, slots, tokens):
        """Logits of each token, from those before it at once."""
        model = nnx.merge(graphdef, params)
        embedded = model.embed(with_bos(tokens.reshape(len(tokens), -1)))
        return model.decode(embedded[:, :-1], slots)

    tokens = compiled(jax.jit(generate), params, slots)
    with double(near=0):
        wide = widened(params), widened(slots)
        lowered = jax.jit(generate).lower(*wide)
        want = lowered.compile(compiling.runs_once())(*wide)
        lowered = jax.jit(decode).lower(*wide, want)
        logits = lowered.compile(compiling.runs_once())(*wide, want)
    logits = np.sort(logits, axis=-1)
    assert np.min(logits[..., -1] - logits[..., -2]) > 1e-4
    assert len(np.unique(want)) > 8
    assert np.array_equal(tokens, want)


@pytest.mark.slow
def test_scenes_are_drawn_as_without_optimisations():
    """But for pixels at whose centre an edge lies within rounding."""

    def draw(indices):
        return rendering.render_batch(
            0, "train", indices, resolution=48, min_objects=3, max_objects=6
        )

    indices = np.arange(12)
    got = jax.device_get(compiled(jax.jit(draw), indices))
    lowered = jax.jit(draw).lower(indices)
    want = jax.device_get(lowered.compile(compiling.runs_once())(indices))
    for name, wanted in want["objects"].items():
        np.testing.assert_allclose(got["objects"][name], wanted, rtol=1e-5, atol=1e-5)
    for name in ("segmentation", "shadow"):
        other = np.mean(got[name] != want[name])
        assert other <= SHARE, name
        assert len(np.unique(want[name])) > 4
    apart = np.abs(np.int32(got["image"]) - np.int32(want["image"]))
    assert np.mean(apart > 0) <= 10 * SHARE and np.mean(apart > 1) <= SHARE


def test_foreground_ari_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, (8, 128, 128), dtype=np.int32)
    noisy = rng.integers(0, 6, true.shape)
    predicted = np.where(rng.uniform(size=true.shape) < 0.5, true, noisy)
    attention = np.float32(np.eye(6)[predicted].transpose(0, 3, 1, 2))

    def score(true, attention):
        return score_masks(attention, true, max_true=5)["fg_ari"].mean()

    want = [
        adjusted_rand_score(t[t > 0], p[t > 0])
        for t, p in zip(true, predicted, strict=True)
    ]
    got = compiled(jax.jit(score), true, attention)
    assert abs(float(got) - np.mean(want)) < 1e-6
    assert 0.1 < np.mean(want) < 0.9
