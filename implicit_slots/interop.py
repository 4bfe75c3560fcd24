r"""Official SLATE's weights in our model, and back.

    python -m implicit_slots.interop --source=best_model.pt --target=runs/official \
        --config=configs/clevr.py                               # a run to go on with
    python -m implicit_slots.interop --source=runs/official --target=model.pt
    python -m implicit_slots.interop --source=checkpoint.pt.tar --target=model.npz

Reads and writes the state dictionary of the PyTorch code that Singh, Deng, Ahn 2022
published (singhgautam/slate on GitHub), as `.pt`, for which PyTorch is needed (pip
install 'implicit_slots[torch]'), as `.safetensors` or as NumPy's `.npz`.

Weights do not say everything: the numbers of slots, of heads (the decoder's and the
slots') and of iterations leave no trace in them, and have to be set in the
configuration as they were trained with.
"""

import contextlib
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand, write_json
from implicit_slots.runtime.flags import parse, refuse_rest
from implicit_slots.runtime.weights import SUFFIXES, read_weights, write_weights
from implicit_slots.runtime.workdir import CONFIG_FILE, absolute

MASK = "self_attn_mask"
CHANNELS, STRIDE = 3, 4
DVAE_FEATURES = 64  # the official dVAE has no argument for its hidden width


class Layout(NamedTuple):
    """How one tensor is turned on its way.

    Attributes:
      ours: from the official layout.
      official: from ours.
    """

    ours: Callable[[np.ndarray], np.ndarray]
    official: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda w: w, lambda w: w)
TRANSPOSED = Layout(np.transpose, np.transpose)
LEADING_ONE = Layout(lambda w: w[0], lambda w: w[None])
# Convolutions: [out, in, rows, columns] there, [rows, columns, in, out] here, and a
# dense layer on the pixel or on the flattened patch.
SPATIAL = Layout(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
POINTWISE = Layout(lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])
PATCHES = Layout(
    lambda w: SPATIAL.ours(w).reshape(-1, w.shape[0]),
    lambda w: SPATIAL.official(w.reshape(STRIDE, STRIDE, CHANNELS, w.shape[-1])),
)

# What a layer consists of: our name, the official one, the layout.
KERNEL = (("kernel", "weight", TRANSPOSED),)
BIAS = (("bias", "bias", SAME),)
DENSE = KERNEL + BIAS
POINTWISE_DENSE = (("kernel", "weight", POINTWISE), *BIAS)
NORM = (("scale", "weight", SAME), *BIAS)
GAUSSIAN = (("slot_mean", "slot_mu", SAME), ("slot_log_scale", "slot_log_sigma", SAME))
GROUP_NORM = (("norm.scale", "weight", SAME), ("norm.bias", "bias", SAME))
PATCH_BLOCK, POINTWISE_BLOCK, SPATIAL_BLOCK = (
    (("convolution.kernel", "m.weight", layout), *GROUP_NORM)
    for layout in (PATCHES, POINTWISE, SPATIAL)
)
ATTENTION = tuple(
    (f"project_{name}.kernel", f"proj_{name}.weight", TRANSPOSED) for name in "qkvo"
)
MLP = tuple(
    (f"{ours}.{leaf}", f"{official}.{name}", layout)
    for ours, official in (("enter", "0"), ("leave", "2"))
    for leaf, name, layout in DENSE
)
GRU = tuple(
    (f"{ours}.{leaf}", f"{name}_{official}", layout)
    for ours, official in (("input", "ih"), ("recurrent", "hh"))
    for leaf, name, layout in DENSE
)

MODEL = (
    ("dvae.encoder.layers.0", "dvae.encoder.0", PATCH_BLOCK),
    *(
        (f"dvae.encoder.layers.{i}", f"dvae.encoder.{i}", POINTWISE_BLOCK)
        for i in range(1, 7)
    ),
    ("dvae.encoder.layers.7", "dvae.encoder.7", POINTWISE_DENSE),
    *(
        (f"dvae.decoder.layers.{i}", f"dvae.decoder.{i}", block)
        for i, block in enumerate(
            # None: the pixel shuffles.
            (POINTWISE_BLOCK, *2 * (SPATIAL_BLOCK, *3 * (POINTWISE_BLOCK,), None))
        )
        if block
    ),
    ("dvae.decoder.layers.11", "dvae.decoder.11", POINTWISE_DENSE),
    ("", "", (("positions", "positional_encoder.pe", LEADING_ONE),)),
    ("embedding", "dictionary.dictionary", (("embedding", "weight", SAME),)),
    ("encoder_norm", "slot_attn.layer_norm", NORM),
    ("encoder_mlp", "slot_attn.mlp", MLP),
    ("slot_attention", "slot_attn", GAUSSIAN),
    ("slot_attention.norm_inputs", "slot_attn.slot_attention.norm_inputs", NORM),
    ("slot_attention.step.project_k", "slot_attn.slot_attention.project_k", KERNEL),
    ("slot_attention.step.project_v", "slot_attn.slot_attention.project_v", KERNEL),
    ("slot_attention.step.norm_slots", "slot_attn.slot_attention.norm_slots", NORM),
    ("slot_attention.step.project_q", "slot_attn.slot_attention.project_q", KERNEL),
    ("slot_attention.step.gru", "slot_attn.slot_attention.gru", GRU),
    ("slot_attention.step.norm_mlp", "slot_attn.slot_attention.norm_mlp", NORM),
    ("slot_attention.step.mlp", "slot_attn.slot_attention.mlp", MLP),
    ("slot_projection", "slot_proj", KERNEL),
    ("decoder.norm", "tf_dec.layer_norm", NORM),
    ("out", "out", KERNEL),
)
BLOCK = (
    ("norm_self", "self_attn_layer_norm", NORM),
    ("self_attention", "self_attn", ATTENTION),
    ("norm_cross", "encoder_decoder_attn_layer_norm", NORM),
    ("cross_attention", "encoder_decoder_attn", ATTENTION),
    ("norm_mlp", "ffn_layer_norm", NORM),
    ("mlp", "ffn", MLP),
)


