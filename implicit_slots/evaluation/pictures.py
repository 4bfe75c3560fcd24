"""The pictures of an evaluation: the same images and seeds each time."""

import math
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from implicit_slots.drawing import figures, grids
from implicit_slots.evaluation.catalogue import describe
from implicit_slots.evaluation.findings import Findings, Subject
from implicit_slots.evaluation.groups import groups_of
from implicit_slots.evaluation.metrics import fixed_points, iou
from implicit_slots.evaluation.metrics.average_precision import (
    THRESHOLDS,
    PrecisionRecall,
)
from implicit_slots.evaluation.metrics.segmentation import upsample
from implicit_slots.models.build import model_class
from implicit_slots.models.images import as_float, seen
from implicit_slots.runtime.workdir import writing

# Iterations that a traversal shows, where they were made.
SHOWN = (1, 2, 3, 5, 8, 20, 50, 100)
ROWS = 6

Pictures = list[dict[str, str]]


def draw(subject: Subject, findings: Findings, folder: pathlib.Path) -> Pictures:
    """Draws everything into a folder; returns what the report says of each picture."""
    pictures = draw_reconstructions(subject, findings, folder)
    pictures += draw_attention(subject, folder)
    draw_curves(findings, folder)
    if (curves := findings.shown.get("properties")) is not None:
        pictures += draw_precision(curves, folder)
    if (shown := findings.shown.get("deletion")) is not None:
        renders, batch = shown
        pictures += draw_deletions(renders, batch["image"], folder)
    if "rendering" in findings.shown:
        pictures += draw_compositions(subject, folder)
    trajectory = findings.shown["fixed_points"]
    image = subject.source.batch(np.arange(len(trajectory.residual)))["image"]
    return pictures + draw_iterations(trajectory, image, folder)


