"""The table of sources, and the embedded scenes as one of them."""

import collections
import importlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from implicit_slots.data import registry
from implicit_slots.data.scenes import rendering
from implicit_slots.data.scenes import source as scenes_source
from implicit_slots.data.source import DataError

SCENES = {
    "name": "scenes",
    "resolution": 16,
    "train_size": 20,
    "validation_size": 6,
    "test_size": 4,
}


# Options that mean nothing to a data set, because its reader serves others as well.
HIDDEN = collections.defaultdict(
    set,
    {
        "clevr": {"frame_step", "masks"},
        "shapes3d": {"frame_step", "masks"},
        "scenes": {"shift"},
        "movi_a": {"masks"},
        "tfds": {"frame_step", "masks"},
        "movi_c": {"masks"},
        "movi_e": {"masks"},
        "clevr_with_masks": {"test_set"},
        "multi_dsprites_colored_on_grayscale": {"test_set"},
        "tetrominoes": {"test_set"},
    },
)


def build(split="train", **options):
    return registry.build(ml_collections.ConfigDict({**SCENES, **options}), split)


@pytest.fixture
def rendered(monkeypatch):
    """Replaces the renderer by one that is instant; lists what it was asked for."""
    asked = []

    def render_batch(
        seed, split, indices, *, resolution, min_objects, max_objects, zoom
    ):
        # Shapes are asked for by tracing, which is no rendering.
        indices = np.asarray(indices)
        asked.append((split, seed, indices.tolist()))
        batch = len(indices)
        code = indices + 50 * registry.SPLITS.index(split) + seed
        image = np.broadcast_to(
            code[:, None, None, None], (batch, resolution, resolution, 3)
        )
        return jax.tree.map(
            jax.numpy.asarray,
            {
                "image": image.astype(np.uint8),
                "segmentation": np.ones((batch, resolution, resolution), np.int32),
                "shadow": image[..., 0].astype(np.int32),
                "objects": {"present": np.ones((batch, max_objects), bool)},
            },
        )

    monkeypatch.setattr(rendering, "render_batch", render_batch)
    monkeypatch.setattr(scenes_source, "SCENES_BLOCK", 8)
    return asked


def test_scenes_are_the_renderers():
    """Examples are what the renderer draws for their index, masks and all.

    However a program of the user's has set JAX.
    """
    indices = np.array([5, 0, 5])
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        source = build("validation", seed=3, max_objects=4, zoom=1.5)
        assert len(source) == 6
        batch = source.batch(indices)
    drawn = rendering.render_batch(
        seed=3,
        split="validation",
        indices=np.arange(6, dtype=np.int32),
        resolution=16,
        min_objects=3,
        max_objects=4,
        zoom=1.5,
    )
    expected = jax.tree.map(lambda leaf: np.asarray(leaf)[indices], drawn)
    jax.tree.map(np.testing.assert_array_equal, batch, expected)
    assert jax.tree.map(lambda leaf: leaf.dtype, batch) == jax.tree.map(
        lambda leaf: leaf.dtype, expected
    )
    assert batch["segmentation"].dtype == np.int32 and batch["segmentation"].max() > 0
    assert batch["image"].std() > 10


def test_scenes_are_rendered_block_by_block_on_first_use(rendered):
    """Nothing at construction, one block at a time, none twice."""
    source = build()
    rendered.clear()
    assert not source.shuffle_first_epoch  # Which would render all blocks at once.
    assert source.batch(np.array([3, 9, 3]))["image"][:, 0, 0, 0].tolist() == [3, 9, 3]
    assert [first for _, _, (first, *_) in rendered] == [0, 8]
    source.batch(np.arange(20))
    assert [first for _, _, (first, *_) in rendered] == [0, 8, 16]


def test_splits_and_data_seeds_are_different_scenes(rendered):
    """Each split asks the renderer for its own scenes, of the configured seed."""
    for split, size in (("train", 20), ("validation", 6), ("test", 4)):
        source = build(split, seed=7)
        rendered.clear()
        assert len(source) == size
        source.batch(np.arange(size))
        assert {(s, seed) for s, seed, _ in rendered} == {(split, 7)}


def test_training_scenes_carry_masks_only_where_asked(rendered):
    everything = {"image", "segmentation", "shadow", "objects"}
    assert build().batch(np.arange(2)).keys() == {"image"}
    assert build(with_masks=True).batch(np.arange(2)).keys() == everything
    for split in ("validation", "test"):
        assert build(split).batch(np.arange(2)).keys() == everything