class Pair(NamedTuple):
    """One tensor: its path in our tree, its official name, its layout."""

    ours: tuple[str | int, ...]
    official: str
    layout: Layout


def pairs(num_blocks: int) -> Iterator[Pair]:
    """Yields every tensor of a model; masks are not among them."""
    blocks = (
        (f"decoder.blocks.{i}.{ours}", f"tf_dec.blocks.{i}.{official}", leaves)
        for i in range(num_blocks)
        for ours, official, leaves in BLOCK
    )
    for ours, official, leaves in (*MODEL, *blocks):
        for leaf, name, layout in leaves:
            path = f"{ours}.{leaf}".strip(".").split(".")
            yield Pair(
                tuple(int(part) if part.isdigit() else part for part in path),
                f"{official}.{name}".strip("."),
                layout,
            )


def to_official(params: dict) -> dict[str, np.ndarray]:
    """Returns our parameters as the official state dictionary.

    Args:
      params: nested dictionary of arrays, as `training.state.split_model` gives it.

    Raises:
      UserError: if the official code has no such model.
    """
    turned = _turned(params)
    official = {name: np.ascontiguousarray(value) for name, value in turned.items()}
    tokens = official["positional_encoder.pe"].shape[1] - 1
    for block in range(len(params["decoder"]["blocks"])):
        # The official code stores the causal mask as a parameter of each block.
        mask = np.triu(np.ones((tokens, tokens), bool), k=1)
        official[f"tf_dec.blocks.{block}.{MASK}"] = mask
    return official


def from_official(weights: Mapping[str, np.ndarray], params: dict) -> dict:
    """Returns our parameters with the values of an official state dictionary.

    Args:
      weights: the state dictionary; its causal masks are not read.
      params: nested dictionary of arrays, or of their shapes and dtypes, whose
        structure is to be filled.

    Raises:
      UserError: if the weights are of another model, saying which key to set where
        a key explains it, and naming the tensors otherwise.
    """
    shapes = _shapes(params)
    unmasked = {n: w for n, w in weights.items() if not n.endswith(f".{MASK}")}
    _check(unmasked, shapes)
    filled: dict = {}
    for pair in pairs(len(params["decoder"]["blocks"])):
        value = pair.layout.ours(np.asarray(weights[pair.official]))
        dtype = _leaf(params, pair.ours).dtype
        *parents, last = pair.ours
        node = filled
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = np.array(value, dtype, order="C")
    return filled


def _turned(params: dict) -> dict[str, np.ndarray]:
    """Every tensor in its official layout, without the masks."""
    for what, there in (
        ('initial_slots must be "gaussian"', "slot_mean" in params["slot_attention"]),
        ('inputs must be "tokens"', "image_encoder" not in params),
        ('tokenizer must be "dvae"', "codes" not in params["dvae"]),
        ('decoder_order must be "raster"', "target_positions" not in params),
    ):
        if not there:
            raise UserError(
                f"official SLATE has no place for this model: config.model.{what}"
            )
    features = params["dvae"]["encoder"]["layers"][0]["norm"]["scale"].shape[0]
    if features != DVAE_FEATURES:
        raise UserError(
            f"official SLATE's dVAE has {DVAE_FEATURES} features, this model's has "
            f"{features}: set config.model.dvae_features={DVAE_FEATURES}"
        )
    return {
        pair.official: pair.layout.official(np.asarray(_leaf(params, pair.ours)))
        for pair in pairs(len(params["decoder"]["blocks"]))
    }


def _leaf(params: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        params = params[key]
    return params


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """The official shape of every tensor, masks left out."""
    import jax

    zero = np.float32(0)
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(zero, leaf.shape), params)
    return {name: value.shape for name, value in _turned(hollow).items()}


