"""Official SLATE against ours: weights there and back, numbers, steps, beginnings.

What official SLATE computes lies in tests/official, recorded by
tests/record_official.py: arrays, no code. With OFFICIAL_SLATE=DIR in the
environment, DIR a checkout of it, and PyTorch installed, its own random initialisation
is compared too.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import record_official as official
from flax import nnx
from reference import relative_error

from configs import base
from implicit_slots import interop
from implicit_slots.interop import convert
from implicit_slots.models import noise
from implicit_slots.models.build import build, split_model
from implicit_slots.models.official import from_official, to_official
from implicit_slots.models.slate import SLATE
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.prng import purpose_key
from implicit_slots.runtime.weights import read_weights
from implicit_slots.runtime.workdir import absolute
from implicit_slots.training import step
from implicit_slots.training.checkpoint import Checkpoints
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state

ROOT = pathlib.Path(__file__).parents[1]
RECORDS = pathlib.Path(__file__).parent / "official"

# Relative error between two float32 programs that sum in different orders.
AGREEMENT = 1e-4
# Statistics of two samples differ by less than this many standard errors.
STANDARD_ERRORS = 5
OUR_SEEDS = 10


def official_config(heads: int = 1, size=official.SIZE, **changes) -> Config:
    """The configuration of the recorded models."""
    config = base.get_config("official", base.scenes())
    config.data.resolution = size["image_size"]
    config.model.update(
        vocab_size=size["vocab_size"],
        width=size["d_model"],
        num_blocks=size["num_dec_blocks"],
        num_heads=size["num_heads"],
        dropout=size["dropout"],
        attention_dropout=size["dropout"],
        num_slots=size["num_slots"],
        slot_size=size["slot_size"],
        slot_mlp_size=size["mlp_hidden_size"],
        slot_heads=heads,
    )
    config.model.update(changes)
    config.model.solver.max_steps = size["num_iterations"]
    config.model.adjoint.name = "unrolled"
    config.optimizer.update(
        dvae_learning_rate=official.RATES["dvae"],
        learning_rate=official.RATES["main"],
        warmup_steps=official.WARMUP,
        clip="max_norm",
        clip_limit=official.CLIP,
    )
    config.temperature.update(start=official.TEMPERATURE, end=official.TEMPERATURE)
    return config


def abstract(config):
    """The structure of a configuration's model, and its parameters' shapes."""
    return split_model(nnx.eval_shape(lambda: build(config)))


def tree_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    return jax.tree.all(jax.tree.map(np.array_equal, got, want))


@pytest.fixture(scope="module")
def shapes():
    """Shapes of our parameters."""
    return abstract(official_config())[1]


@pytest.fixture(scope="module")
def weights(shapes):
    """An official state dictionary, masks included."""
    hollow = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    found = to_official(hollow)
    drawn = official.draw_weights(
        {n: w.shape for n, w in found.items() if w.dtype != bool}
    )
    return found | drawn


# The same images, the same noise.


def replace_noise(patch, recorded, keep=None):
    """Lets the model find recorded arrays where it would draw.

    Args:
      patch: undoes it.
      recorded: function of "relaxed" and "hard", the Gumbel noise of the tokens, and
        "slots", the normal noise of the initial slots.
      keep: function of a shape, the mask of the next dropout.
    """
    patch.setattr(noise, "gumbel", lambda key, shape: recorded("relaxed"))
    patch.setattr(
        noise,
        "categorical",
        lambda key, logits: (logits + recorded("hard")).argmax(-1),
    )
    patch.setattr(jax.random, "normal", lambda key, shape: recorded("slots"))
    if keep is not None:
        patch.setattr(noise, "keep_mask", lambda key, rate, shape: keep(shape))
        patch.setattr(
            noise,
            "kept_of_grid",
            lambda rows, columns, rate: keep((*rows.shape, *columns.shape)),
        )


@contextlib.contextmanager
def spied(owner, name):
    """Yields a list of what a method returns."""
    method, returned = getattr(owner, name), []

    def call(*arguments, **options):
        returned.append(method(*arguments, **options))
        return returned[-1]

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(owner, name, call)
        yield returned


def build_passes(heads):
    """Compiles both passes as functions of (parameters, record)."""
    graphdef, shapes = abstract(official_config(heads))

    def compute(params, record):
        model = nnx.merge(graphdef, params)
        key = jax.random.key(0)
        with (
            pytest.MonkeyPatch().context() as patch,
            spied(SlotAttention, "__call__") as attended,
        ):
            replace_noise(patch, lambda name: record[f"noise/{name}"])
            output = model(
                {"image": record["image"]},
                temperature=official.TEMPERATURE,
                key=key,
                deterministic=True,
            )
        with (
            pytest.MonkeyPatch().context() as patch,
            spied(SlotAttention, "__call__") as generated_from,
            spied(SLATE, "generate") as generated,
        ):
            replace_noise(patch, lambda name: record[f"generated/noise/{name}"])
            rendered = model.reconstruct(record["image"], key=key)
        return {
            "slots": attended[0].slots,
            "attention": attended[0].attention,
            "reconstruction": jnp.clip(output.reconstruction, 0, 1),
            "mse": output.losses["mse"].mean(),
            "cross_entropy": output.losses["cross_entropy"].mean(),
            "generated/slots": generated_from[0].slots,
            "generated/attention": generated_from[0].attention,
            "generated/image": rendered.slots,
            "generated/tokens": generated[0],
        }

    arrays = dict(np.load(RECORDS / f"slot_heads_{heads}.npz"))
    lowered = jax.jit(compute).lower(shapes, inputs(arrays))
    return shapes, lowered.compile()


def inputs(record):
    """What the passes read of a record."""
    return {
        name: x
        for name, x in record.items()
        if "training" not in name and ("noise" in name or name == "image")
    }


@pytest.fixture(scope="module", params=official.SLOT_HEADS)
def compared(request):
    """Slot heads, shapes, and the compiled passes."""
    return request.param, *build_passes(request.param)


def check_passes(shapes, passes, weights, record):
    got = passes(from_official(weights, shapes), inputs(record))
    tokens = got.pop("generated/tokens")
    assert np.array_equal(tokens, record["generated/tokens"])
    errors = {name: relative_error(got[name], record[name]) for name in got}
    print(errors)
    assert max(errors.values()) < AGREEMENT, errors


def test_passes_equal_the_official_ones(compared, weights):
    heads, shapes, passes = compared
    record = dict(np.load(RECORDS / f"slot_heads_{heads}.npz"))
    check_passes(shapes, passes, weights, record)


def own_initialisation(heads):
    """The official model as it initialises itself, and what it computes."""
    checkout = os.environ.get("OFFICIAL_SLATE")
    if not checkout:
        pytest.skip("needs OFFICIAL_SLATE=DIR, a checkout of the official code")
    pytest.importorskip("torch", reason="the official code runs on PyTorch")
    official.use(pathlib.Path(checkout))
    model = official.official_model(slot_heads=heads, seed=7)
    weights = {n: p.numpy().copy() for n, p in model.state_dict().items()}
    return weights, official.record(model)


def test_passes_equal_those_of_official_random_weights(compared):
    heads, shapes, passes = compared
    check_passes(shapes, passes, *own_initialisation(heads))


def train(weights, record):
    """Our training steps on the recorded batches, by name in the official layout.

    Returns:
      For each step: what is logged, the clipped gradient of the first step (elsewhere
      nothing), the change of every parameter since the beginning, the parameters.
    """
    config = official_config(official.SLOT_HEADS[-1])
    graphdef, shapes = abstract(config)
    params = jax.tree.map(jnp.asarray, from_official(weights, shapes))
    optimizer = build_optimizer(config.optimizer, params, num_steps=official.STEPS)
    arrays = {
        name: np.asarray(record[f"training/noise/{name}"])
        for name in ("relaxed", "hard", "slots")
    }
    masks, index = [], []

    def of_step(purpose_seed, purpose, number):
        index.append(number)
        masks[:] = unpacked(
            record["training/noise/keep"], record["training/noise/keep_shapes"][0]
        )
        return purpose_key(purpose_seed, purpose, number)

    def keep(shape):
        # The official masks, in the order of use; a group of queries takes its rows,
        # as far as it sees.
        rows, columns = shape[-2:]
        mask = masks[0][..., :rows, :columns]
        masks[0] = masks[0][..., rows:, :]
        if not masks[0].size:
            masks.pop(0)
        return jnp.asarray(mask.reshape(-1, *shape))[index[-1]]

    def of_this_step(name):
        return jnp.asarray(arrays[name])[index[-1]]

    found = []
    state = initial_state(params, optimizer, config.optimizer)
    before = to_official(jax.tree.map(np.asarray, params))
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(step, "purpose_key", of_step)
        replace_noise(patch, of_this_step, keep)
        train_step = step.build_steps(graphdef, optimizer, config).train
        for image in record["training/image"]:
            state, metrics = train_step(state, {"image": image})
            after = to_official(jax.tree.map(np.asarray, state.params))
            found.append(
                {
                    "logged": metrics.compute(),
                    "momentum": momentum(state.opt_state, params),
                    "change": {
                        name: np.float64(after[name]) - np.float64(before[name])
                        for name in after
                        if after[name].dtype != bool
                    },
                    "weights": after,
                }
            )
    assert len(index) == 1 and not masks, "each recorded mask is used once"
    return found


def unpacked(bits, shapes):
    """Masks [steps, *shape] of bits [steps, bytes] that hold one after another."""
    masks = []
    for shape in shapes:
        length = -(-int(np.prod(shape)) // 8)
        one, bits = bits[:, :length], bits[:, length:]
        one = np.unpackbits(one, axis=1, count=int(np.prod(shape)))
        masks.append(one.astype(bool).reshape(-1, *shape))
    assert not bits.size
    return masks


def momentum(opt_state, params):
    """Adam's first moment of both groups, in the official layout."""
    moments = [
        leaf.mu
        for leaf in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(leaf, "mu")
    ]
    tree = {
        key: next(mu[key] for mu in moments if jax.tree.leaves(mu[key]))
        for key in params
    }
    return {
        name: value
        for name, value in to_official(jax.tree.map(np.asarray, tree)).items()
        if value.dtype != bool
    }


