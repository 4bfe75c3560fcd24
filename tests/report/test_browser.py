"""Both pages in a real browser: light and dark, on a desk and on a phone."""

import html
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from implicit_slots.drawing import grids
from implicit_slots.report import render
from implicit_slots.report.comparison import write_comparison
from implicit_slots.report.page import write_report
from implicit_slots.report.plots import COLOURS
from implicit_slots.report.predictions import Shown, write_predictions
from implicit_slots.report.predictions import picture as picture_of

pytestmark = pytest.mark.slow  # a real browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
SIZES = {"desk": (1200, 900), "phone": (390, 844)}

# Writes what the browser made of the page into the page itself. A headless window is
# not made as narrow as a phone, so the page is looked at in a frame that is.
PROBE = """<!DOCTYPE html><html><body><iframe id="page" src="{source}"
style="width:{width}px;height:{height}px;border:0"></iframe><script>
window.onload = () => {{
  const page = document.getElementById("page").contentDocument;
  const root = page.scrollingElement;
  const body = page.defaultView.getComputedStyle(page.body);
  const broken = [...page.images].filter((i) => !i.complete || !i.naturalWidth).length;
  document.body.dataset.found = JSON.stringify({{
    width: root.scrollWidth, room: root.clientWidth, height: root.scrollHeight,
    ink: body.color, page: body.backgroundColor, images: page.images.length, broken}});
}};
</script></body></html>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report and a comparison, of an evaluation with long names and wide pictures."""
    root = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    workdirs = []
    picture = rng.integers(0, 255, size=(120, 1900, 3)).astype(np.uint8)
    for seed in range(2):
        workdir = root / f"seed{seed}"
        folder = workdir / "evaluation" / "test"
        folder.mkdir(parents=True)
        config = {"name": "scenes", "seed": seed, "num_steps": 7000}
        (workdir / "config.json").write_text(json.dumps(config))
        metric = {"mean": 0.4321, "std": 0.1, "count": 9}
        prefixes = ("attention/", "decoder/", "", "shuffled/one_left/")
        names = (
            "fg_ari",
            "area_ratio",
            "ssim",
            "spill",
            "residual",
            "a_name_of_no_row",
        )
        record = {
            "title": "Test split of scenes",
            "step": 7000,
            "command": "python -m implicit_slots.main " + 20 * "--config.a.key=value ",
            "metrics": {p + name: metric for p in prefixes for name in names},
            "absent": {"fid": "no weights"},
            "curves": {
                "spill": {
                    "title": "Spill",
                    "x_label": "slots left",
                    "y_label": "per image",
                    "x": [3, 2, 1],
                    "series": {
                        "median": [1, 2, 4],
                        "low": [1, 1, 3],
                        "high": [2, 3, 5],
                    },
                }
            },
            "pictures": [
                {"file": "wide.png", "title": "Wide", "caption": "A picture."}
            ],
        }
        grids.save_png(picture, folder / "wide.png")
        (folder / "metrics.json").write_text(json.dumps(record))
        workdirs.append(workdir)
    wide = picture_of(Image.fromarray(picture))
    shown = [Shown(40 * "name" + "/x", dict.fromkeys(("image", "masks"), wide))]
    predicted = write_predictions(
        root,
        shown,
        heading="What a model makes",
        note="A note.",
        command="python " + 40 * "--config.a.key=value ",
        left_out=[f"file {40 * 'name'} cannot be read (not a picture)"],
        more=1,
    )
    return {
        "predictions": predicted,
        "report": write_report(workdirs[0]),
        "comparison": write_comparison(workdirs, root / "report.html"),
    }


def look(page, size, scheme, folder):
    """What the browser found, see `PROBE`."""
    width, height = SIZES[size]
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(source=page.as_uri(), width=width, height=height))
    # 0 is dark, 1 is light.
    preferred = {"dark": 0, "light": 1}[scheme]
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
        *("--allow-file-access-from-files", "--virtual-time-budget=5000"),
        f"--blink-settings=preferredColorScheme={preferred}",
        *("--window-size=1300,1000", f"--user-data-dir={folder / 'profile'}"),
        probe.as_uri(),
    ]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip("the browser does not answer")
    found = re.search(r'data-found="([^"]*)"', result.stdout)
    if found is None:
        pytest.skip(f"the browser does not start: {result.stderr[-200:]}")
    return json.loads(html.unescape(found[1]))


def luminance(colour):
    levels = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(
        levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4
    )
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison", "predictions"])
def test_a_page_fits_is_legible_and_shows_its_pictures(
    pages, name, scheme, size, tmp_path
):
    found = look(pages[name], size, scheme, tmp_path)
    assert found["width"] <= found["room"] <= SIZES[size][0]
    assert found["height"] > 500
    assert found["images"] == (1 if name == "report" else 2) and not found["broken"]
    ink, page = luminance(found["ink"]), luminance(found["page"])
    assert (page < ink) == (scheme == "dark")
    brighter, darker = max(ink, page), min(ink, page)
    assert (brighter + 0.05) / (darker + 0.05) > 7


def test_pages_need_nothing_else(pages):
    for path in pages.values():
        text = path.read_text()
        assert not re.search(r'src="(?!data:)', text)
        # A page of predictions leads to the files beside it.
        leads = re.findall(r'href="(?!data:|#)[^"]*"', text)
        assert len(leads) == (3 if path.name == "index.html" else 0)
        assert "<script" not in text


def test_every_colour_of_text_is_legible_on_every_ground():
    style = (pathlib.Path(render.__file__).parent / "templates/style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): #(\w{6});", scheme))
        level = {
            name: luminance(str(tuple(bytes.fromhex(c)))) for name, c in colours.items()
        }
        grounds = [level.pop(name) for name in ("page", "card")]
        level.pop("rule")
        assert level.keys() == {"ink", *COLOURS} - {"rule"}
        for name, ink in level.items():
            for ground in grounds:
                brighter, darker = max(ink, ground), min(ink, ground)
                assert (brighter + 0.05) / (darker + 0.05) >= 4.5, name
