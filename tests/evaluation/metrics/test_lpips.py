"""LPIPS against the lpips package, and its laws."""

import importlib.util
import pathlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32, relative_error

from implicit_slots.evaluation.metrics import lpips
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.weights import write_weights

# What lpips 0.1.4 on PyTorch 2.13.0 gives for `pictures` under `random_state`.
RECORDED = {
    "AlexNet": [0.030104979872703552, 0.9299085736274719],
    "VGG16": [0.030312616378068924, 0.6923319697380066],
}


def pictures():
    """Two pictures and other versions of them: one slightly, one wholly different."""
    rng = np.random.RandomState(1)
    image = rng.uniform(0, 1, (2, 36, 32, 3))
    other = image.copy()
    other[0] = np.clip(other[0] + 0.05 * rng.standard_normal(other[0].shape), 0, 1)
    other[1] = rng.uniform(0, 1, other[1].shape)
    return image.astype(np.float32), other.astype(np.float32)


def random_state(network):
    """Weights under which no layer dies; the stream is NumPy's frozen one."""
    rng = np.random.RandomState(0)
    state = {}
    for name, shape in lpips.shapes(network).items():
        if name.endswith("bias"):
            value = 0.1 * rng.standard_normal(shape)
        elif name.startswith("lin"):
            value = rng.uniform(0, 1, shape)  # negative weights are clipped there
        else:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        state[name] = value.astype(np.float32)
    return state


@pytest.fixture(scope="module", params=["AlexNet", "VGG16"])
def network(request):
    return request.param


@pytest.fixture(scope="module")
def params(network):
    return random_state(network)


@pytest.fixture(scope="module")
def distance(params):
    compiled = jax.jit(lpips.distance)
    return lambda image, other: np.asarray(compiled(params, image, other))


def test_distances_are_those_recorded_of_the_lpips_package(network, distance):
    got = distance(*pictures())
    assert got.shape == (2,) and got.dtype == np.float32
    assert relative_error(got, RECORDED[network]) < FLOAT32


def stand_in():
    """The parts of torchvision's networks that the package reads, without weights."""
    nn: Any = importlib.import_module("torch.nn")

    def features(layers):
        return lambda **how: types.SimpleNamespace(features=nn.Sequential(*layers()))

    def alexnet():
        relu, pool = nn.ReLU, lambda: nn.MaxPool2d(3, 2)
        return [
            *(nn.Conv2d(3, 64, 11, 4, 2), relu(), pool()),
            *(nn.Conv2d(64, 192, 5, padding=2), relu(), pool()),
            *(nn.Conv2d(192, 384, 3, padding=1), relu()),
            *(nn.Conv2d(384, 256, 3, padding=1), relu()),
            *(nn.Conv2d(256, 256, 3, padding=1), relu(), pool()),
        ]

    def vgg16():
        made, inputs = [], 3
        for width in (
            64,
            64,
            0,
            128,
            128,
            0,
            *(256,) * 3,
            0,
            *(512,) * 3,
            0,
            *(512,) * 3,
        ):
            if width:
                made += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
            else:
                made.append(nn.MaxPool2d(2, 2))
        return made

    models = types.ModuleType("torchvision.models")
    for name, layers in (("alexnet", alexnet), ("vgg16", vgg16)):
        setattr(models, name, features(layers))
    found = types.ModuleType("torchvision")
    found.models = models  # pyright: ignore[reportAttributeAccessIssue]
    return {"torchvision": found, "torchvision.models": models}


def test_distances_are_those_of_the_lpips_package(
    network, params, distance, monkeypatch
):
    torch = pytest.importorskip("torch", reason="compares with PyTorch's distances")
    if importlib.util.find_spec("torchvision") is None:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    peer = pytest.importorskip("lpips", reason="compares with the lpips package")
    net = {"AlexNet": "alex", "VGG16": "vgg"}[network]
    module = peer.LPIPS(False, net, pnet_rand=True, verbose=False)
    state = {name: torch.tensor(value) for name, value in params.items()}
    left = module.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    # The rest is there twice (`lins`) or never changes (the scaling).
    assert all(name.startswith(("lins.", "scaling_")) for name in left.missing_keys)
    pair = (torch.tensor(x.transpose(0, 3, 1, 2)) for x in pictures())
    with torch.no_grad():
        want = module(*pair, normalize=True).reshape(-1).numpy()
    assert relative_error(distance(*pictures()), want) < FLOAT32


def test_an_image_is_compared_with_its_own_other_alone():
    """And is at no distance from itself; the distance is the same both ways."""
    params, (image, other) = random_state("AlexNet"), pictures()
    batch = np.concatenate([image, image, other])
    others = np.concatenate([other, image, image])
    got = np.asarray(jax.jit(lpips.distance)(params, batch, others))
    near, far = got[:2]
    assert 0 < 2 * near < far
    np.testing.assert_array_equal(got[2:4], 0)
    np.testing.assert_allclose(got[4:], [near, far], rtol=FLOAT32)
    small = jnp.zeros((2, 31, 40, 3))  # the networks do not take these
    assert np.isnan(lpips.distance(params, small, small)).all()


def test_a_module_s_state_is_read_with_what_else_it_holds(params, tmp_path):
    file = tmp_path / "lpips.npz"
    more = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    wrapped = {f"module.{name}": value for name, value in (params | more).items()}
    write_weights(file, wrapped)
    got = lpips.load(file)
    assert got.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(got[name], value)


def test_other_files_are_refused_with_what_is_needed(params, monkeypatch, tmp_path):
    wanted = r"lpips\.LPIPS\(net='alex'\)\.state_dict\(\)"
    with pytest.raises(UserError, match=wanted):
        lpips.load(tmp_path / "nowhere.npz")
    lacking = {name: w for name, w in params.items() if not name.startswith("lin")}
    for state in (lacking, {name: w[:1] for name, w in params.items()}, {}):
        monkeypatch.setattr(lpips, "read_weights", lambda path, state=state: state)
        with pytest.raises(UserError, match=f"another network.*{wanted}"):
            lpips.load(pathlib.Path("other.npz"))
