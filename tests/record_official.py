"""Records what official SLATE computes, for tests/test_interop.py.

    python tests/record_official.py --official=DIR --out=tests/official

Needs PyTorch and a checkout of github.com/singhgautam/slate in DIR, both by hand and
neither for the tests. A few seconds on one core. Writes small arrays and no code: what
went in (images, noise, dropout masks), what came out. The weights are not stored but
drawn by `draw_weights` here and in the test. On the official code's own random
initialisation the test compares the two directly where OFFICIAL_SLATE=DIR is set.
"""

import argparse
import collections
import contextlib
import math
import pathlib
import sys
import types
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# One official model per number of slot heads.
SLOT_HEADS = (1, 3)
SIZE = {
    "image_size": 16,
    "img_channels": 3,
    "vocab_size": 11,
    "d_model": 16,
    "num_dec_blocks": 2,
    "num_heads": 2,
    "dropout": 0.1,
    "num_iterations": 3,
    "num_slots": 3,
    "slot_size": 12,
    "mlp_hidden_size": 20,
    "pos_channels": 4,  # read by nothing
}
# For the statistics of initial values: more of them, and no two widths alike.
INITIAL_SIZE = SIZE | {
    "vocab_size": 101,
    "d_model": 64,
    "slot_size": 48,
    "mlp_hidden_size": 80,
}
BATCH, TEMPERATURE, STEPS = 2, 0.7, 2
# Ten times the official rates: float32 holds an update of 5e-5 on a parameter of size
# one to 1e-3 only. The warm-up ends with the second step.
RATES = {"dvae": 3e-3, "main": 1e-3}
WARMUP, CLIP = 2, 1.0
SEEDS = 20
# Entries of each tensor that are stored; the rest is in the norms.
SAMPLES = 24
ADAM_PROBE = (1e-8, 3e-8, 1e-3, 0.0)


def draw_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draws a weight for each official name: the same numbers everywhere.

    About as large as the initialisation makes them, but with no tensor constant: a zero
    bias would hide where it is added.
    """
    weights = {}
    for name, shape in shapes.items():
        # Raw bits, which NumPy never changes; its distributions it may.
        bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
        uniform = ((bits >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)
        if len(shape) == 1:
            weight = (1 if name.endswith(".weight") else 0) + 0.2 * uniform
        elif name.startswith(("positional", "dictionary")):
            weight = math.sqrt(3) * uniform
        else:
            weight = math.sqrt(3 / math.prod(shape[1:])) * uniform
        weights[name] = weight.astype(np.float32)
    return weights


def sampled(name: str, size: int) -> np.ndarray:
    """Returns which entries of a flattened tensor are recorded."""
    bits = np.random.PCG64(zlib.crc32(name.encode()) + 1).random_raw(SAMPLES)
    return np.unique(bits % np.uint64(size)).astype(np.int64)


def main(argv: list[str] | None = None) -> None:
    """Writes the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args(argv)
    use(arguments.official)
    arguments.out.mkdir(parents=True, exist_ok=True)

    for heads in SLOT_HEADS:
        model = official_model(slot_heads=heads, seed=0)
        load_drawn(model)
        save(arguments.out / f"slot_heads_{heads}.npz", record(model))
    save(arguments.out / "initial.npz", initial_statistics())
    save(arguments.out / "adam.npz", {"parameters": adam_probe()})
    write_torch_file(arguments.out / "sample.pt")


def use(official: pathlib.Path) -> None:
    """Lets the official modules be imported from a checkout."""
    sys.path.insert(0, str(official))


def record(model: Any) -> dict[str, np.ndarray]:
    """Records a model's passes, and steps of training where it has several heads."""
    several = model.slot_attn.slot_attention.num_heads > 1
    return passes(model) | (training(model) if several else {})


