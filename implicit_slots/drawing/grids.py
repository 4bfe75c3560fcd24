"""Arrays into pictures: grids of reconstructions and slots, sheets of images.

Everything here is NumPy and Pillow on the host, a fraction of a second per picture,
and a function of the arrays alone: a resumed run draws the same bytes again.
"""

import io
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

HostArray = np.ndarray | jax.Array
Picture = UInt8[np.ndarray, "height width 3"]

# Twelve colours and the neutral grey, searched for the largest least distance
# between any two (22 in CIELAB) as seen with normal colour vision and without red,
# green or blue cones (Machado et al., 2009); tests/drawing/test_grids.py measures it.
# More slots than that reuse them, darkened.
PALETTE = (
    *("#66AAFF", "#EECC66", "#881133", "#44EECC", "#443388", "#BB6655"),
    *("#AADD99", "#662255", "#DDCCFF", "#665500", "#5577AA", "#AA8822"),
)
NEUTRAL = (0x8C, 0x8F, 0x94)  # what no slot claims
IGNORED = (0xFF, 0xFF, 0xFF)  # true masks do not say what is there
NOT_FINITE = (0xFF, 0x00, 0xFF)
PAGE = (0xF1, 0xF2, 0xF4)
EDGE = (0xC6, 0xC9, 0xCE)
INK = (0x24, 0x27, 0x2C)

MIN_TILE = 96  # pixels; smaller images are enlarged by a whole factor
GAP = 6
MARGIN = 12
FONT_SIZE = 14


