"""Figures for papers: what they say, and that they are the same each time."""

import numpy as np
import pytest
from PIL import Image

from implicit_slots.drawing import figures

CURVE = {
    "title": "Residual by iteration",
    "x_label": "iteration",
    "y_label": "size",
    "x": [3, 2, 1],
    "log": True,
    "series": {"median": [1, 0.1, None], "low": [1, 0.05, None], "high": [2, 1, None]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("figures") / "deeper"
        image = np.full((1, 8, 12, 3), 0.5)
        shares = np.zeros((1, 2, 8, 12))
        shares[0, 0, :, :6], shares[0, 1, :, 6:] = 1, 1
        figures.save_figure(figures.attention_figure(image, shares), folder / "maps.x")
        figures.save_figure(figures.curve_figure([CURVE, CURVE]), folder / "curves")
        tiles = figures.tile_figure(np.stack([image, 1 - image]), ["5 slots"])
        figures.save_figure(tiles, folder / "tiles")
        folders.append(folder)
    return folders


@pytest.mark.parametrize("name", ["maps", "curves", "tiles"])
def test_the_same_arrays_give_the_same_bytes_in_every_format(saved, name):
    for kind in figures.METADATA:
        first, second = ((folder / f"{name}.{kind}").read_bytes() for folder in saved)
        assert first == second and len(first) > 1000


def test_text_stays_text(saved):
    maps = (saved[0] / "maps.svg").read_text()
    for told in ("slot 1", "heat map", "laid over", "share of attention"):
        assert f">{told}</text>" in maps
    curves = (saved[0] / "curves.svg").read_text()
    assert curves.count(">Residual by iteration</text>") == 2
    assert ">5 slots</text>" in (saved[0] / "tiles.svg").read_text()
    assert b"/Type /Font" in (saved[0] / "maps.pdf").read_bytes()


def test_heat_maps_have_one_scale_from_dark_to_bright(saved):
    with Image.open(saved[0] / "maps.png") as picture:
        colours = {c for _, c in picture.convert("RGB").getcolors(2**20) or []}
    # The ends of viridis.
    assert {(68, 1, 84), (253, 231, 36)} <= colours or {
        (68, 1, 84),
        (253, 231, 37),
    } <= colours


def test_lines_stand_out_from_white():
    for colour, _ in figures.LINES:
        levels = np.array(list(bytes.fromhex(colour[1:]))) / 255
        linear = np.where(
            levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4
        )
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) > 3
