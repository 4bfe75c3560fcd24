"""The Python in the READMEs runs as it stands, and so do the examples."""

import math
import pathlib
import re

import pytest

from experiments.examples import own_models

ROOT = pathlib.Path(__file__).parents[1]
# All blocks of a README run in order, as a reader would type them.
READMES = ("implicit_slots/models/README.md", "implicit_slots/fixed_point/README.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("readme", READMES)
def test_the_python_of_a_readme_runs(readme):
    blocks = BLOCK.findall((ROOT / readme).read_text())
    assert len(blocks) >= 3
    names = {"__name__": readme}
    for block in blocks:
        exec(compile(block, readme, "exec"), names)


def test_readmes_tell_all_files():
    for readme in (*READMES, "experiments/examples/README.md"):
        text = (ROOT / readme).read_text()
        for path in (ROOT / readme).parent.glob("*.py"):
            listed = f"`{path.name}`" in text
            assert listed or path.read_text().count("\n") == 1, f"{readme}: {path.name}"


@pytest.mark.slow
@pytest.mark.parametrize("example", own_models.EXAMPLES)
def test_an_example_learns(example):
    losses = own_models.train(*example())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
