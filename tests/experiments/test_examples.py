"""The scripts run, and what they print and write is what they say."""

import importlib
import json
import math
import pathlib
import re
import runpy

import numpy as np
import pytest

from experiments.benchmarks import solver_comparison
from experiments.examples import digits_deq, own_models
from implicit_slots.fixed_point import Implicit
from implicit_slots.runtime.errors import UserError
from implicit_slots.training.checkpoint import saved_steps
from implicit_slots.training.pretrained import load


@pytest.fixture(scope="module")
def workdir(smoke_run):
    return smoke_run[0]


@pytest.mark.slow
def test_solver_comparison(workdir, tmp_path, capsys):
    sizes = "--images=3 --judged=2 --steps=9 --rounds=2".split()
    out = tmp_path / "solver_comparison"
    solver_comparison.main(["--smoke", f"--workdir={workdir}", f"--out={out}", *sizes])
    table = (tmp_path / "solver_comparison.md").read_text()
    assert table in capsys.readouterr().out
    assert (tmp_path / "solver_comparison.png").stat().st_size > 10_000
    numbers = json.loads((tmp_path / "solver_comparison.json").read_text())["results"]
    for model in ("untrained", "trained"):
        assert len(numbers["spectra"][model]["spectral_radius"]) == 3
        for curve in numbers["forward"][model].values():
            assert len(curve) == 9 and curve == sorted(curve, reverse=True)
    for setting in (
        "untrained, 7 iterations",
        "trained, 7 iterations",
        "trained, 9 iterations",
    ):
        errors = numbers["backward"][setting]
        # Judged against itself, by another path.
        assert max(errors["Dense"]["relative_error"]) < 1e-3
        assert len(errors["Dense"]["steps"]) == 2
        for name in ("Broyden", "Neumann 2", "Dense"):
            assert f"| {name} |" in table
    assert numbers["cost"]["Dense"]["megabytes"] > 0


def test_loading_a_run_gives_its_trained_model(workdir, tmp_path):
    config, model = load(workdir)
    assert config.name == "scenes-tokens-smoke" and model.slot_attention.num_slots == 3
    other, fresh = load(workdir)
    assert other == config and fresh is not model
    with pytest.raises(UserError, match="holds no run; train one there first"):
        load(tmp_path)


def test_a_run_is_loaded_at_each_of_its_checkpoints(workdir):
    steps = saved_steps(workdir)
    assert steps == [10, 20]
    kernels = [
        np.asarray(load(workdir, step)[1].slot_projection.kernel[...])
        for step in (10, 20, None)
    ]
    assert np.array_equal(kernels[1], kernels[2])
    assert not np.array_equal(kernels[0], kernels[1])
    with pytest.raises(UserError, match="checkpoints/11"):
        load(workdir, 11)


@pytest.mark.slow
def test_digits(monkeypatch, capsys):
    kept = {
        name: pair
        for name, pair in digits_deq.ADJOINTS.items()
        if isinstance(pair[0], Implicit)
    }
    monkeypatch.setattr(digits_deq, "ADJOINTS", kept)
    digits_deq.main(["--steps=60"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 2
    plain, penalised = ([float(cell) for cell in row[2:-1]] for row in rows)
    for accuracy, _, forward, backward, failed, _ in (plain, penalised):
        assert accuracy > 0.8 and forward <= 30 and backward <= 20 and failed == 0
    # The penalty lowers the spectral radius, and with it the solver's steps.
    assert penalised[-1] < plain[-1]


LAYERS = {
    "layer_nnx": "flax",
    "layer_linen": "flax",
    "layer_equinox": "equinox",
    "layer_haiku": "haiku",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_each_library_fits_a_notebooks_cell_and_learns(name, capsys):
    pytest.importorskip(LAYERS[name], reason="an example of this library")
    file = pathlib.Path(digits_deq.__file__).with_name(f"{name}.py")
    lines = [line for line in file.read_text().splitlines() if line]
    assert len(lines) < 25
    runpy.run_path(str(file))
    first, last = (float(t.split()[1]) for t in capsys.readouterr().out.splitlines())
    assert last < 0.2 * first


def test_every_layer_is_run():
    folder = pathlib.Path(digits_deq.__file__).parent
    assert {file.stem for file in folder.glob("layer_*.py")} == LAYERS.keys()


NOTEBOOKS = sorted(pathlib.Path(digits_deq.__file__).parent.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_no_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and path.stat().st_size < 20_000
    for cell in code:
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Jupyter's own
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path):
    for module in ("ipykernel", "nbclient"):
        pytest.importorskip(module, reason="the extra notebooks")
    nbclient, nbformat = map(importlib.import_module, ("nbclient", "nbformat"))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=None).execute(cwd=path.parents[2])
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    shown = "".join(cell.get("source", "") for cell in notebook.cells).count(
        "plt.show()"
    )
    assert len(pictures) >= shown > 2
    if path.stem == "trained_model":
        text = "".join(o.get("text", "") for o in outputs)
        errors = dict(re.findall(r"^(\S+) +cosine .* ([\d.]+)%$", text, re.M))
        # The exact gradient is far from one term's, and near a solver's.
        assert float(errors["Neumann(terms=1)"]) > 10 > float(errors["GMRES(16)"])


@pytest.mark.slow
@pytest.mark.parametrize("example", own_models.EXAMPLES)
def test_an_example_learns(example):
    losses = own_models.train(*example())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