def check_training(weights, record):
    """Compares norms and sampled entries of every tensor after every step."""
    worst = {}
    for number, ours in enumerate(train(weights, record)):
        for name in ("mse", "cross_entropy", "grad_norm_inf"):
            want = record[f"training/{name.replace('grad_norm_inf', 'norm')}"][number]
            worst[name] = abs(ours["logged"][name] / want - 1)
        pairs = [(ours["change"], "changes")]
        if number == 0:
            gradient = {n: m / (1 - 0.9) for n, m in ours["momentum"].items()}
            pairs.append((gradient, "gradients"))
        for got, what in pairs:
            got_all = official.summaries(got)
            want_all = record[f"training/{what}"][number]
            assert got_all.shape == want_all.shape
            start = 0
            for name in sorted(got):
                entries = official.sampled(name, got[name].size)
                part = slice(start, start + 1 + len(entries))
                start = part.stop
                error = np.linalg.norm(got_all[part] - want_all[part])
                size = np.linalg.norm(want_all[part])
                # A parameter is rounded to float32 after each step.
                if what == "changes":
                    flat = ours["weights"][name].reshape(-1)[entries]
                    error -= np.finfo(np.float32).eps * np.linalg.norm(flat)
                key = f"{what} {number} {name}"
                worst[key] = error / size if size else error
    failed = {k: float(v) for k, v in worst.items() if not v < AGREEMENT}
    print(sorted(((float(v), k) for k, v in worst.items()), reverse=True)[:12])
    assert not failed, failed


