"""`--mode=predict`: a trained model on a user's own images, and a page on them."""

import pathlib
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from implicit_slots.data.readers.files import readable
from implicit_slots.data.readers.pictures import read_image
from implicit_slots.data.source import DataError
from implicit_slots.evaluation import prediction
from implicit_slots.evaluation.prediction import Prediction
from implicit_slots.report.predictions import (
    SHOWN,
    Shown,
    picture,
    write_predictions,
)
from implicit_slots.runtime import progress
from implicit_slots.runtime.compiling import standard_arithmetic
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import find_devices
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand
from implicit_slots.training.checks import check_starts
from implicit_slots.training.pretrained import load

# Seconds between two lines, where there is no bar.
INTERVAL = 10


def run(
    workdir: str | pathlib.Path,
    paths: Iterable[str],
    out: str | pathlib.Path,
    *,
    changes: Mapping[str, Any] | None = None,
    command: str = "",
) -> pathlib.Path:
    """Writes masks, overlays, arrays and a page of images.

    Args:
      workdir: as `load` takes it.
      paths: see `prediction.find_images`.
      out: the folder that is written to; it must hold nothing yet.
      changes: see `load`.
      command: that makes the same again, for the page.

    Returns:
      The path of the page.

    Raises:
      UserError: the model cannot be loaded or does not allow the changes, there is no
        image that can be read, or `out` holds something or cannot be written.
    """
    out = expand(out)
    was_there = out.exists()
    if was_there and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there and holds something; choose another --out")
    images = prediction.find_images(paths)
    find_devices()
    config, model = load(workdir, changes=changes)
    if config.model.num_slots > prediction.UNSEEN:
        raise UserError(f"masks are written for at most {prediction.UNSEEN} slots")
    if prediction.starts_of(config) > 1:
        check_starts(config, "--starts")
    shown: list[Shown] = []
    left_out: list[str] = []
    done = 0

    def leave_out(_: str, error: DataError) -> None:
        left_out.append(readable(str(error)))
        bar.write(f"left out: {left_out[-1]}", file=sys.stderr)
        bar.update()

    last = 0.0  # when a line was shown; compiling counts for nothing
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (
            standard_arithmetic(),
            progress.bar(None, total=len(images), unit="image") as bar,
        ):
            for name, made in prediction.predict(model, config, images, leave_out):
                try:
                    whole = read_image(images[name])
                except DataError as error:
                    leave_out(name, error)
                    continue
                box = prediction.box_of(config, whole)
                overlay = prediction.write(made, whole, box, out / name)
                done += 1
                if len(shown) < SHOWN:
                    shown.append(Shown(name, _pictures(whole, overlay, made)))
                bar.update()
                last = last or time.monotonic()
                if bar.disable and time.monotonic() > last + INTERVAL:
                    last = time.monotonic()
                    print(f"{done:,} of {len(images):,} images", flush=True)
        if not done:
            if not was_there:
                out.rmdir()
            raise UserError(f"none of the images can be read: {left_out[0]}")
        return write_predictions(
            out,
            shown,
            heading=f"What {workdir} makes of {done:,} image{'s' * (done > 1)}",
            note=_note(config),
            command=command,
            left_out=left_out,
            more=done - len(shown),
        )
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error


def _pictures(
    whole: Image.Image, overlay: Image.Image, made: Prediction
) -> dict[str, str]:
    """What the page shows of an image."""
    found = {"image": picture(whole), "masks over it": picture(overlay)}
    if made.reconstruction is not None:
        levels = np.rint(255 * np.clip(made.reconstruction, 0, 1)).astype(np.uint8)
        found["rendered from the slots"] = picture(Image.fromarray(levels))
    return found


def _note(config: Config) -> str:
    """A sentence on the model."""
    model, side = config.model, config.data.resolution
    starts = prediction.starts_of(config)
    best = f" from the best of {starts} initial slots" if starts > 1 else ""
    return (
        f"The model ({model.name}) has {model.num_slots} slots, takes at most "
        f"{model.solver.max_steps} iterations{best}, and sees {side}x{side} pixels."
    )
