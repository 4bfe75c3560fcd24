"""How programs are compiled: what is an input, what XLA knows, what comes ahead."""

import functools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import FLOAT32, relative_error

from configs import (
    autoencoder_scenes,
    dinosaur_coco,
    folder,
    scenes,
    set_prediction_scenes,
)
from implicit_slots.data.scenes.source import Scenes
from implicit_slots.evaluation.steps import build_evaluation_steps
from implicit_slots.models.build import build, split_model
from implicit_slots.runtime import compiling
from implicit_slots.runtime.config import flat
from implicit_slots.runtime.workdir import (
    ABSENT,
    OF_COCO,
    OF_DECODERS,
    OF_FEATURES,
    OF_FOLDERS,
    OF_SLATE,
    read_config,
)
from implicit_slots.training import run
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.penalties import KEYS
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps


def smoke(**changes):
    config = scenes.get_config("tokens-smoke")
    config.data.cache = ""
    config.update_from_flattened_dict(changes)
    return config


def test_a_runs_arithmetic_is_jaxs_usual_one_in_every_thread():
    """Whatever the environment has set, which comes back."""
    strange = {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict"}
    before = {name: jax.config.values[name] for name in strange}

    def mixed():
        return jnp.ones(1, int) + 1.5

    try:
        for name, value in strange.items():
            jax.config.update(name, value)
        with compiling.standard_arithmetic(), ThreadPoolExecutor(1) as thread:
            assert mixed().dtype == jnp.float32
            assert thread.submit(mixed).result().dtype == jnp.float32
        assert jnp.ones(1).dtype == jnp.float64
        with pytest.raises(Exception, match="no available implicit dtype promotion"):
            _ = jnp.ones(1, jnp.int32) + jnp.ones(1)
    finally:
        for name, value in before.items():
            jax.config.update(name, getattr(value, "value", value))


def test_a_call_waits_for_the_thread_that_compiles_and_counts_as_compiling():
    traced, told = [], []

    def slowly(given, x):
        traced.append(x)
        time.sleep(0.1)
        return given * x

    function, x = compiling.bind(slowly, np.float32(3)), np.float32(2)
    with ThreadPoolExecutor(1) as thread, compiling.told_of_compiling(told.append):
        compiled = thread.submit(function.compile, x)
        while not traced:
            time.sleep(0.001)
        assert function(x) == 6
        compiled.result()
    assert len(traced) == 1
    assert told[0] > 0.05


@pytest.mark.parametrize("environment", ["", "/dev/null/cache"])
def test_without_a_home_folder_no_program_is_kept(environment, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if environment:
        monkeypatch.setenv("XDG_CACHE_HOME", environment)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compiling.enable_cache()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def programs(**changes):
    """The text of what a run compiles for training and for an evaluation."""
    config = smoke(**changes)
    graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    optimizer = build_optimizer(config.optimizer, shapes, num_steps=config.num_steps)
    state: Any = jax.eval_shape(
        functools.partial(initial_state, optimizer=optimizer, config=config.optimizer),
        shapes,
    )
    image = jax.ShapeDtypeStruct((2, 16, 16, 3), np.uint8)
    train = build_steps(graphdef, optimizer, config).train
    encode: Any = build_evaluation_steps(graphdef, config).encode
    traced = train.trace(state, {"image": image}), encode.trace(shapes, image, 0)
    return [found.lower().as_text() for found in traced]


@pytest.mark.slow
def test_another_seed_or_length_is_no_other_program():
    before, after = programs(), programs(seed=7, num_steps=30)
    assert before == after and before[0] != before[1]


def test_a_seed_that_is_an_input_gives_the_numbers_of_a_constant():
    def draw(given, shape):
        return jax.random.normal(jax.random.key(given), (shape,))

    bound = compiling.bind(draw, np.asarray(7), static_argnums=1)
    assert np.array_equal(bound(3), jax.random.normal(jax.random.key(7), (3,)))


def test_xla_is_asked_what_it_knows():
    assert compiling.knows(**compiling.UNOPTIMISED)
    assert not compiling.knows(xla_no_such_option=True)
    options = compiling.runs_once()
    assert (
        compiling.knows(**options) and compiling.UNOPTIMISED.items() <= options.items()
    )


def test_optimisations_are_left_out_meanwhile():
    before = compiling.without_optimisations()
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        with compiling.optimised(False):
            assert compiling.without_optimisations()
            with compiling.optimised(True):  # Whoever left them out has the say.
                assert compiling.without_optimisations()
        assert not compiling.without_optimisations()
        with compiling.optimised(True):
            assert not compiling.without_optimisations()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def test_the_first_state_is_that_of_the_model():
    config = smoke(seed=3)
    params = split_model(build(config))[1]
    optimizer = build_optimizer(config.optimizer, params, num_steps=1)
    got = run.first_state(config, optimizer)
    want = initial_state(params, optimizer, config.optimizer)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < FLOAT32


@pytest.mark.slow
def test_a_run_compiles_each_of_its_programs_once(tmp_path):
    """What was compiled ahead is found, with shapes and shardings of the calls."""
    compiled = []

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        del duration_secs
        if "backend_compile" in event:
            compiled.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run.run(smoke(num_steps=2, validate_every=1), tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    for name in ("train", "validate", "reconstruct"):
        assert sum(name in one for one in compiled) == 1, (name, compiled)


@pytest.mark.parametrize("with_masks", [False, True])
def test_scenes_know_what_an_example_is_like(with_masks):
    for split in ("train", "validation"):
        source = Scenes(
            split=split,
            resolution=16,
            train_size=3,
            validation_size=2,
            test_size=2,
            max_objects=4,
            with_masks=with_masks,
        )
        got, want = source.example(), source[0]
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype


def test_where_training_ends_may_be_told_with_an_update():
    config = smoke().optimizer
    config.update(schedule="cosine", warmup_steps=2)
    params = {"dvae": jnp.ones(3), "a": jnp.ones(2)}
    gradient = {"dvae": jnp.arange(1.0, 4.0), "a": jnp.array([-1.0, 2.0])}
    short, long = (build_optimizer(config, params, num_steps=n) for n in (6, 9))

    def third(optimizer, **told) -> Any:
        updates, state = None, optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(gradient, state, params, **told)
        return updates

    told = jax.jit(lambda n: third(short, num_steps=n))(9)
    for ours, theirs in zip(*map(jax.tree.leaves, (told, third(long))), strict=True):
        assert relative_error(ours, theirs) < FLOAT32
    assert relative_error(third(short)["a"], third(long)["a"]) > 0.1


def test_what_absent_keys_mean_is_said_of_keys_that_exist():
    of_some = {*OF_FEATURES, *OF_FOLDERS, *OF_COCO}
    assert {*KEYS, *OF_SLATE, *OF_DECODERS, *of_some} <= ABSENT.keys()
    for module in (scenes, autoencoder_scenes, set_prediction_scenes):
        config = flat(module.get_config().to_dict())
        of_others = OF_SLATE + OF_DECODERS if config["model.name"] != "slate" else ()
        assert ABSENT.keys() - config.keys() <= {*of_others, *of_some}
    features = flat(dinosaur_coco.get_config().to_dict())
    assert {*OF_FEATURES, *OF_DECODERS, *OF_COCO} <= features.keys()
    assert all(features[key] == ABSENT[key] for key in OF_FEATURES + OF_DECODERS)
    folders = flat(folder.get_config().to_dict())
    assert all(folders[key] == ABSENT[key] for key in OF_FOLDERS)


NAMES = [key.removeprefix("data.") for key in OF_FOLDERS]


@pytest.mark.parametrize(("module", "count"), [(folder, len(NAMES)), (scenes, 0)])
def test_keys_of_folders_are_added_to_their_runs_alone(tmp_path, module, count):
    before = module.get_config().to_dict()
    of_old = {key: value for key, value in before["data"].items() if key not in NAMES}
    old = json.dumps(before | {"data": of_old})
    (tmp_path / "config.json").write_text(old)
    again = read_config(tmp_path / "config.json")
    assert json.loads(again.to_json()) == json.loads(json.dumps(before))
    assert len(again.data) - len(of_old) == count