def test_scenes_are_rendered_by_one_thread_while_others_wait(rendered):
    source = build(train_size=80)
    rendered.clear()
    start = threading.Barrier(4)

    def read(_):
        start.wait()
        return source.batch(np.arange(80))["image"][:, 0, 0, 0].tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [list(range(80))] * 4
    assert sorted(first for _, _, (first, *_) in rendered) == list(range(0, 80, 8))


def test_configurations_that_name_a_cache_of_scenes_are_still_read(rendered, tmp_path):
    """Runs used to keep scenes there; nothing is written any more."""
    source = build(cache=str(tmp_path))
    assert source.batch(np.arange(20))["image"][:, 0, 0, 0].tolist() == [*range(20)]
    assert not list(tmp_path.iterdir())


def test_options_of_other_splits_do_not_touch_a_splits_cache():
    section = {
        "name": "objects_room",
        "path": "nowhere",
        "resolution": 8,
        "max_objects": 6,
        "cache": "cache",
        "splits": {"train": "0:9", "validation": "9:12", "test": ""},
        "test_set": "empty_room",
    }
    changed = {
        **section,
        "splits": {"train": "0:9", "validation": "8:12", "test": ""},
        "test_set": "six_objects",
    }
    same = {
        split: len(
            {
                registry.request(ml_collections.ConfigDict(s), split).folder
                for s in (section, changed)
            }
        )
        for split in registry.SPLITS
    }
    assert same == {"train": 1, "validation": 2, "test": 2}


def test_a_frozen_section_builds_any_source(tmp_path):
    """The section's `name` picks from the table, the rest are its arguments."""
    Image.fromarray(np.full((8, 8, 3), 5, np.uint8)).save(tmp_path / "a.png")
    config = ml_collections.FrozenConfigDict(
        {
            "name": "folder",
            "path": str(tmp_path),
            "resolution": 4,
            "validation_fraction": 0.0,
            "test_fraction": 0.0,
        }
    )
    assert (registry.build(config, "train")[0]["image"] == 5).all()


@pytest.mark.parametrize(
    ("change", "split", "sentence"),
    [
        ({"name": "scences"}, "train", "unknown data set 'scences'; choose .* scenes"),
        ({"resolutoin": 8}, "train", "'scenes' has no option resolutoin; it has resol"),
        ({}, "dev", "unknown split 'dev'; choose from train, validation, test"),
        ({"test_size": 0}, "test", r"test_size must be at least 1, got 0"),
        ({"max_objects": 2}, "train", "need 1 <= min_objects <= max_objects, got 3 an"),
        ({"zoom": 0.5}, "train", r"zoom must be in \[1, 100\], got 0\.5"),
        ({"resolution": 0}, "train", r"resolution must be at least 1, got 0"),
    ],
)
def test_a_section_that_cannot_be_used_is_one_sentence(change, split, sentence):
    with pytest.raises(DataError, match=sentence) as error:
        build(split, **change)
    assert "\n" not in str(error.value)


def test_missing_arguments_are_named():
    config = ml_collections.ConfigDict({"name": "folder", "resolution": 8})
    with pytest.raises(DataError, match="data set 'folder' needs path"):
        registry.build(config, "train")


def test_every_data_set_has_a_configuration_and_a_line_in_the_docs():
    """The three name the same rows, and every key of a section is its reader's."""
    root = Path(__file__).parents[2]
    docs = (root / "implicit_slots" / "data" / "README.md").read_text()
    named = set()
    for file in sorted((root / "configs").glob("*.py")):
        if file.stem in ("__init__", "base", "image_input", "smoke"):
            continue
        config = importlib.import_module(f"configs.{file.stem}").get_config()
        named.add(config.data.name)
        # Other models' configurations take their data from one that is named.
        if config.model.name == "slate":
            assert f"`{file.name}`" in docs, file
        for split in registry.SPLITS:
            asked = registry.request(config.data, split)
            assert asked.folder is not None
            assert asked.folder.name.startswith(f"{config.data.name}-{split}-")
        asked = registry.request(config.data, "test")
        # What can be set can be seen: no option of the reader is left to a default.
        options = {*asked.arguments, *asked.usage} - {"split", *asked.data_set.fixed}
        hidden = options - set(config.data)
        assert hidden <= HIDDEN[config.data.name], (file, hidden)
    others = set(registry.SOURCES) - named
    for name in others:
        assert name in docs, name
    assert others <= {
        "coco_tfds",
        "multi_dsprites_binarized",
        "multi_dsprites_colored_on_colored",
    }


def test_importing_sources_imports_no_tensorflow():
    """Neither TensorFlow nor its data sets: they are slow, and may be missing."""
    program = (
        "import sys; from implicit_slots.data import batches, registry; "
        "print([m for m in sys.modules if m.startswith('tensorflow')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
