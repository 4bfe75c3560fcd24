"""Features encoded once: what lies on disk, what training reads, what is refused."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import base, dinosaur_scenes, scenes
from configs.smoke import set_smoke
from implicit_slots import load
from implicit_slots.data import registry
from implicit_slots.data.batches import TrainBatches
from implicit_slots.data.source import DataError
from implicit_slots.evaluation import shifts
from implicit_slots.models.build import build, split_model
from implicit_slots.models.images import as_float, seen
from implicit_slots.runtime.errors import UserError
from implicit_slots.training import evaluate, frozen, prepare, run
from implicit_slots.training.checks import check_same_run
from implicit_slots.training.parts import build_parts, open_data
from implicit_slots.training.plan import train_batch

# Of a number that is rounded to bfloat16: half a unit of its last place, relative.
ROUNDED = 2.0**-8
COUNTS = {"train": 10, "validation": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and masks."""
    path = tmp_path_factory.mktemp("features")
    generator = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for kind, most, shape in (("images", 256, (16, 16, 3)), ("masks", 3, (16, 16))):
            (path / "data" / kind / split).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, most, shape).astype(np.uint8)
                file = path / "data" / kind / split / f"{number}.png"
                Image.fromarray(pixels).save(file)
    return path


@pytest.fixture
def config(folder):
    """A small model of cached features of those images."""
    return section(folder)


def section(folder):
    data = base.folder()
    data.update(path=str(folder / "data"), cache=str(folder / "cache"), max_objects=3)
    config = base.feature_slots("test", data)
    set_smoke(config)
    config.model.update(cached_features=True, vit_norm=True)
    config.data.flip = True
    return config


@pytest.fixture(scope="module")
def made(folder):
    """The transformer's structure and parameters."""
    config = section(folder)
    return frozen.made(config, registry.build(config.data, "train"))


