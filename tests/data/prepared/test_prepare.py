"""Preparing a data set: once, interrupted or not, and never from other files."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import base
from implicit_slots.data import registry
from implicit_slots.data.prepared import prepare
from implicit_slots.data.prepared.cache import Prepared
from implicit_slots.data.prepared.cache_folder import is_finished
from implicit_slots.data.sets.folder import ImageFolder
from implicit_slots.data.source import DataError

ROOT = Path(__file__).parents[3]
COUNT = 150  # three blocks, the last one cut off


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 16x16 images with masks of zero to four objects."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir(parents=True)
    for number in range(COUNT):
        name = f"train/{number:03d}.png"
        image = generator.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(image).save(root / "images" / name)
        mask = np.zeros((16, 16), np.uint8)
        for k in range(number % 5):
            mask[3 * k : 3 * k + 2, 2:9] = k + 1
        Image.fromarray(mask).save(root / "masks" / name)
    return root


@pytest.fixture
def section(pictures, tmp_path):
    section = base.folder()
    section.update(
        path=str(pictures),
        resolution=8,
        max_objects=4,
        validation_fraction=0.0,
        test_fraction=0.0,
        cache=str(tmp_path / "cache"),
    )
    return section


def prepared(section, **options):
    lines = []
    source = prepare.prepare(section, "train", say=lines.append, **options)
    return source, lines


def check_equal(one, other):
    for indices in (np.arange(COUNT), np.array([COUNT - 1, 0, 70])):
        a, b = one.batch(indices), other.batch(indices)
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
            assert a[key].dtype == b[key].dtype


def test_the_cache_holds_what_decoding_gives(section):
    """And the run finds it by itself; without one it decodes."""
    on_the_fly = registry.build(section, "train")
    assert isinstance(on_the_fly, ImageFolder)
    prepared(section)
    found = registry.build(section, "train")
    assert isinstance(found, Prepared)
    check_equal(found, on_the_fly)
    images = registry.build(section, "train", ("image",))
    assert images.batch(np.arange(2)).keys() == {"image"}


def test_the_manifest_says_what_it_is(section, pictures):
    source, _ = prepared(section)
    assert isinstance(source, Prepared)
    arguments = registry.request(section, "train").arguments
    manifest = source.manifest
    assert manifest["name"] == "folder" and manifest["split"] == "train"
    assert manifest["path"] == str(pictures)
    assert (manifest["count"], manifest["resolution"]) == (COUNT, 8)
    assert manifest["crop"] == "center" and len(manifest["hash"]) == 64
    assert manifest["files"] == ImageFolder(**arguments).fingerprint()


def test_a_second_run_decodes_nothing(section, monkeypatch):
    prepared(section)

    def fail(*_):
        raise AssertionError("looked into again")

    for method in ("read", "check", "count_objects"):
        monkeypatch.setattr(ImageFolder, method, fail)
    _, lines = prepared(section)
    assert "already prepared" in lines[0]


def test_an_interrupted_preparation_goes_on(section, monkeypatch):
    """Blocks that are there are not decoded again; until the end it is not used."""
    read = ImageFolder.read
    seen = []

    def interrupted(self, index):
        seen.append(index)
        if index >= 128:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(ImageFolder, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(section, workers=1)
    assert max(seen) >= 128
    assert isinstance(registry.build(section, "train"), ImageFolder)
    seen.clear()

    def recorded(self, index):
        seen.append(index)
        return read(self, index)

    monkeypatch.setattr(ImageFolder, "read", recorded)
    source, _ = prepared(section, workers=1)
    assert seen == [*range(128, COUNT)]
    monkeypatch.undo()
    section.cache = ""
    check_equal(source, registry.build(section, "train"))


def test_a_killed_preparation_leaves_nothing_to_trust(section, tmp_path):
    """SIGKILL in the middle of a block, in a process of its own."""
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}]
from ml_collections import ConfigDict
from implicit_slots.data.prepared import prepare
from implicit_slots.data.sets.folder import ImageFolder
from implicit_slots.data.prepared.cache_folder import is_finished
read = ImageFolder.read
def killed(self, index):
    if index == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, index)
ImageFolder.read = killed
prepare.prepare(ConfigDict({section.to_dict()!r}), "train", workers=1)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    (folder,) = (tmp_path / "cache").glob("folder-*")
    assert not is_finished(folder)
    source, _ = prepared(section)
    section.cache = ""
    check_equal(source, registry.build(section, "train"))


def test_a_full_disk_is_a_sentence_and_what_was_written_stays(section):
    """The system refuses to let a file grow, as a full disk does."""
    asked = registry.request(section, "train")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    image_bytes = 128 + COUNT * 8 * 8 * 3
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (image_bytes - 500, limits[1]))
        with pytest.raises(DataError, match=r"cannot be written: .*; make room"):
            prepared(section, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert asked.folder is not None and not is_finished(asked.folder)
    source, _ = prepared(section)
    section.cache = ""
    check_equal(source, registry.build(section, "train"))


def test_too_little_room_is_said_before_anything_is_written(section, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(DataError, match=r"MB free and the examples need"):
        prepared(section)
    assert not [f for f in Path(section.cache).iterdir() if f.suffix != ".lock"]


def test_other_options_are_another_cache(section):
    prepared(section)
    for key, value in (("resolution", 4), ("crop", "none"), ("keep_objects", 3)):
        changed = section.copy_and_resolve_references()
        changed[key] = value
        assert not isinstance(registry.build(changed, "train"), Prepared)
    for key, value in (("flip", True), ("workers", 9), ("placement", "device")):
        changed = section.copy_and_resolve_references()
        changed[key] = value
        assert isinstance(registry.build(changed, "train"), Prepared)


def test_files_that_changed_since_are_refused_by_preparing(section, pictures, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    section.path = str(copy)
    prepared(section)
    (copy / "images" / "train" / "new.png").write_bytes(
        (copy / "images" / "train" / "000.png").read_bytes()
    )
    (copy / "masks" / "train" / "new.png").write_bytes(
        (copy / "masks" / "train" / "000.png").read_bytes()
    )
    with pytest.raises(
        DataError, match=r"the cache .* was made from other files than are in"
    ):
        prepared(section)


def test_a_cache_of_other_files_is_refused(section, pictures, tmp_path):
    """By content: copies are welcome, and so is a machine without any files."""
    for place in ("here", "there", "nowhere"):
        shutil.copytree(pictures, tmp_path / place / "pictures")
    section.path = str(tmp_path / "here" / "pictures")
    prepared(section)
    section.path = str(tmp_path / "there" / "pictures")
    assert isinstance(registry.build(section, "train"), Prepared)
    (tmp_path / "there" / "pictures" / "images" / "train" / "007.png").unlink()
    with pytest.raises(DataError, match="was made from other files than are in"):
        registry.build(section, "train")
    (tmp_path / "there" / "pictures" / "masks" / "train" / "008.png").unlink()
    with pytest.raises(DataError, match=r"cannot be compared with .* have no mask of"):
        registry.build(section, "train")
    shutil.rmtree(tmp_path / "nowhere" / "pictures")
    section.path = str(tmp_path / "nowhere" / "pictures")
    assert isinstance(registry.build(section, "train"), Prepared)


def test_a_renamed_cache_is_refused(section):
    """What is not what was asked for does not pass under its name."""
    prepared(section)
    asked = registry.request(section, "train").folder
    section.crop = "none"
    other = registry.request(section, "train").folder
    assert asked is not None and other is not None
    asked.rename(other)
    with pytest.raises(DataError, match=r"\(its crop is 'center', not 'none'\)"):
        registry.build(section, "train")


def test_two_preparations_at_once_do_not_disturb_each_other(section):
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from ml_collections import ConfigDict
from implicit_slots.data.prepared import prepare
prepare.prepare(ConfigDict({section.to_dict()!r}), "train", workers=1)
"""
    both = [
        subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    source = registry.build(section, "train")
    section.cache = ""
    check_equal(source, registry.build(section, "train"))


def test_a_damaged_cache_is_refused_by_the_run(section):
    prepared(section)
    folder = registry.request(section, "train").folder
    assert folder is not None
    image = folder / "image.npy"
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(DataError, match="does not match its manifest"):
        registry.build(section, "train")


def test_only_images_of_few_objects_are_kept(section):
    """In order, prepared or not: images 0, 1, 2 of every five."""
    section.keep_objects = 2
    expected = [i for i in range(COUNT) if i % 5 <= 2]
    on_the_fly = registry.build(section, "train")
    source, _ = prepared(section)
    section.keep_objects = 0
    section.cache = ""
    everything = registry.build(section, "train")
    assert len(on_the_fly) == len(source) == len(expected)
    for few in (on_the_fly, source):
        np.testing.assert_array_equal(
            few.batch(np.arange(len(expected)))["image"],
            everything.batch(np.array(expected))["image"],
        )
    section.keep_objects = -1
    with pytest.raises(DataError, match="keep_objects must not be negative"):
        registry.build(section, "train")


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "implicit_slots.data", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
def test_the_commands_prepare_inspect_and_verify(section, pictures, tmp_path):
    """In a terminal, from one configuration file, with what they print."""
    flags = (
        "--config=configs/folder.py",
        f"--config.data.path={pictures}",
        f"--config.data.cache={tmp_path / 'cache'}",
        "--config.data.resolution=8",
        "--splits=train,validation",
    )
    first = command("prepare", *flags)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("train: 134 examples, 0.0 MB in ")
    assert "validation: 8 examples" in first.stdout
    assert first.stderr == ""
    looked = command("inspect", *flags, f"--output={tmp_path / 'sheets'}")
    assert looked.returncode == 0, looked.stderr
    assert "folder, train (prepared): 134 examples" in looked.stdout
    assert "image                    uint8    8 x 8 x 3" in looked.stdout
    assert "number of objects: 0 in " in looked.stdout
    with Image.open(tmp_path / "sheets" / "folder_train.png") as sheet:
        assert sheet.width > 800
    whole = command("verify", *flags)
    assert whole.stdout.count("every block as it was written") == 2
    (folder,) = (tmp_path / "cache").glob("folder-validation-*")
    content = bytearray((folder / "image.npy").read_bytes())
    content[-1] ^= 1
    (folder / "image.npy").write_bytes(content)
    broken = command("verify", *flags)
    assert broken.returncode == 1
    assert broken.stderr.startswith("error: the cache ")
    assert json.loads((folder / "manifest.json").read_text())["count"] == 8


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "error: name one command: prepare, inspect, verify; got none"),
        (("prepair",), 2, "got prepair"),
        (("prepare", "--splits=trian"), 1, "error: unknown split 'trian'"),
        (("prepare", "--config.data.cache="), 1, "error: there is no cache to prepare"),
        (("verify",), 1, "error: split 'train' is not prepared"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(arguments, code, sentence, pictures):
    config = ("--config=configs/folder.py", f"--config.data.path={pictures}")
    result = command(*config, *arguments)
    assert result.returncode == code
    assert sentence in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
