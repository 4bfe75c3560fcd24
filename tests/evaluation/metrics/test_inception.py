"""FID's Inception-v3 against torch-fidelity's, and its parts against NumPy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32, convolution, relative_error

from implicit_slots.evaluation.metrics import inception
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.weights import write_weights

# By torch-fidelity 0.4.0 in float64, of `random_state()` and each of `pictures()`: its
# features 0, 512, 1024 and 1536, and the sum of all.
RECORDED = [
    [0.0724524111, 1.060336113, 1.6359449625, 1.1369360685],
    [0.067120418, 0.9860478044, 1.5161744356, 0.9072480202],
]
SUMS = [1085.94610314, 953.24213548]


def pictures():
    """Noise, and a smooth picture, both 8 bits; neither square nor of FID's size."""
    noise = np.random.RandomState(1).randint(0, 256, (40, 28, 3))
    rows, columns, channels = np.ogrid[:40, :28, :3]
    smooth = (5 * rows + 3 * columns * (1 + channels)) % 256
    return np.stack([noise, smooth]).astype(np.uint8)


def layers():
    """Every convolution: inputs, outputs, rows and columns of its kernel."""
    found = {
        "Conv2d_1a_3x3": (3, 32, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (32, 64, 3, 3),
        "Conv2d_3b_1x1": (64, 80, 1, 1),
        "Conv2d_4a_3x3": (80, 192, 3, 3),
    }

    def block(name, branches):
        for branch, shape in branches.items():
            found[f"{name}.branch{branch}"] = shape

    for name, inputs, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        branches = {
            "1x1": (inputs, 64, 1, 1),
            "5x5_1": (inputs, 48, 1, 1),
            "5x5_2": (48, 64, 5, 5),
            "3x3dbl_1": (inputs, 64, 1, 1),
            "3x3dbl_2": (64, 96, 3, 3),
            "3x3dbl_3": (96, 96, 3, 3),
            "_pool": (inputs, pool, 1, 1),
        }
        block(f"Mixed_{name}", branches)
    branches = {
        "3x3": (288, 384, 3, 3),
        "3x3dbl_1": (288, 64, 1, 1),
        "3x3dbl_2": (64, 96, 3, 3),
        "3x3dbl_3": (96, 96, 3, 3),
    }
    block("Mixed_6a", branches)
    for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        branches = {
            "1x1": (768, 192, 1, 1),
            "7x7_1": (768, inner, 1, 1),
            "7x7_2": (inner, inner, 1, 7),
            "7x7_3": (inner, 192, 7, 1),
            "7x7dbl_1": (768, inner, 1, 1),
            "7x7dbl_2": (inner, inner, 7, 1),
            "7x7dbl_3": (inner, inner, 1, 7),
            "7x7dbl_4": (inner, inner, 7, 1),
            "7x7dbl_5": (inner, 192, 1, 7),
            "_pool": (768, 192, 1, 1),
        }
        block(f"Mixed_{name}", branches)
    branches = {
        "3x3_1": (768, 192, 1, 1),
        "3x3_2": (192, 320, 3, 3),
        "7x7x3_1": (768, 192, 1, 1),
        "7x7x3_2": (192, 192, 1, 7),
        "7x7x3_3": (192, 192, 7, 1),
        "7x7x3_4": (192, 192, 3, 3),
    }
    block("Mixed_7a", branches)
    for name, inputs in (("7b", 1280), ("7c", 2048)):
        branches = {
            "1x1": (inputs, 320, 1, 1),
            "3x3_1": (inputs, 384, 1, 1),
            "3x3_2a": (384, 384, 1, 3),
            "3x3_2b": (384, 384, 3, 1),
            "3x3dbl_1": (inputs, 448, 1, 1),
            "3x3dbl_2": (448, 384, 3, 3),
            "3x3dbl_3a": (384, 384, 1, 3),
            "3x3dbl_3b": (384, 384, 3, 1),
            "_pool": (inputs, 192, 1, 1),
        }
        block(f"Mixed_{name}", branches)
    return found


def random_state():
    """A state dictionary under which no layer dies; the stream is NumPy's frozen one.

    Means, variances and weights of the batch norms are all away from 0 and 1.
    """
    rng = np.random.RandomState(0)
    state = {}
    for name, (inputs, outputs, rows, columns) in layers().items():
        kernel = rng.standard_normal((outputs, inputs, rows, columns))
        kernel *= np.sqrt(2 / (inputs * rows * columns))
        state[f"{name}.conv.weight"] = kernel
        state[f"{name}.bn.weight"] = rng.uniform(0.8, 1.2, outputs)
        state[f"{name}.bn.bias"] = 0.1 * rng.standard_normal(outputs)
        state[f"{name}.bn.running_mean"] = 0.1 * rng.standard_normal(outputs)
        state[f"{name}.bn.running_var"] = rng.uniform(0.8, 1.2, outputs)
    state["fc.weight"] = np.zeros((1008, 2048))
    state["fc.bias"] = np.zeros(1008)
    return {name: value.astype(np.float32) for name, value in state.items()}


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.npz"
    write_weights(path, state)
    return path


@pytest.fixture(scope="module")
def features(file):
    params = inception.load(file)
    compiled = jax.jit(inception.features)
    return lambda images: np.asarray(compiled(params, images))


def levels(images):
    return images / np.float32(255)


def test_features_are_those_recorded_of_torch_fidelity(features):
    got = features(levels(pictures()))
    assert got.shape == (2, 2048) and got.dtype == np.float32
    assert relative_error(got[:, ::512], RECORDED) < FLOAT32
    assert relative_error(got.sum(axis=1), SUMS) < FLOAT32
    # What is allowed is far below what tells these images apart.
    assert relative_error(RECORDED[0], RECORDED[1]) > 0.1


def test_features_are_those_of_torch_fidelity(features, state, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with PyTorch's features")
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        reason="compares with torch-fidelity's features",
        exc_type=ImportError,
    )
    path = tmp_path / "weights.pt"
    write_weights(path, state)
    network = module.FeatureExtractorInceptionV3("", ["2048"], str(path))
    (want,) = network(torch.tensor(pictures().transpose(0, 3, 1, 2)))
    assert relative_error(features(levels(pictures())), want.numpy()) < FLOAT32


def test_a_wrapped_network_is_recognised(state, monkeypatch):
    wrapped = {f"module.{name}": value for name, value in state.items()}
    monkeypatch.setattr(inception, "read_weights", lambda path: wrapped)
    assert inception.load(pathlib.Path("other.pt")).keys() == layers().keys()


def test_images_count_as_their_8_bits(features):
    images = levels(pictures())
    nudge = np.random.default_rng(0).uniform(-0.4, 0.4, images.shape)
    nudge[images == 0], nudge[images == 1] = -3, 3  # taken as black and white
    nudged = (images + nudge / 255).astype(np.float32)
    assert nudged.min() < -0.01 and nudged.max() > 1.01
    np.testing.assert_array_equal(features(nudged), features(images))


def test_an_image_has_its_features_in_any_batch(features):
    images = levels(pictures())
    want = features(images)
    assert relative_error(features(images[::-1]), want[::-1]) < FLOAT32
    assert relative_error(features(images[[1, 1]]), want[[1, 1]]) < FLOAT32


@pytest.mark.parametrize(("height", "width"), [(16, 24), (5, 40), (1, 2)])
def test_resize_is_that_of_tensorflow_1(height, width):
    images = np.random.default_rng(0).normal(size=(2, height, width, 3))
    want = np.zeros((2, 21, 21, 3))
    for i in range(21):
        for j in range(21):
            row, column = i * height / 21, j * width / 21
            top, left = int(row), int(column)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, along = row - top, column - left
            upper = (1 - along) * images[:, top, left] + along * images[:, top, right]
            lower = (1 - along) * images[:, bottom, left]
            lower += along * images[:, bottom, right]
            want[:, i, j] = (1 - down) * upper + down * lower
    got = inception.resize(jnp.asarray(images, jnp.float32), 21)
    assert relative_error(got, want) < FLOAT32


def test_resize_to_the_same_size_changes_nothing():
    images = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(inception.resize(jnp.asarray(images), 8), images)


@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (2, "VALID")])
def test_a_layer_is_convolution_batch_norm_and_relu(stride, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(9, 7, 3)), rng.normal(size=(5, 3, 3, 3))
    norm = {name: rng.normal(size=5) for name in ("weight", "bias", "running_mean")}
    norm["running_var"] = rng.uniform(0, 0.01, 5)  # so that its ε counts
    state = {f"a.bn.{name}": value for name, value in norm.items()}
    want = convolution(
        x,
        kernel.transpose(2, 3, 1, 0),
        stride=stride,
        padding=1 if padding == "SAME" else 0,
    )
    want = (want - norm["running_mean"]) / np.sqrt(norm["running_var"] + 0.001)
    want = np.maximum(want * norm["weight"] + norm["bias"], 0)
    layer = inception._folded({"a.conv.weight": kernel, **state}, "a")
    got = inception._convolve(layer, jnp.asarray(x[None], jnp.float32), stride, padding)
    assert relative_error(got[0], want) < FLOAT32