def reconstruction_grid(
    image: Shaped[HostArray, "batch height width 3"],
    dvae: Shaped[HostArray, "batch height width 3"] | None,
    slots: Shaped[HostArray, "batch height width 3"] | None,
    attention: Float[HostArray, "batch slots rows columns"],
    segmentation: Int[HostArray, "batch height width"] | None = None,
) -> UInt8[np.ndarray, "picture_height picture_width 3"]:
    """Draws what a model makes of images: one row each, one column per view.

    The columns are the image, what its tokens stand for, what the slots make of it,
    the true masks, the masks predicted (the slot of largest attention, as it is
    scored), then per slot the image where the slot attends and white elsewhere:
    image * attention + (1 - attention), as in Locatello et al. (2020) and Singh et
    al. (2022). A bar under each slot's name is its colour among the masks; a true
    mask has the colour of the slot that covers it best.

    Args:
      image: The input, uint8 or float in [0, 1].
      dvae: Its reconstruction from the discrete tokens, or None without any.
      slots: Its reconstruction from the slots, or None without a decoder.
      attention: Per slot, its weight at each position of the feature grid; the
        weights of a position sum to one.
      segmentation: True segmentation, 0 for background, −1 (white) for what no metric
        counts, or None if unknown.

    Returns:
      The picture. Small images are enlarged by a whole factor without smoothing;
      values that are not finite are magenta.
    """
    image = _to_uint8(np.asarray(image))
    height, width = image.shape[1:3]
    weights = _upsample(np.asarray(attention), height, width)
    predicted = np.argmax(weights, axis=1)
    num_slots = weights.shape[1]
    colours = slot_colours(num_slots)

    columns = [("image", image)]
    if dvae is not None:
        columns.append(("tokens", _to_uint8(np.asarray(dvae))))
    if slots is not None:
        columns.append(("from slots", _to_uint8(np.asarray(slots))))
    if segmentation is not None:
        true = np.asarray(segmentation)
        pairs = zip(true, predicted, strict=True)
        views = [_colour_like_prediction(t, p, colours) for t, p in pairs]
        columns.append(("true masks", np.stack(views)))
    columns.append(("slot masks", colours[predicted]))
    first_slot = len(columns)
    columns += [
        (f"slot {k}", _attended(image, weights[:, k])) for k in range(num_slots)
    ]

    tiles = [_enlarge(views) for _, views in columns]
    top, side = MARGIN + 2 * FONT_SIZE, tiles[0].shape[2]
    picture, lefts = _lay_out(tiles, top=top, break_at=first_slot)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for index, (left, (name, _)) in enumerate(zip(lefts, columns, strict=True)):
        place = (left + side // 2, top - 10)
        draw.text(place, name, fill=INK, font=font, anchor="ms")
        if index >= first_slot:
            colour = tuple(colours[index - first_slot].tolist())
            draw.rectangle((left, top - 6, left + side - 1, top - 4), fill=colour)
    return np.array(canvas)


def contact_sheet(
    images: Shaped[HostArray, "batch height width 3"],
    segmentation: Int[HostArray, "batch height width"] | None = None,
    *,
    columns: int = 8,
    captions: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "picture_height picture_width 3"]:
    """Draws images side by side, each with its masks below where there are any.

    Args:
      images: uint8 or float in [0, 1].
      segmentation: Ids of objects, 0 for background, which is drawn grey, −1 for what
        no metric counts, which is drawn white.
      columns: Images per row.
      captions: A few words under each image.

    Returns:
      The picture. Small images are enlarged by a whole factor without smoothing.
    """
    cells = _enlarge(_to_uint8(np.asarray(images)))
    if segmentation is not None:
        ids = np.asarray(segmentation)
        colours = slot_colours(max(int(ids.max()), 1))
        ends = np.array([[NEUTRAL], [IGNORED]], np.uint8)  # 0 and −1
        colours = np.concatenate([ends[0], colours, ends[1]])
        masks = _enlarge(colours[ids])
        seam = np.full((len(cells), 1, *cells.shape[2:]), EDGE, np.uint8)
        cells = np.concatenate([cells, seam, masks], axis=1)
    if captions is not None:
        under = [_caption(text, cells.shape[2]) for text in captions]
        cells = np.concatenate([cells, np.stack(under)], axis=1)
    columns = min(columns, len(cells))
    tiles = [cells[column::columns] for column in range(columns)]
    picture, _ = _lay_out(tiles, top=MARGIN)
    return picture


def save_png(picture: Picture, path: pathlib.Path) -> None:
    """Writes a picture, creating its directory; a crash leaves no partial file."""
    encoded = io.BytesIO()
    # Level 3 takes half the time of the default, for a file a sixth larger.
    Image.fromarray(picture).save(encoded, format="PNG", compress_level=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(encoded.getvalue())
    os.replace(partial, path)


def slot_colours(count: int) -> UInt8[np.ndarray, "{count} 3"]:
    """The colours of the first `count` slots, as RGB."""
    colours = [tuple(bytes.fromhex(colour[1:])) for colour in PALETTE]
    base = np.array(colours, np.float32)
    rounds, which = np.divmod(np.arange(count), len(base))
    return (base[which] * (0.55 ** rounds[:, None])).astype(np.uint8)


def _caption(text: str, width: int) -> UInt8[np.ndarray, "height {width} 3"]:
    """A line of text on the page's colour."""
    line = Image.new("RGB", (width, FONT_SIZE + 6), PAGE)
    font = ImageFont.load_default(FONT_SIZE)
    place = (width // 2, FONT_SIZE)
    ImageDraw.Draw(line).text(place, text, fill=INK, font=font, anchor="ms")
    return np.array(line)


def _to_uint8(
    values: Shaped[np.ndarray, "batch height width 3"],
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Levels from 0 to 255; magenta where a float is not finite."""
    if values.dtype == np.uint8:
        return values
    values = values.astype(np.float32)
    finite = np.isfinite(values).all(axis=-1, keepdims=True)
    levels = np.rint(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.uint8)
    return np.where(finite, levels, np.array(NOT_FINITE, np.uint8))


def _attended(
    image: UInt8[np.ndarray, "batch height width 3"],
    weight: Float[np.ndarray, "batch height width"],
) -> UInt8[np.ndarray, "batch height width 3"]:
    """The image where the slot attends, white elsewhere; magenta if not finite."""
    finite = np.isfinite(weight)
    weight = np.clip(np.nan_to_num(weight), 0, 1)[..., None]
    # image * weight + 255 * (1 - weight), with one product
    levels = (255.5 - weight * (255 - image)).astype(np.uint8)
    levels[~finite] = NOT_FINITE
    return levels


def _upsample(
    attention: Float[np.ndarray, "batch slots rows columns"], height: int, width: int
) -> Float[np.ndarray, "batch slots {height} {width}"]:
    """Bilinear, pixel centres at halves: as `metrics.segmentation` scores it."""
    batch, slots, rows, columns = attention.shape
    maps = attention.astype(np.float32).reshape(-1, rows, columns)
    resized = [
        np.asarray(
            Image.fromarray(m).resize((width, height), Image.Resampling.BILINEAR)
        )
        for m in maps
    ]
    return np.stack(resized).reshape(batch, slots, height, width)


def _colour_like_prediction(
    true: Int[np.ndarray, "height width"],
    predicted: Int[np.ndarray, "height width"],
    colours: UInt8[np.ndarray, "slots 3"],
) -> UInt8[np.ndarray, "height width 3"]:
    """Colours true masks as the slots that cover them, one slot to one mask.

    Takes the pair of largest intersection over union again and again; a true mask
    that is left over is neutral grey, and white what no metric counts.
    """
    ids, true = np.unique(true, return_inverse=True)
    true = true.reshape(predicted.shape)
    overlap = np.zeros((len(ids), len(colours)))
    np.add.at(overlap, (true, predicted), 1)
    overlap[ids < 0] = 0
    union = overlap.sum(0) + overlap.sum(1, keepdims=True) - overlap
    score = overlap / np.maximum(union, 1)
    chosen = np.tile(np.array(NEUTRAL, np.uint8), (len(ids), 1))
    chosen[ids < 0] = IGNORED
    while score.max() > 0:
        mask, slot = np.unravel_index(np.argmax(score), score.shape)
        chosen[mask] = colours[slot]
        score[mask, :] = 0
        score[:, slot] = 0
    return chosen[true]


def _enlarge(
    images: UInt8[np.ndarray, "batch height width 3"],
) -> UInt8[np.ndarray, "batch tile_height tile_width 3"]:
    """Repeats pixels until the shorter side has at least MIN_TILE."""
    scale = -(-MIN_TILE // min(images.shape[1:3]))
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _lay_out(
    columns: Sequence[UInt8[np.ndarray, "_ tile_height tile_width 3"]],
    *,
    top: int,
    break_at: int | None = None,
) -> tuple[Picture, list[int]]:
    """Sets columns of tiles on a page.

    Args:
      columns: Per column its tiles from the top; all tiles have one size.
      top: Height above the first row, in pixels.
      break_at: The column before which to leave a wider gap.

    Returns:
      The page, and the leftmost pixel of each column.
    """
    rows = max(len(tiles) for tiles in columns)
    height, width = columns[0].shape[1:3]
    lefts = [MARGIN + column * (width + GAP) for column in range(len(columns))]
    if break_at is not None:
        lefts = [x + 2 * GAP * (i >= break_at) for i, x in enumerate(lefts)]
    page_height = top + rows * (height + GAP) - GAP + MARGIN
    page_width = lefts[-1] + width + MARGIN
    page = np.full((page_height, page_width, 3), PAGE, np.uint8)
    for left, tiles in zip(lefts, columns, strict=True):
        for row, tile in enumerate(tiles):
            upper = top + row * (height + GAP)
            # A white tile must not melt into the page: a line around each.
            around = np.s_[upper - 1 : upper + height + 1, left - 1 : left + width + 1]
            page[around] = EDGE
            page[upper : upper + height, left : left + width] = tile
    return page, lefts