def _check(
    weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses weights of another model."""
    found = {name: np.shape(value) for name, value in weights.items()}
    if found.keys() & shapes.keys():
        theirs, ours = _sizes(found), _sizes(shapes)
        differ = [key for key in ours if theirs.get(key, ours[key]) != ours[key]]
        if differ:
            keys = ", ".join(
                f"config.{key}={theirs[key]} (it is {ours[key]})" for key in differ
            )
            raise UserError(f"the weights are of a model of another size: set {keys}")
    wrong = {
        "lack": [n for n in shapes if n not in found],
        "have no place in the model for": [n for n in found if n not in shapes],
        "have another shape of": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in shapes.items()
            if found.get(name, shape) != shape
        ],
        "are not floating-point numbers in": [
            name
            for name, value in weights.items()
            if not np.issubdtype(np.asarray(value).dtype, np.floating)
        ],
    }
    for what, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"the weights {what} {', '.join(names[:3])}{more}")


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The configuration's keys that shapes tell, as far as they do."""
    start = "tf_dec.blocks."
    blocks = {name.split(".")[2] for name in shapes if name.startswith(start)}
    sizes = {"model.num_blocks": len(blocks)}
    for key, name, axis in (
        ("model.vocab_size", "out.weight", 0),
        ("model.width", "out.weight", 1),
        ("model.slot_size", "slot_attn.slot_mu", 2),
        ("model.slot_mlp_size", "slot_attn.slot_attention.mlp.0.weight", 0),
        ("data.resolution", "positional_encoder.pe", 1),
    ):
        if len(shapes.get(name, ())) > axis:
            sizes[key] = shapes[name][axis]
    if "data.resolution" in sizes:
        tokens = sizes.pop("data.resolution") - 1  # the first position is BOS's
        side = math.isqrt(max(tokens, 0))
        if side**2 == tokens:
            sizes["data.resolution"] = STRIDE * side
    return sizes


def convert(
    source: pathlib.Path, target: pathlib.Path, config: Config | None = None
) -> None:
    """Writes the weights of `source` to `target`, which must not exist.

    Args:
      source: a run's workdir, whose newest checkpoint is taken, or a file that
        `runtime.weights.read_weights` reads.
      target: a file of official weights that ends in one of `SUFFIXES`; with a
        configuration, a workdir with a checkpoint at step 0 and a fresh optimiser.
      config: of the workdir.

    Raises:
      UserError: in one sentence; nothing was written.
    """
    # A command line's --help needs no JAX.
    from implicit_slots.models.build import split_model
    from implicit_slots.runtime import compiling, devices
    from implicit_slots.training import checkpoint

    if target.exists():
        raise UserError(f"{target} exists; choose another --target")
    to_file = target.suffix in SUFFIXES
    if to_file == (config is not None):
        raise UserError(
            f"--config does not go with the file {target}"
            if to_file
            else f"{target} does not end in {' or '.join(SUFFIXES)}; to write a "
            "workdir, say with which --config"
        )
    devices.find_devices()
    try:
        if source.is_dir():
            weights = to_official(split_model(checkpoint.load(source)[1])[1])
        else:
            weights = read_weights(source)
        if config is None:
            return write_weights(target, weights)
        with compiling.standard_arithmetic():
            _write_run(target, weights, config)
    except OSError as error:
        raise UserError(str(error)) from error


def _write_run(
    workdir: pathlib.Path, weights: Mapping[str, np.ndarray], config: Config
) -> None:
    """Makes a workdir that a run goes on with; removes it where that fails."""
    import jax
    from flax import nnx

    from implicit_slots.models.build import build, split_model
    from implicit_slots.training.checkpoint import CHECKPOINT_FOLDER, Checkpoints
    from implicit_slots.training.checks import check
    from implicit_slots.training.optimizer import build_optimizer
    from implicit_slots.training.state import initial_state

    check(config, "train")
    _, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    optimizer = build_optimizer(config.optimizer, shapes, num_steps=config.num_steps)
    params = jax.tree.map(jax.numpy.asarray, from_official(weights, shapes))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        folder = workdir / CHECKPOINT_FOLDER
        with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
            checkpoints.save(initial_state(params, optimizer, config.optimizer))
        # Last: a workdir without it is refused, not trained from the beginning.
        write_json(workdir / CONFIG_FILE, json.loads(absolute(config).to_json()))
    except BaseException:
        shutil.rmtree(workdir, ignore_errors=True)
        raise


def main(argv: list[str]) -> None:
    """Converts what the flags say; exits with 1 on what the user can put right."""
    logging.set_verbosity(logging.WARNING)
    refuse_rest(argv)
    given = flags.FLAGS
    try:
        convert(expand(given.source), expand(given.target), given.config)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {expand(given.target)}")


def _define_flags() -> None:
    of_source = "A run's workdir, or a .pt, .safetensors or .npz file of its weights."
    flags.DEFINE_string("source", None, of_source)
    of_target = (
        "A .pt, .safetensors or .npz file, or with --config a workdir, to write."
    )
    flags.DEFINE_string("target", None, of_target)
    config_flags.DEFINE_config_file(
        "config", None, "Configuration of the workdir to write.", lock_config=True
    )
    flags.mark_flags_as_required(["source", "target"])


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse)