@pytest.mark.slow
def test_training_steps_equal_the_official_ones(weights):
    record = dict(np.load(RECORDS / f"slot_heads_{official.SLOT_HEADS[-1]}.npz"))
    assert (record["training/norm"] > 2 * official.CLIP).all(), "clipping is active"
    check_training(weights, record)


def test_training_steps_equal_those_of_official_random_weights():
    check_training(*own_initialisation(official.SLOT_HEADS[-1]))


def test_adam_is_pytorchs_on_tiny_gradients():
    config = official_config().optimizer
    config.clip = "none"
    params = {"dvae": jnp.zeros(len(official.ADAM_PROBE))}
    optimizer = build_optimizer(config, params, num_steps=3)
    state = optimizer.init(params)
    want = np.load(RECORDS / "adam.npz")["parameters"]
    for number in range(3):
        gradient = {"dvae": jnp.asarray(official.ADAM_PROBE) * (number + 1)}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        assert relative_error(jax.tree.leaves(params)[0], want[number]) < AGREEMENT


# Initial parameters.


@pytest.fixture(scope="module")
def initial():
    """Our initial parameters over as many seeds, in the official layout."""
    config, rngs = official_config(size=official.INITIAL_SIZE), nnx.Rngs

    def draw(key):
        with pytest.MonkeyPatch().context() as patch:
            # A configuration's seed is a Python integer: it would be compiled in.
            patch.setattr(nnx, "Rngs", lambda params: rngs(params=key))
            return split_model(build(config))[1]

    # The generator that compiles fastest.
    keys = [jax.random.key(seed, impl="rbg") for seed in range(OUR_SEEDS)]
    compiled = jax.jit(draw).lower(keys[0]).compile()
    seeds = [to_official(jax.tree.map(np.asarray, compiled(key))) for key in keys]
    return {
        name: np.stack([seed[name] for seed in seeds])
        for name in seeds[0]
        if seeds[0][name].dtype != bool
    }


