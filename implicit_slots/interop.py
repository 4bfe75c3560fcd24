r"""Official SLATE's weights in our model, and back; our models as folders.

    python -m implicit_slots.interop --source=best_model.pt --target=runs/official \
        --config=configs/clevr.py                               # a run to go on with
    python -m implicit_slots.interop --source=runs/official --target=model.pt
    python -m implicit_slots.interop --source=checkpoint.pt.tar --target=model.npz

and any model of ours as one folder that goes where a run does not (`load` takes it):

    python -m implicit_slots.interop --source=runs/scenes --target=my_model
    python -m implicit_slots.interop --source=my_model --target=runs/more \
        --config=configs/scenes.py                              # a run to go on with

Reads and writes the state dictionary of the PyTorch code that Singh, Deng, Ahn 2022
published (singhgautam/slate on GitHub), as `.pt`, for which PyTorch is needed (pip
install 'implicit_slots[torch]'), as `.safetensors` or as NumPy's `.npz`. Where PyTorch
is not to be installed, two lines where it is make one of the others:

    import numpy, torch
    numpy.savez("best_model.npz", **torch.load("best_model.pt", weights_only=True))

A run is also made of a model within others (DataParallel's `module.`, torch.compile's
`_orig_mod.`, a Lightning module's `model.`). From file to file names stay as they are.

Weights do not say everything: the numbers of slots, of heads (the decoder's and the
slots') and of iterations leave no trace in them, and have to be set in the
configuration as they were trained with.
"""

import contextlib
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from implicit_slots.models.official import from_official, to_official
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand, write_json
from implicit_slots.runtime.flags import parse, refuse_rest
from implicit_slots.runtime.weights import SUFFIXES, read_weights, write_weights
from implicit_slots.runtime.workdir import CONFIG_FILE, absolute, find_trained


def convert(
    source: pathlib.Path, target: pathlib.Path, config: Config | None = None
) -> None:
    """Writes the weights of `source` to `target`, which must not exist.

    Args:
      source: a run's workdir, whose newest checkpoint is taken, a folder that
        `save_pretrained` wrote, or a file that `runtime.weights.read_weights` reads.
      target: a file of official weights that ends in one of `SUFFIXES`; with a
        configuration, a workdir with a checkpoint at step 0 and a fresh optimiser;
        else a folder as `save_pretrained` writes it.
      config: of the workdir.

    Raises:
      UserError: in one sentence; nothing was written.
    """
    # A command line's --help needs no JAX.
    from implicit_slots.models.build import split_model
    from implicit_slots.runtime import compiling, devices
    from implicit_slots.training import pretrained

    if target.exists():
        raise UserError(f"{target} exists; choose another --target")
    to_file = target.suffix in SUFFIXES
    if to_file and config is not None:
        raise UserError(f"--config does not go with the file {target}")
    if not to_file and config is None and not source.is_dir():
        raise UserError(
            f"{target} does not end in {' or '.join(SUFFIXES)}; to write a workdir, "
            "say with which --config"
        )
    devices.find_devices()
    try:
        if not to_file and config is None:
            return pretrained.export(source, target)
        if source.is_dir():
            params = split_model(pretrained.load(source)[1])[1]
            if config is None:
                return write_weights(target, to_official(params))
            fill = partial(pretrained.fill, dict(pretrained.named(params)), source)
        else:
            weights = read_weights(source)
            if config is None:
                return write_weights(target, weights)
            fill = partial(from_official, weights)
        with compiling.standard_arithmetic():
            _write_run(target, config, fill)
    except OSError as error:
        raise UserError(str(error)) from error


def _write_run(
    workdir: pathlib.Path, config: Config, fill: Callable[[Any], Any]
) -> None:
    """Makes a workdir that a run goes on with; removes it where that fails.

    Args:
      workdir: of the run.
      config: of the run.
      fill: from the shapes of the parameters to the parameters.
    """
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
    params = jax.tree.map(jax.numpy.asarray, fill(shapes))
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
        source = find_trained(given.source)
        convert(source, expand(given.target), given.config)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {expand(given.target)}")


def _define_flags() -> None:
    of_source = (
        "A run's workdir, the folder or name of a trained model, or a .pt, "
        ".safetensors or .npz file of its weights."
    )
    flags.DEFINE_string("source", None, of_source)
    of_target = (
        "A .pt, .safetensors or .npz file to write; with --config a workdir, else a "
        "folder that holds the model."
    )
    flags.DEFINE_string("target", None, of_target)
    config_flags.DEFINE_config_file(
        "config", None, "Configuration of the workdir to write.", lock_config=True
    )
    flags.mark_flags_as_required(["source", "target"])


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse)