def draw_reconstructions(
    subject: Subject, findings: Findings, folder: pathlib.Path
) -> Pictures:
    """The first images, and those of the best and worst masks (or renders)."""
    pictures = []
    rows = np.arange(min(ROWS, len(subject.source)))
    for name, title, caption in (
        ("attention", "Attention masks", "Masks and columns: slot attention's."),
        ("decoder", "Decoder masks", "Masks and columns: what the decoder reads."),
    )[: 2 if hasattr(model_class(subject.config.model.name), "read") else 1]:
        picture = _grid(subject, rows, name)
        pictures.append(_save(folder, f"{name}_masks", picture, title, caption))
    for metric, better in (("attention/fg_ari", 1), ("slots/mse", -1)):
        values = findings.images.get(metric)
        if values is None or np.isnan(values).all():
            continue
        order = np.argsort(better * np.where(np.isnan(values), np.nan, values))
        order = order[: np.sum(~np.isnan(values))]
        for name, chosen in (
            ("best", order[::-1][: ROWS // 2]),
            ("worst", order[: ROWS // 2]),
        ):
            told = ", ".join(_told(findings, metric, i) for i in chosen.tolist())
            pictures.append(
                _save(
                    folder,
                    name,
                    _grid(subject, chosen, "attention"),
                    f"{name.capitalize()} examples",
                    f"By {metric}: {told}.",
                )
            )
        break
    return pictures


def draw_attention(subject: Subject, folder: pathlib.Path) -> Pictures:
    """Heat maps of slot attention, and laid over the image; for papers too."""
    batch = subject.source.batch(np.arange(min(2, len(subject.source))))
    encoded = subject.steps.encode(subject.params, seen(batch), 0)
    image = np.asarray(as_float(jnp.asarray(batch["image"])))
    maps = np.asarray(upsample(encoded.attention, *image.shape[1:3]))
    figure = figures.attention_figure(image, maps)
    _save_figure(figure, folder / "attention_maps")
    caption = "Slot attention's shares; attention_maps.pdf and .svg are the same."
    title = "Attention as heat maps"
    return [{"file": "attention_maps.png", "title": title, "caption": caption}]


def draw_curves(findings: Findings, folder: pathlib.Path) -> None:
    """The curves of the report for papers: curves.png, .pdf and .svg."""
    named = ("residual", "mask_flips", "spill_share", "counterfactual_error")
    curves = [findings.curves[name] for name in named if name in findings.curves]
    _save_figure(figures.curve_figure(curves), folder / "curves")


def draw_precision(
    curves: Mapping[str, PrecisionRecall], folder: pathlib.Path
) -> Pictures:
    """Precision over recall, a line for each distance; for papers too."""
    lines = {
        "any distance" if math.isinf(limit) else f"within {limit:g}": curves[name]
        for name, limit in THRESHOLDS.items()
    }
    figure = figures.precision_figure(lines)
    _save_figure(figure, folder / "precision_recall")
    caption = (
        "Of predicted objects, all images together, the most confident first; a line "
        "for each distance within which a position counts as right."
    )
    title = "Precision by recall"
    return [{"file": "precision_recall.png", "title": title, "caption": caption}]


def draw_deletions(
    renders: np.ndarray, image: np.ndarray, folder: pathlib.Path
) -> Pictures:
    """A strip per image: with all slots, then one fewer each time."""
    states = len(renders)
    count = min(ROWS, renders.shape[1])
    images = np.asarray(as_float(jnp.asarray(image)))
    tiles, captions = [], []
    for row in range(count):
        tiles += [images[row], *renders[:, row]]
        captions += ["image", *(f"{states - i} slots" for i in range(states - 1))]
        captions.append("1 slot")
    sheet = np.stack(tiles).astype(np.float32)
    picture = grids.contact_sheet(sheet, columns=states + 1, captions=captions)
    _save_for_papers(sheet, captions[: states + 1], folder / "deletion_strips")
    return [
        _save(
            folder,
            "deletion",
            picture,
            "Slots deleted one at a time",
            "Rendered from the slots that are left, in one random order.",
        )
    ]


def draw_iterations(
    trajectory: fixed_points.Trajectory, image: np.ndarray, folder: pathlib.Path
) -> Pictures:
    """The masks of an image at some iterations."""
    steps, _, slots, inputs = trajectory.attention.shape
    side = round(inputs**0.5)
    shown = [step for step in SHOWN if step <= steps]
    count = min(ROWS // 2, len(image))
    tiles, winners, captions = [], [], []
    for row in range(count):
        maps = trajectory.attention[np.array(shown) - 1, row]
        maps = jnp.asarray(maps).reshape(len(shown), slots, side, side)
        won = np.asarray(upsample(maps, *image.shape[1:3]).argmax(axis=1)) + 1
        tiles += [image[row]] * len(shown)
        winners += list(won)
        captions += [f"iteration {step}" for step in shown]
    picture = grids.contact_sheet(
        np.stack(tiles), np.stack(winners), columns=len(shown), captions=captions
    )
    colours = grids.slot_colours(slots)[np.stack(winners) - 1]
    _save_for_papers(
        colours / 255, captions[: len(shown)], folder / "masks_by_iteration"
    )
    return [
        _save(
            folder,
            "iterations",
            picture,
            "Masks by iteration",
            "The winning slot at each pixel; a slot keeps its colour in a row.",
        )
    ]


def draw_compositions(subject: Subject, folder: pathlib.Path) -> Pictures:
    """All slots of one image and one object's slot of the next, rendered together."""
    count = min(ROWS // 2 * 2, len(subject.source) // 2 * 2)
    if count < 2:
        return []
    batch = subject.source.batch(np.arange(count))
    encoded = subject.steps.encode(subject.params, seen(batch), 0)
    present = jnp.ones(encoded.slots.shape[:2], bool)
    forced = subject.steps.read(subject.params, encoded.tokens, encoded.slots, present)
    weights = upsample(forced.attention, *batch["image"].shape[1:3])
    weights = weights.reshape(*weights.shape[:2], -1)
    if "segmentation" in batch:
        true = jnp.asarray(batch["segmentation"])
        objects = iou.one_hot_objects(true, subject.config.data.max_objects)
        counted = iou.drop_ignored(weights, true)
        best = iou.intersection_over_union(objects, counted).max(axis=1)
        taken = best.argmax(axis=1)
    else:
        # The largest is likely the ground.
        taken = jnp.argsort(weights.sum(axis=2), axis=1)[:, -min(2, present.shape[1])]
    first, second = np.arange(0, count, 2), np.arange(1, count, 2)
    added = encoded.slots[second, taken[second]][:, None]
    slots = jnp.concatenate([encoded.slots[first], added], axis=1)
    rendered = subject.steps.render(
        subject.params, slots, jnp.ones(slots.shape[:2], bool)
    )
    alone = subject.steps.render(subject.params, encoded.slots[first], present[first])
    image = np.asarray(as_float(jnp.asarray(batch["image"])))
    mask = (weights.argmax(axis=1) == taken[:, None]).reshape(image.shape[:3])
    other = np.where(np.asarray(mask)[..., None], image, 0.25 * image + 0.75)
    tiles, captions = [], []
    for row in range(len(first)):
        tiles += [image[first[row]], alone[row], other[second[row]], rendered[row]]
        captions += ["image A", "A rendered", "slot of B", "A and that slot"]
    sheet = np.stack([np.asarray(tile, np.float32) for tile in tiles])
    picture = grids.contact_sheet(sheet, columns=4, captions=captions)
    _save_for_papers(sheet, captions[:4], folder / "compositions")
    return [
        _save(
            folder,
            "composition",
            picture,
            "Composition",
            "The slots of A and one of B (where B is not pale), rendered together.",
        )
    ]


def _told(findings: Findings, metric: str, index: int) -> str:
    """An image's value; of masks also what foreground ARI does not see."""
    prefix, _, name = metric.rpartition("/")
    names = ("ari", "miou") if name == "fg_ari" else ()
    told = [f"{findings.images[metric][index]:.3g}"]
    told += [
        f"{describe(other).label} {findings.images[f'{prefix}/{other}'][index]:.3g}"
        for other in names
    ]
    return f"{' / '.join(told)} (image {index})"


def _grid(subject: Subject, rows: np.ndarray, masks: str) -> grids.Picture:
    batch = subject.source.batch(rows)
    encoded = subject.steps.encode(subject.params, seen(batch), 0)
    present = jnp.ones(encoded.slots.shape[:2], bool)
    attention = encoded.attention
    if masks == "decoder":
        attention = subject.steps.read(
            subject.params, encoded.tokens, encoded.slots, present
        ).attention
    rendered: dict[str, jax.Array] = {}
    if "rendering" in groups_of(subject.config.model.name):
        rendered = subject.steps.rendering(subject.params, batch["image"], 0)[1]
        rendered["slots"] = subject.steps.render(subject.params, encoded.slots, present)
    pictures, attention = jax.device_get((rendered, attention))
    return grids.reconstruction_grid(
        batch["image"],
        pictures.get("dvae"),
        pictures.get("slots"),
        attention,
        batch.get("segmentation"),
    )


def _save_for_papers(
    tiles: np.ndarray, headings: list[str], path: pathlib.Path
) -> None:
    """Rows of as many tiles as there are headings, as PNG, PDF and SVG."""
    rows = tiles.reshape(-1, len(headings), *tiles.shape[1:])
    _save_figure(figures.tile_figure(rows.astype(np.float64), headings), path)


def _save(
    folder: pathlib.Path,
    name: str,
    picture: grids.Picture,
    title: str,
    caption: str,
) -> dict[str, str]:
    with writing(folder):
        grids.save_png(picture, folder / f"{name}.png")
    return {"file": f"{name}.png", "title": title, "caption": caption}


def _save_figure(figure: Figure, path: pathlib.Path) -> None:
    with writing(path.parent):
        figures.save_figure(figure, path)