def save(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays."""
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{path}: {path.stat().st_size:,} bytes")


def official_model(
    *, slot_heads: int, seed: int, size: Mapping[str, Any] = SIZE
) -> Any:
    """Returns the official model as it initialises itself."""
    import slate  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    return slate.SLATE(types.SimpleNamespace(**size, num_slot_heads=slot_heads))


def tensors(model: Any) -> dict[str, Any]:
    """Returns the parameters that are trained, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def load_drawn(model: Any) -> None:
    """Gives the model the weights of `draw_weights`."""
    import torch  # pyright: ignore[reportMissingImports]

    drawn = draw_weights({n: tuple(p.shape) for n, p in tensors(model).items()})
    with torch.no_grad():
        for name, parameter in tensors(model).items():
            parameter.copy_(torch.from_numpy(drawn[name]))


def draw_images(seed: int) -> Any:
    """Returns images [batch, 3, height, width] in [0, 1] with a coarse structure."""
    import torch  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(seed)
    side = SIZE["image_size"]
    coarse = rng.uniform(size=(BATCH, 3, 4, 4)).repeat(side // 4, 2)
    images = coarse.repeat(side // 4, 3) + rng.normal(0, 0.05, (BATCH, 3, side, side))
    return torch.from_numpy(np.clip(images, 0, 1).astype(np.float32))


@contextlib.contextmanager
def recorded_noise():
    """Yields lists that collect what the official code draws, in the order of use."""
    import torch  # pyright: ignore[reportMissingImports]

    drawn = collections.defaultdict(list)
    patched = []

    def replace(owner, name, function):
        patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def recording(name):
        original = getattr(torch.Tensor, name)

        def draw(tensor, *arguments, **options):
            result = original(tensor, *arguments, **options)
            drawn[name].append(result.detach().numpy().copy())
            return result

        replace(torch.Tensor, name, draw)

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training:
            return x
        keep = torch.rand_like(x) >= p
        drawn["keep"].append(keep.numpy().copy())
        return x * keep / (1 - p)

    recording("exponential_")
    recording("normal_")
    replace(torch.nn.functional, "dropout", dropout)
    try:
        yield drawn
    finally:
        for owner, name, function in patched:
            setattr(owner, name, function)


def noise_arrays(drawn: Mapping[str, list]) -> dict[str, np.ndarray]:
    """Returns Gumbel noise [batch, rows, columns, vocab], slot noise, dropout masks."""
    relaxed, hard = (
        -np.log(e + np.finfo(np.float32).tiny).transpose(0, 2, 3, 1)
        for e in drawn["exponential_"]
    )
    (slots,) = drawn["normal_"]
    masks = [np.packbits(keep) for keep in drawn["keep"]]
    shapes = np.array([(1,) * (4 - k.ndim) + k.shape for k in drawn["keep"]])
    return {
        "relaxed": relaxed,
        "hard": hard,
        "slots": slots,
        **({"keep": np.concatenate(masks), "keep_shapes": shapes} if masks else {}),
    }


def passes(model: Any) -> dict[str, np.ndarray]:
    """Records the evaluation pass and the autoregressive reconstruction."""
    import torch  # pyright: ignore[reportMissingImports]

    model.eval()
    seen = {}
    hooks = [
        model.slot_attn.register_forward_hook(
            lambda module, inputs, output: seen.update(slots=output)
        ),
        model.dvae.decoder.register_forward_pre_hook(
            lambda module, inputs: seen.update(decoded=inputs[0])
        ),
    ]
    image = draw_images(0)
    result = {"image": to_ours(image)}
    with torch.no_grad():
        with recorded_noise() as drawn:
            recon, cross_entropy, mse, _ = model(image, TEMPERATURE, False)
        slots, attention = seen["slots"]
        result |= {f"noise/{k}": v for k, v in noise_arrays(drawn).items()}
        result |= {
            "reconstruction": to_ours(recon),
            "cross_entropy": cross_entropy.numpy(),
            "mse": mse.numpy(),
            "slots": slots.numpy(),
            "attention": attention.transpose(1, 2).numpy(),
        }
        with recorded_noise() as drawn:
            recon = model.reconstruct_autoregressive(image)
        slots, attention = seen["slots"]
        result |= {
            "generated/noise/slots": drawn["normal_"][0],
            "generated/slots": slots.numpy(),
            "generated/attention": attention.transpose(1, 2).numpy(),
            "generated/tokens": seen["decoded"].argmax(1).numpy(),
            "generated/image": to_ours(recon),
        }
    for hook in hooks:
        hook.remove()
    return result


def to_ours(image: Any) -> np.ndarray:
    """Returns images with their channels last."""
    return image.permute(0, 2, 3, 1).contiguous().numpy()


def training(model: Any) -> dict[str, np.ndarray]:
    """Records steps of the official recipe: loss, ∞-norm clipping, two Adam groups."""
    import torch  # pyright: ignore[reportMissingImports]

    model.train()
    groups = {"dvae": [], "main": []}
    for name, parameter in tensors(model).items():
        groups["dvae" if "dvae" in name else "main"].append(parameter)
    optimizer = torch.optim.Adam(
        [{"params": groups[group], "lr": RATES[group]} for group in groups]
    )
    before = {n: p.detach().clone() for n, p in tensors(model).items()}
    result = collections.defaultdict(list)
    for step in range(STEPS):
        optimizer.param_groups[1]["lr"] = RATES["main"] * min(1, (step + 1) / WARMUP)
        # The second batch is all but one colour: another gradient norm, which Adam
        # sees only through the clipping.
        image = draw_images(step + 1) * (1.0 if step == 0 else 0.1)
        optimizer.zero_grad()
        with recorded_noise() as drawn:
            _, cross_entropy, mse, _ = model(image, TEMPERATURE, False)
        (mse + cross_entropy).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, math.inf)
        optimizer.step()
        print(f"  step {step}: mse {mse:.4f}, ∞-norm {norm:.4f} before clipping")
        values = {
            "image": to_ours(image),
            "mse": mse.detach().numpy(),
            "cross_entropy": cross_entropy.detach().numpy(),
            "norm": norm.numpy(),
            **{f"noise/{k}": v for k, v in noise_arrays(drawn).items()},
        }
        now = tensors(model)
        change = {n: now[n].detach().double() - before[n].double() for n in now}
        values["gradients"] = summaries({n: p.grad for n, p in now.items()})
        values["changes"] = summaries(change)
        for key, value in values.items():
            result[f"training/{key}"].append(value)
    return {key: np.stack(values) for key, values in result.items()}


def summaries(named: Mapping[str, Any]) -> np.ndarray:
    """Returns each tensor's norm and sampled entries, by name, one after another."""
    found = []
    for name in sorted(named):
        flat = np.asarray(named[name], np.float64).reshape(-1)
        found += [[np.linalg.norm(flat)], flat[sampled(name, flat.size)]]
    return np.concatenate(found).astype(np.float32)


def moments(values: np.ndarray) -> np.ndarray:
    """Returns count, mean, standard deviation, minimum, maximum and kurtosis."""
    values = np.asarray(values, np.float64).reshape(-1)
    mean, std = values.mean(), values.std()
    kurtosis = ((values - mean) ** 4).mean() / std**4 if std > 0 else 0
    return np.array([values.size, mean, std, values.min(), values.max(), kurtosis])


def initial_statistics() -> dict[str, np.ndarray]:
    """Returns `moments` of each tensor over several official initialisations."""
    found = collections.defaultdict(list)
    for seed in range(SEEDS):
        model = official_model(slot_heads=1, seed=seed, size=INITIAL_SIZE)
        for name, parameter in tensors(model).items():
            found[name].append(parameter.detach().numpy())
    names = sorted(found)
    return {
        "names": np.array(names),
        "moments": np.stack([moments(np.stack(found[name])) for name in names]),
    }


def adam_probe() -> np.ndarray:
    """Returns parameters that begin at zero after steps of constant tiny gradients."""
    import torch  # pyright: ignore[reportMissingImports]

    parameters = torch.zeros(len(ADAM_PROBE), requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=RATES["dvae"])
    trace = []
    for step in range(3):
        parameters.grad = torch.tensor(ADAM_PROBE) * (step + 1)
        optimizer.step()
        trace.append(parameters.detach().numpy().copy())
    return np.stack(trace)


def write_torch_file(path: pathlib.Path) -> None:
    """Writes a file like the official checkpoint, with every kind of tensor in it."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(12.0)
    checkpoint = {
        "epoch": 3,
        "best_val_loss": math.inf,
        "model": layer.state_dict()
        | {
            "plain": base.reshape(3, 4),
            "transposed": base.reshape(3, 4).T,
            "offset": base[5:9],
            "strided": base[1::3],
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.full((2, 2), 0.5)),
            "bfloat16": torch.tensor([1 + 2**-7, -2.5, 2.0**100]).bfloat16(),
            "half": torch.tensor([1.0, -2.5]).half(),
            "double": torch.tensor([1 / 3], dtype=torch.float64),
            "long": torch.tensor([2**40]),
            "mask": torch.triu(torch.ones(3, 3, dtype=torch.bool), 1),
        },
        "optimizer": optimizer.state_dict(),
        "stagnation_counter": 0,
        "lr_decay_factor": 1.0,
    }
    torch.save(checkpoint, path)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