def test_initial_parameters_have_the_official_statistics(initial):
    record = np.load(RECORDS / "initial.npz")
    assert sorted(initial) == list(record["names"])
    for name, want in zip(record["names"], record["moments"], strict=True):
        count, mean, std, low, high, kurtosis = want
        got = official.moments(initial[name])
        assert got[0] / OUR_SEEDS == count / official.SEEDS, name
        if std == 0:  # a constant
            assert np.array_equal(got[1:], want[1:]), name
            continue
        assert low < 0 < high
        error = STANDARD_ERRORS * np.sqrt(1 / count + 1 / got[0])
        assert abs(got[1] - mean) < error * std, name
        # The variance of a standard deviation is σ² (κ − 1) / 4n.
        assert abs(got[2] - std) < error * std * np.sqrt((kurtosis - 1) / 4), name
        assert abs(got[5] - kurtosis) < error * np.sqrt(24), name
        if kurtosis < 2.7:  # bounded: the extremes of n numbers are the bounds, nearly
            margin = (high - low) * min(0.2, 50 / got[0])
            assert abs(got[3] - low) < margin and abs(got[4] - high) < margin, name


def test_the_recurrent_matrix_starts_orthogonal(initial):
    for matrix in initial["slot_attn.slot_attention.gru.weight_hh"]:
        assert np.allclose(matrix.T @ matrix, np.eye(matrix.shape[1]), atol=1e-5)


# There and back.


def test_weights_survive_the_round_trip(weights, shapes):
    ours = from_official(weights, shapes)
    assert jax.tree.structure(ours) == jax.tree.structure(shapes)
    back = to_official(ours)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)
    again = from_official(back, ours)
    assert tree_equal(again, ours)
    mask = back["tf_dec.blocks.1.self_attn_mask"]
    assert mask.dtype == bool and np.array_equal(mask, np.triu(np.ones((16, 16)), 1))


def test_every_parameter_is_converted_once(weights, shapes):
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sum(w.size for w in weights.values() if w.dtype != bool) == count
    record = np.load(RECORDS / "initial.npz")
    assert sorted(n for n in weights if weights[n].dtype != bool) == list(
        record["names"]
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 12}, r"set config\.model\.vocab_size=11 \(it is 12\)"),
        ({"width": 32}, r"config\.model\.width=16"),
        ({"num_blocks": 3}, r"config\.model\.num_blocks=2"),
        ({"slot_size": 24}, r"config\.model\.slot_size=12"),
        ({"slot_mlp_size": 24}, r"config\.model\.slot_mlp_size=20"),
        ({"dvae_features": 32}, r"config\.model\.dvae_features=64"),
        ({"initial_slots": "learned"}, "initial_slots must be"),
    ],
)
def test_another_model_is_refused_naming_the_key(weights, changes, sentence):
    shapes = abstract(official_config(**changes))[1]
    with pytest.raises(UserError, match=sentence):
        from_official(weights, shapes)


def test_another_resolution_is_refused_naming_the_key(weights):
    config = official_config()
    config.data.resolution = 32
    with pytest.raises(UserError, match=r"config\.data\.resolution=16 \(it is 32\)"):
        from_official(weights, abstract(config)[1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"out.weight": None}, "lack out.weight"),
        ({"a.weight": np.zeros(1)}, "no place in the model for a.weight"),
        ({"slot_proj.weight": np.zeros((16, 9))}, r"proj.weight \(16, 9\) instead of"),
        ({"out.weight": np.zeros((11, 16), int)}, "not floating-point"),
        ({"positional_encoder.pe": np.zeros((1, 16, 16))}, r"\(1, 16, 16\) instead"),
    ],
)
def test_other_tensors_are_refused_by_name(weights, shapes, changes, sentence):
    changed = {n: w for n, w in (weights | changes).items() if w is not None}
    with pytest.raises(UserError, match=sentence):
        from_official(changed, shapes)