@pytest.fixture(scope="module")
def said(folder, made):
    """What is said of the preparation, and the bytes on disk when it is said."""
    lines = []

    def say(line):
        lines.append((line, sum(f.stat().st_size for f in folder.glob("cache/*/*"))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BLOCK", 4)
        patch.setattr(frozen, "made", lambda *args: made)
        prepare.run(section(folder), ["train", "validation"], say=say)
    return lines


@pytest.fixture(scope="module")
def transformer(made):
    """The same transformer, compiled: images to features."""
    structure, params = made
    run = jax.jit(lambda params, image: nnx.merge(structure, params)(as_float(image)))
    return lambda image: run(jax.tree.map(jnp.asarray, params), image)


def test_sizes_are_said_before_anything_is_written(said):
    # 16 patches of 64 features of two bytes: 2,048 bytes an image.
    (one, mirrored, other), written = said[:3], said[3:]
    assert one[0].startswith("train: features of 10 images, 0.0 MB, to ")
    assert mirrored[0].startswith("train: mirrored features of 10 images")
    assert other[0].startswith("validation: features of 8 images")
    assert [size for _, size in (one, mirrored, other)] == [0, 0, 0]
    assert [line for line, _ in written] == [
        "train: features: written",
        "train: mirrored features: written",
        "validation: features: written",
    ]
    assert written[-1][1] > 28 * 2_048


def test_a_batch_has_the_features_of_its_images_mirrored_or_not(config, transformer):
    plain = frozen.uncached(config)
    train, held_out = open_data(config, "train")
    images, _ = open_data(plain, "train")
    assert train is not None and images is not None
    flips = []
    for step in range(3):  # Past the end of the first epoch.
        batches = TrainBatches(train, 4, seed=5, flip=True)
        batch = batches[step]
        flips += batches.flips(step).tolist()
        image = TrainBatches(images, 4, seed=5, flip=True)[step]["image"]
        assert batch.keys() == {"features"} and batch["features"].dtype == jnp.bfloat16
        features = transformer(image)
        found = batch["features"].astype(np.float32)
        np.testing.assert_allclose(found, features, rtol=ROUNDED, atol=1e-5)
    assert 0 < sum(flips) < len(flips)
    batch = held_out["validation"].batch(np.arange(4))
    assert batch.keys() == {"image", "segmentation", "features"} | batch.keys()
    found = batch["features"].astype(np.float32)
    features = transformer(batch["image"])
    np.testing.assert_allclose(found, features, rtol=ROUNDED, atol=1e-5)


def test_a_second_time_nothing_is_written_and_an_interrupted_one_goes_on(
    config, said, tmp_path, monkeypatch
):
    lines, calls, stops_after = [], [], 4

    def encode(images):
        calls.append(len(images))
        if len(calls) > stops_after:
            raise KeyboardInterrupt
        return np.repeat(images.reshape(len(images), 16, 48)[..., :1], 64, axis=2)

    monkeypatch.setattr(prepare, "BLOCK", 4)
    monkeypatch.setattr(prepare, "_encoder", lambda *args, **kwargs: encode)
    monkeypatch.setattr(frozen, "made", lambda *args: (None, {"norm": np.ones(1)}))
    prepare.run(config, ["train", "validation"], say=lines.append)
    assert [" are in " in line for line in lines] == [True] * 3 and not calls
    config.data.cache = str(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare.run(config, ["train"], say=lines.append)
    stops_after = 100
    prepare.run(config, ["train"], say=lines.append)
    assert lines[-3].endswith(", 8 of them are there")
    assert calls == [4] * 4 + [2] * 3
    images = registry.build(config.data, "train").batch(np.arange(10))["image"]
    for name, seen_as in (("", images), ("-mirrored", images[:, :, ::-1])):
        (file,) = tmp_path.glob(f"folder-random{name}-train-*/features.npy")
        wanted = seen_as.reshape(10, 16, 48)[..., 0]
        assert np.array_equal(np.load(file)[..., 7], wanted)


def test_what_is_missing_or_stale_is_a_sentence(
    config, said, folder, tmp_path, monkeypatch
):
    config.data.placement = "device"
    with pytest.raises(DataError, match=r"set --config\.data\.placement=host"):
        open_data(config, "train")
    config.data.placement = "host"
    for key, value in (("seed", 1), ("model.vit_norm", False), ("data.max_objects", 2)):
        other = section(folder)
        other.update_from_flattened_dict({key: value})
        with pytest.raises(DataError, match=r"'train' are not in .*--mode=prepare"):
            open_data(other, "train")
    config.data.cache = ""
    with pytest.raises(DataError, match=r"--config\.data\.cache=FOLDER"):
        open_data(config, "train")
    # Other files at another place.
    config = section(folder)
    shutil.copytree(folder / "data", tmp_path / "data")
    config.data.path = str(tmp_path / "data")
    open_data(config, "train")
    shutil.copy(
        tmp_path / "data/images/train/0.png", tmp_path / "data/images/train/x.png"
    )
    shutil.copy(
        tmp_path / "data/masks/train/0.png", tmp_path / "data/masks/train/x.png"
    )
    with pytest.raises(DataError, match="made from other files"):
        open_data(config, "train")
    config.data.cache = str(tmp_path / "cache")
    monkeypatch.setattr(frozen, "made", lambda *args: (None, {}))
    monkeypatch.setattr(
        prepare.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000)
    )
    with pytest.raises(DataError, match=r"has 0\.0 MB free and the features need"):
        prepare.run(config, ["validation"], say=len)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_other_weights_are_refused(config, said, tmp_path, monkeypatch):
    """Compared by the file's bytes, where there is a file."""
    told = frozen.description(config)
    monkeypatch.setattr(frozen, "description", lambda config: told)
    file = tmp_path / "weights.npz"
    file.write_bytes(b"one")
    config.features.weights = str(file)
    with pytest.raises(
        DataError, match=r"other weights than config\.features\.weights"
    ):
        open_data(config, "train")
    file.unlink()
    assert open_data(config, "train")[0] is not None


def test_the_model_has_no_transformer(config):
    model = nnx.eval_shape(lambda: build(config))
    assert "vit" not in split_model(model)[1]
    with pytest.raises(ValueError, match=r"no vision transformer .* \(1, 16, 16, 3\)"):
        model.features(jnp.zeros((1, 16, 16, 3)))
    shapes = train_batch(config, jax.make_mesh((1,), ("data",)))
    assert shapes["features"].shape == (8, 16, 64) and "image" not in shapes


def test_what_has_no_features_or_needs_images_is_a_sentence(config, tmp_path):
    with pytest.raises(UserError, match=r"slate reads images and no features; .*data"):
        prepare.run(scenes.get_config("smoke"), say=len)
    with pytest.raises(UserError, match="--splits must be some of train, validation"):
        prepare.run(config, ["trian"], say=len)
    rendered = dinosaur_scenes.get_config("smoke")
    assert shifts.chosen("noise", rendered, "evaluate")[1:] == ["noise"]
    rendered.model.cached_features = True
    with pytest.raises(UserError, match=r"add --config\.model\.cached_features=False"):
        shifts.chosen("noise", rendered, "evaluate")
    # An evaluation may put the transformer back, and nothing else changes it.
    plain = frozen.uncached(config)
    (tmp_path / "config.json").write_text(config.to_json())
    check_same_run(plain, tmp_path, training=False)
    with pytest.raises(UserError, match=r"another run: its model\.cached_features"):
        check_same_run(plain, tmp_path)
    (tmp_path / "config.json").write_text(plain.to_json())
    with pytest.raises(UserError, match=r"another run: its model\.cached_features"):
        check_same_run(config, tmp_path, training=False)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["mlp", "autoregressive"])
def test_losses_slots_and_masks_are_those_of_the_transformer_in_the_step(
    config, said, made, decoder
):
    """Up to the rounding of the features to bfloat16."""
    config.model.decoder = decoder
    plain = frozen.uncached(config)
    images, _ = open_data(plain, "train")
    train, _ = open_data(config, "train")
    assert train is not None and images is not None
    params, alone = (
        jax.jit(lambda of=of: split_model(build(of))[1])() for of in (plain, config)
    )
    # The same seed draws the same parameters.
    same = jax.tree.map(np.array_equal, alone, {k: params[k] for k in alone})
    assert all(jax.tree.leaves(same)) and {*params} - {*alone} == {"vit"}
    params["vit"] = jax.tree.map(jnp.asarray, made[1])
    found = {}
    for name, of, source in (("cached", config, train), ("plain", plain, images)):
        graphdef, shapes = split_model(nnx.eval_shape(lambda of=of: build(of)))
        batch = TrainBatches(source, 4, seed=1, flip=True)[0]

        @jax.jit
        def look(params, given, graphdef=graphdef):
            model, key = nnx.merge(graphdef, params), jax.random.key(0)
            output = model({"image": as_float(given)}, key=key)
            slots = model.encode(as_float(given), key=key).slots
            return output.losses["feature_mse"], slots, output.masks

        own = {part: params[part] for part in shapes}
        found[name] = look(own, jnp.asarray(seen(batch)))
    for cached, plain in zip(found["cached"], found["plain"], strict=True):
        np.testing.assert_allclose(cached, plain, rtol=0.02, atol=0.02)
        assert not np.array_equal(cached, plain)


@pytest.mark.slow
def test_a_run_from_the_cache_has_its_transformer_back(config, said, made, tmp_path):
    """To be evaluated on images, and where it is loaded."""
    run.run(config, tmp_path / "run")
    plain = build_parts(frozen.uncached(config), "plan")
    state, params = evaluate.restored(plain, tmp_path / "run", "latest")
    assert state.step == 20 and "vit" not in state.params
    same = jax.tree.map(np.array_equal, params["vit"], made[1])
    assert all(jax.tree.leaves(same))
    changed = jax.tree.map(np.array_equal, params["encoder"], state.params["encoder"])
    assert all(jax.tree.leaves(changed))
    of_cached, model = load(tmp_path / "run")
    assert not of_cached.model.cached_features
    image = registry.build(config.data, "validation").batch(np.arange(2))["image"]
    config.evaluation.split = "validation"
    features = open_data(config, "evaluate")[1]["validation"].batch(np.arange(2))
    np.testing.assert_allclose(
        model.features(as_float(jnp.asarray(image))),
        features["features"].astype(np.float32),
        rtol=ROUNDED,
        atol=1e-5,
    )
    (tmp_path / "run" / frozen.TRANSFORMER_FILE).unlink()
    with pytest.raises(UserError, match=r"has no transformer\.safetensors"):
        load(tmp_path / "run")
