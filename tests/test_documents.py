"""The documents name every file, their links lead somewhere, and their Python runs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# pytest collects the tests of these folders; their README is that of tests/.
TESTS = ROOT / "tests"


# All Python blocks of a README run in order, as a reader would type them.
READMES = (
    "README.md",
    "implicit_slots/models/README.md",
    "implicit_slots/fixed_point/README.md",
    "implicit_slots/training/README.md",
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("readme", READMES)
def test_the_python_of_a_readme_runs(readme):
    blocks = BLOCK.findall((ROOT / readme).read_text())
    assert blocks
    names = {"__name__": readme}
    for block in blocks:
        exec(compile(block, readme, "exec"), names)


def files_of_the_project(pattern):
    """Files of the project; none of a run, an environment or an installation."""
    folders = ("implicit_slots", "configs", "experiments", "tests")
    return [
        *ROOT.glob(pattern),
        *(file for folder in folders for file in (ROOT / folder).rglob(pattern)),
    ]


def test_every_folders_readme_names_all_its_files():
    folders = {file.parent for file in files_of_the_project("*.py")} - {ROOT}
    for folder in sorted(f for f in folders if f == TESTS or TESTS not in f.parents):
        text = (folder / "README.md").read_text()
        for file in (*folder.glob("*.py"), *folder.glob("*.ipynb")):
            if file.name != "__init__.py":
                assert f"`{file.name}`" in text, f"{folder}/README.md: {file.name}"
        table = re.search(r"^\| file .*?(?=^[^|]|\Z)", text, re.M | re.S)
        for named in re.findall(r"`([\w.]+\.py)`", table[0] if table else ""):
            assert list(folder.glob(f"**/{named}")), f"{folder}/README.md: {named}"


def slug(title):
    """The anchor of a heading."""
    words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def test_links_lead_to_files_and_headings():
    for file in files_of_the_project("*.md"):
        text = re.sub(r"```.*?```", "", file.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, heading = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.exists(), f"{file}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
                assert heading in map(slug, titles), f"{file}: {link}"


def test_no_file_is_over_400_lines():
    for file in files_of_the_project("*.py"):
        if TESTS not in file.parents:
            assert len(file.read_text().splitlines()) <= 400, file
