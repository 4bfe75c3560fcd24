"""The comparison with other libraries runs, and is of the same maps."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.benchmarks import peer_maps, solver_peers
from experiments.benchmarks.peers import OURS
from implicit_slots import SlotAttention
from implicit_slots.runtime.errors import UserError

# jaxopt, which is no longer maintained, warns when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.slow
def test_solver_peers(tmp_path, capsys):
    names = [name for name in solver_peers.installed() if name != OURS]
    if not names:
        pytest.skip("none of jaxopt, optimistix and torchdeq is installed")
    out, peers = tmp_path / "peers", ",".join(names)
    what = "--maps=affine, real 0.9", "--batches=1,3", "--rounds=2"
    solver_peers.main([f"--out={out}", f"--peers={peers}", *what])
    table = (tmp_path / "peers.md").read_text()
    assert table in capsys.readouterr().out
    assert (tmp_path / "peers.png").stat().st_size > 10_000
    numbers = json.loads((tmp_path / "peers.json").read_text())
    assert numbers["versions"].keys() >= {*names}
    one, batch = numbers["results"]
    assert (one["batch"], batch["batch"]) == (1, 3)
    for result in (one, batch):
        assert result["radius"] == pytest.approx(0.9, abs=1e-6)
        forward, both = (solver_peers.best(result[k]) for k in ("forward", "both"))
        # All are compared at what was wanted of them.
        assert {*forward} == {*both} == {OURS, *names}
        assert all(0 < row["residual"] <= 1e-5 for row in forward.values())
        assert all(0 < row["error"] <= 1e-2 for row in both.values())
        assert all(row["bytes"] > 0 for row in both.values())
        ratio = result["both_ratio"]
        assert ratio["peer"] in names and ratio["low"] <= ratio["median"]


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(solver_peers, "installed", lambda: [OURS])
    with pytest.raises(UserError, match="not installed: jaxopt; pip install jaxopt"):
        solver_peers.main(["--peers=jaxopt"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*peer_maps.AFFINE, "digits DEQ", "slot attention"])
def test_a_map_is_the_same_in_pytorch(name, monkeypatch):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    if name == "slot attention":
        slots = SlotAttention(64, num_slots=3, slot_size=64, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (2, 9, 64))
        f, params, x, z0 = slots.problem(x, slots.start(x, jax.random.key(1)))
        problem = peer_maps.Map(f, peer_maps._torch_slots, params, x, z0, z0)
    else:
        monkeypatch.setattr(peer_maps, "FITTING", 1)
        problem = peer_maps.build(name, 2)
    z = problem.z0 + 0.5
    want = np.asarray(problem.f(problem.params, problem.x, z))
    params = jax.tree.map(torch.tensor, peer_maps.tree(problem.params))
    got = problem.torch(params, *(torch.tensor(np.asarray(v)) for v in (problem.x, z)))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_exact_gradient_is_that_of_an_affine_map():
    problem = peer_maps.build("affine, non-normal 0.8", 3)
    w, x, g = (np.asarray(v, np.float64) for v in (problem.params["w"], *problem[3::2]))
    inverse = np.linalg.inv(np.eye(len(w)) - w)
    found = peer_maps.exact(problem, problem.z0)
    np.testing.assert_allclose(found.z, x @ inverse, rtol=1e-9)
    want = (x @ inverse).T @ (g @ inverse.T)
    np.testing.assert_allclose(found.params, want.ravel(), rtol=1e-9)
    assert problem.residual(found.z.astype(np.float32)).max() < 1e-6


def test_the_first_times_are_of_the_libraries_fastest():
    def row(library, seconds):
        return {"library": library, "seconds": {"median": seconds, "turns": [seconds]}}

    rows = [row(OURS, 3.0), row(OURS, 2.0), row("jaxopt", 4.0), {"library": "torchdeq"}]
    chosen = solver_peers.best(rows)
    assert {name: r["seconds"]["median"] for name, r in chosen.items()} == {
        OURS: 2.0,
        "jaxopt": 4.0,
    }
    ratio = {"peer": "jaxopt", "median": 0.5, "low": 0.5, "high": 0.5}
    assert solver_peers.against(chosen) == ratio
    assert solver_peers.against({OURS: rows[0]}) is None