def test_what_is_lacking_and_what_is_there_instead_are_both_named(weights, shapes):
    others = {f"some.{n.replace('.', '_')}": w for n, w in weights.items()}
    with pytest.raises(
        UserError, match=r"lack dvae\S+, .* more; they have no .* some\."
    ):
        from_official(others, shapes)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.module."])
def test_a_wrapped_model_is_recognised(weights, shapes, prefix):
    wrapped = {prefix + name: w for name, w in weights.items()}
    assert tree_equal(from_official(wrapped, shapes), from_official(weights, shapes))
    del wrapped[f"{prefix}out.weight"]
    with pytest.raises(UserError, match=r"the weights lack out\.weight$"):
        from_official(wrapped, shapes)


def test_masks_may_be_missing_and_other_precisions_are_converted(weights, shapes):
    doubles = {n: w.astype("f8") for n, w in weights.items() if w.dtype != bool}
    got = from_official(doubles, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}


# The command.


def test_weights_become_a_run_and_a_run_weights(tmp_path, weights):
    np.savez(tmp_path / "model.npz", **weights)
    config = official_config()
    workdir = tmp_path / "run"
    convert(tmp_path / "model.npz", workdir, config)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        absolute(config).to_json()
    )
    # What a training that goes on reads first.
    checkpoints = Checkpoints(workdir / "checkpoints", keep=None)
    params = from_official(weights, abstract(config)[1])
    optimizer = build_optimizer(config.optimizer, params, num_steps=config.num_steps)
    state, _ = checkpoints.read(0, initial_state(params, optimizer, config.optimizer))
    checkpoints.close()
    assert int(state.step) == 0 and tree_equal(state.params, params)
    assert tree_equal(state.opt_state, optimizer.init(params))

    convert(workdir, tmp_path / "again.npz")
    again = read_weights(tmp_path / "again.npz")
    assert again.keys() == weights.keys()
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("source", "target", "changes", "sentence"),
    [
        ("model.npz", "model.npz", None, "exists; choose another --target"),
        ("model.npz", "run", None, "say with which --config"),
        ("model.npz", "a.npz", {}, "--config does not go with"),
        ("nothing.pt", "a.npz", None, "nothing.pt cannot be read: No such file"),
        (".", "a.npz", None, "holds no run"),
        ("model.npz", "run", {"vocab_size": 12}, "config.model.vocab_size=11"),
        ("model.npz", "run", {"vocab_size": 0}, "vocab_size must be at least 1"),
        ("model.npz", "run", {"slot_heads": 5}, "slot heads"),
    ],
)
def test_a_conversion_that_cannot_be_is_one_sentence(
    tmp_path, weights, source, target, changes, sentence
):
    np.savez(tmp_path / "model.npz", **weights)
    before = (tmp_path / "model.npz").read_bytes()
    config = None if changes is None else official_config(**changes)
    with pytest.raises(UserError, match=sentence) as caught:
        convert(tmp_path / source, tmp_path / target, config)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]
    assert (tmp_path / "model.npz").read_bytes() == before


def test_a_workdir_that_cannot_be_finished_is_removed(tmp_path, weights, monkeypatch):
    np.savez(tmp_path / "model.npz", **weights)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("implicit_slots.interop.write_json", fail)
    with pytest.raises(UserError, match="no space left"):
        convert(tmp_path / "model.npz", tmp_path / "run", official_config())
    assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--source=tests/official/sample.pt", "--target={}/a.npz"], 0, ""),
        (["--source=~/nothing.pt", "--target={}/a.npz"], 1, "{}/nothing.pt"),
        (["--source=nothing.pt"], 2, "--target"),
        (["--source=a.pt", "--target={}/a", "--config=no.py"], 1, "no.py"),
    ],
)
def test_the_command_line(tmp_path, arguments, code, sentence):
    if not code:
        pytest.importorskip("torch", reason="PyTorch reads its files")
    filled = [argument.format(tmp_path) for argument in arguments]
    result = subprocess.run(
        [sys.executable, "-m", interop.__name__, *filled],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code, result.stderr
    if code:
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
        assert sentence.format(tmp_path) in result.stderr
        assert not list(tmp_path.iterdir())
    else:
        assert "transposed" in read_weights(tmp_path / "a.npz")
