"""Configurations are found from everywhere, the user's own first."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

from implicit_slots.runtime import config_files
from implicit_slots.runtime.config_files import find_config, provide_configs

ROOT = pathlib.Path(__file__).parents[2]


def test_the_users_own_is_found_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_config("configs/clevr.py") == str(ROOT / "configs" / "clevr.py")
    assert find_config("configs/mine.py") == "configs/mine.py"  # Nowhere.
    assert find_config("clevr.py") == "clevr.py" and find_config("") == ""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "clevr.py").touch()
    assert find_config("configs/clevr.py") == "configs/clevr.py"
    assert find_config("~/configs/clevr.py") == f"{tmp_path}/configs/clevr.py"


def test_in_a_wheel_they_lie_within_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site-packages" / "implicit_slots"
    (package / "configs").mkdir(parents=True)
    for name in ("base.py", "clevr.py"):
        (package / "configs" / name).touch()
    # Another package's folder of that name is none of ours.
    (package.parent / "configs").mkdir()
    (package.parent / "configs" / "clevr.py").touch()
    monkeypatch.setattr(config_files, "_PACKAGE", package)
    assert find_config("configs/clevr.py") == str(package / "configs" / "clevr.py")


@pytest.mark.parametrize("own", [None, "namespace", "package"])
def test_configurations_import_each_other_from_everywhere(own, tmp_path, monkeypatch):
    """Also where the user's folder has the same name."""
    for name in [n for n in sys.modules if n.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    shown = [str(tmp_path), *(p for p in sys.path if pathlib.Path(p or ".") != ROOT)]
    monkeypatch.setattr(sys, "path", [p for p in shown if p])
    monkeypatch.chdir(tmp_path)
    if own:
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "mine.py").write_text("from configs import smoke")
    if own == "package":
        (tmp_path / "configs" / "__init__.py").touch()
    provide_configs()
    names: dict = {}
    exec("from configs import smoke", names)
    assert pathlib.Path(names["smoke"].__file__) == ROOT / "configs" / "smoke.py"
    if own:
        exec("from configs import mine", names)
        assert pathlib.Path(names["mine"].__file__) == tmp_path / "configs" / "mine.py"


@pytest.mark.slow
def test_a_wheel_holds_configurations_a_model_and_a_command(tmp_path):
    """Its own commands, in another folder, find them."""
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    installed, work = tmp_path / "installed", tmp_path / "work"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name.split("-")[0] for name in top} == {"implicit_slots"}
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "implicit-slots = implicit_slots.__main__:main" in points.read_text()
    work.mkdir()

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "implicit_slots", *arguments],
            cwd=work,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=False,
        )

    wrong = command("--config=configs/clevr.py", "--config.sed=1")
    assert wrong.stderr == (
        "error: the configuration has no key sed; did you mean seed?\n"
    )
    Image.new("RGB", (90, 60), "gray").save(work / "mine.png")
    done = command("--mode=predict", "--workdir=scenes", "--images=.", "--out=out")
    assert done.returncode == 0, done.stderr
    names = {"index.html", "mine.masks.png", "mine.npz", "mine.overlay.png"}
    assert {file.name for file in (work / "out").iterdir()} == names
    with Image.open(work / "out" / "mine.masks.png") as masks:
        assert masks.size == (90, 60)
