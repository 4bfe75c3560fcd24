"""`--mode=predict` with a model that is known: its files, its page, what is refused."""

import base64
import io
import pathlib
import urllib.parse

import numpy as np
import pytest
from evaluation.test_prediction import Halves, config
from pages import Page
from PIL import Image

from implicit_slots.runtime.errors import UserError
from implicit_slots.training import predict


@pytest.fixture
def changed(monkeypatch):
    """Puts the model in the place of a trained one; what was to be changed of it."""
    asked = []

    def load(workdir, *, changes):
        asked.append((workdir, changes))
        whole = config()
        whole.model = {"name": "halves", "num_slots": 2, "solver": {"max_steps": 7}}
        return whole, Halves()

    monkeypatch.setattr(predict, "load", load)
    return asked


@pytest.fixture
def images(tmp_path):
    """A folder of pictures, one of which is broken."""
    folder = tmp_path / "in"
    (folder / "deep er").mkdir(parents=True)
    Image.new("RGB", (30, 10), "red").save(folder / "a.png")
    Image.new("L", (400, 600), 90).save(folder / "b#1?.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "deep er" / "c.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_a_page_shows_each_image_and_leads_to_its_files(
    changed, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(predict, "SHOWN", 2)
    out = tmp_path / "out"
    out.mkdir()
    path = predict.run("mine", [str(images)], out, changes={"k": 1}, command="again")
    assert path == out / "index.html" and changed == [("mine", {"k": 1})]
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    names = ("a", "b#1?", "deep er/c")
    kinds = ("masks.png", "overlay.png", "npz")
    made = {f"{name}.{kind}" for name in names for kind in kinds}
    assert files == made | {"index.html"}
    page = Page(path)
    assert "What mine makes of 3 images" in page.text and "again" in page.text
    assert "(halves) has 2 slots, takes at most 7 iterations, and" in page.text
    assert "1 more images are in the folder" in page.text
    assert page.headings == ["a", "b#1?", "Left out", "Again"]
    sentence = "broken.png cannot be read (not a picture)"
    assert sentence in page.text
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and sentence in said.err
    linked = [link for link in page.links if not link.startswith("data:")]
    assert linked == [
        urllib.parse.quote(f"{name}.{kind}") for name in names[:2] for kind in kinds
    ]
    pictures = [shown(link) for link in page.links if link.startswith("data:")]
    assert [picture.size for picture in pictures] == [
        *((30, 10), (30, 10), (8, 8)),
        *((160, 240), (160, 240), (8, 8)),
    ]
    np.testing.assert_array_equal(np.asarray(pictures[0]), [[(255, 0, 0)] * 30] * 10)
    with np.load(out / "a.npz") as arrays, Image.open(out / "a.overlay.png") as overlay:
        grey = round(255 * min(arrays["slots"][0, 0], 1))
        assert np.asarray(pictures[2]).ravel().tolist() == [grey] * 8 * 8 * 3
        np.testing.assert_array_equal(np.asarray(pictures[1]), np.asarray(overlay))


def shown(link: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))


def test_what_cannot_be_is_one_sentence_and_writes_nothing(changed, images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match="in is there and holds something; choose anoth"
    ):
        predict.run("mine", [str(images)], images)
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        predict.run("mine", [str(images / "nowhere")], out)
    assert not changed
    broken = str(images / "broken.png")
    with pytest.raises(UserError, match=r"none of the images .*broken\.png cannot be"):
        predict.run("mine", [broken], out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UserError, match="none of the images"):
        predict.run("mine", [broken], out)
    assert list(out.iterdir()) == []
    with pytest.raises(
        UserError, match=r"broken\.png/x cannot be written: .*Not a dir"
    ):
        predict.run("mine", [str(images)], pathlib.Path(broken) / "x")