@pytest.mark.parametrize(
    ("pool", "stride", "pad", "reduce"),
    [
        (inception._mean, 1, 1, np.nanmean),  # the border is not in the mean
        (inception._largest, 1, 1, np.nanmax),
        (inception._reduce, 2, 0, np.nanmax),
    ],
)
def test_pools(pool, stride, pad, reduce):
    x = np.random.default_rng(0).normal(size=(7, 9, 2)) - 5  # below the zeros around
    padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)), constant_values=np.nan)
    rows = range(0, padded.shape[0] - 2, stride)
    columns = range(0, padded.shape[1] - 2, stride)
    want = [
        [reduce(padded[i : i + 3, j : j + 3], axis=(0, 1)) for j in columns]
        for i in rows
    ]
    got = pool(jnp.asarray(x[None], jnp.float32))[0]
    assert relative_error(got, want) < FLOAT32


WANTED = "pt_inception-2015-12-05-6726825d.pth"


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"nowhere.pt cannot be read.*{WANTED}"):
        inception.load(tmp_path / "nowhere.pt")
    (tmp_path / "text.npz").write_text("<html>")
    with pytest.raises(UserError, match=f"text.npz is damaged.*{WANTED}"):
        inception.load(tmp_path / "text.npz")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fc.weight", np.zeros((1000, 2048))),  # torchvision's own weights
        ("fc.weight", None),
        ("Mixed_7c.branch_pool.conv.weight", None),
        ("Mixed_7c.branch_pool.bn.bias", None),
        ("Mixed_7c.branch_pool.conv.weight", np.ones((192, 2047, 1, 1))),
        ("Mixed_7c.branch_pool.conv.weight", np.ones((191, 2048, 1, 1))),
        ("Mixed_7c.branch_pool.conv.weight", np.ones(192)),
    ],
)
def test_the_weights_of_another_network_are_refused(state, monkeypatch, name, value):
    other = {key: entry for key, entry in state.items() if key != name}
    if value is not None:
        other[name] = value
    monkeypatch.setattr(inception, "read_weights", lambda path: other)
    with pytest.raises(UserError, match=f"other.pt holds another network.*{WANTED}"):
        inception.load(pathlib.Path("other.pt"))
