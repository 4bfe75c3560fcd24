"""What each number of an evaluation is: the one table of label, unit, range, source."""

from collections.abc import Mapping
from typing import NamedTuple

GROUPS = (
    "Segmentation",
    "Attention locality",
    "Reconstruction",
    "Object properties",
    "Slot interdependence",
    "Fixed point",
)


class Metric(NamedTuple):
    """A row of the table.

    Attributes:
      group: one of `GROUPS`, or "" for a number that is not in the table.
      label: what a reader sees.
      unit: of the number; "" where it has none.
      range: what values it can take.
      better: "higher", "lower", or "" where neither is.
      meaning: in a line.
      source: where it is defined.
    """

    group: str
    label: str
    unit: str
    range: str
    better: str
    meaning: str
    source: str


def _rows(group: str, **rows: tuple[str, str, str, str, str, str]) -> dict[str, Metric]:
    return {name: Metric(group, *row) for name, row in rows.items()}


# By the name after the prefix that says of which masks or images: "attention/" (of slot
# attention), "decoder/" (of the decoder), "dvae/", "slots/".
METRICS: Mapping[str, Metric] = {
    **_rows(
        "Segmentation",
        ari=(
            "ARI",
            "",
            "≤ 1; 0 is chance",
            "higher",
            "agreement of all pixels' partition with the true one, ground included",
            "Hubert & Arabie (1985)",
        ),
        fg_ari=(
            "Foreground ARI",
            "",
            "≤ 1; 0 is chance",
            "higher",
            "the same over the pixels of true objects",
            "Greff et al. (2019), section 4.1",
        ),
        miou=(
            "mIoU",
            "",
            "0 to 1",
            "higher",
            "intersection over union of each object with its slot (one slot to one "
            "object, the best matching); an object without a slot counts 0",
            "Kuhn (1955) for the matching",
        ),
        mbo=(
            "mBO, instances",
            "",
            "0 to 1",
            "higher",
            "largest intersection over union of each object with any slot",
            "Pont-Tuset et al. (2017)",
        ),
        mbo_class=(
            "mBO, classes",
            "",
            "0 to 1",
            "higher",
            "the same after all objects of a class are made one mask",
            "Seitzer et al. (2023)",
        ),
        soft_iou=(
            "Soft IoU",
            "",
            "0 to 1",
            "higher",
            "mIoU of the masks before each pixel is given to one slot: Σ min / Σ max",
            "Ružička (1958)",
        ),
        boundary_f1=(
            "Boundary F1",
            "",
            "0 to 1",
            "higher",
            "precision and recall of the borders between masks, within 0.8 % of the "
            "image's diagonal",
            "Perazzi et al. (2016), section 5.1",
        ),
        slots_used=(
            "Slots used",
            "slots",
            "1 to the number of slots",
            "",
            "how many slots win at least 0.5 % of an image's pixels",
            "",
        ),
    ),
    **_rows(
        "Attention locality",
        token_entropy=(
            "Entropy over slots",
            "nats",
            "0 to log(slots)",
            "lower",
            "how evenly a position is shared out over the slots",
            "Shannon (1948)",
        ),
        area_ratio=(
            "Effective area",
            "object areas",
            "> 0",
            "",
            "(Σa)² / Σa² of an object's slot over the object's area; 1 is a mask as "
            "large as the object",
            "participation ratio, Bell & Dean (1970)",
        ),
        spread_ratio=(
            "Spread",
            "object radii",
            "≥ 0",
            "lower",
            "root mean squared distance of a slot's attention from its object's "
            "centre, over that of the object's own pixels",
            "",
        ),
        on_object=(
            "On the object",
            "share",
            "0 to 1",
            "higher",
            "share of a slot's attention on its object",
            "Chang et al. (2022), Fig. 10",
        ),
        on_shadow=(
            "On its own shadow",
            "share",
            "0 to 1",
            "",
            "share of a slot's attention on its object's shadow",
            "Chang et al. (2022), Fig. 10",
        ),
        elsewhere=(
            "Elsewhere",
            "share",
            "0 to 1",
            "lower",
            "the rest of it",
            "Chang et al. (2022), Fig. 10",
        ),
        shadow_contrast=(
            "Shadow contrast",
            "",
            "≥ 0; 1: a shadow is nothing special",
            "",
            "attention per pixel of the own shadow over that per pixel of the other "
            "ground",
            "",
        ),
    ),
    **_rows(
        "Reconstruction",
        mse=(
            "Squared error",
            "per image",
            "≥ 0",
            "lower",
            "summed over pixels and channels of levels in [0, 1]",
            "Chang et al. (2022), Table 3",
        ),
        mse_per_pixel=(
            "Squared error per value",
            "",
            "0 to 1",
            "lower",
            "the same, mean over pixels and channels",
            "",
        ),
        psnr=(
            "PSNR",
            "dB",
            "0 to 100, where it is cut off",
            "higher",
            "−10 log10 of the squared error per value; mean over images",
            "",
        ),
        ssim=(
            "SSIM",
            "",
            "−1 to 1",
            "higher",
            "likeness of brightness, contrast and structure in windows of 11 pixels",
            "Wang et al. (2004)",
        ),
        cross_entropy=(
            "Cross-entropy",
            "nats per image",
            "≥ 0",
            "lower",
            "of an image's own tokens given its slots, teacher-forced, no noise",
            "Singh et al. (2022), section 3",
        ),
        cross_entropy_per_token=(
            "Cross-entropy per token",
            "nats",
            "≥ 0",
            "lower",
            "the same, mean over tokens",
            "Singh et al. (2022), section 3",
        ),
        fid=(
            "FID",
            "squared features",
            "≥ 0",
            "lower",
            "Fréchet distance of Inception-v3's pool features of images and renders",
            "Heusel et al. (2017)",
        ),
        frechet_random=(
            "Fréchet distance of random features (not FID)",
            "squared features",
            "≥ 0",
            "lower",
            "the same of a fixed random network; compare at one resolution and number "
            "of images only",
            "Naeem et al. (2020)",
        ),
    ),
    **_rows(
        "Object properties",
        **{
            f"ap_{name}": (
                f"AP, {words}",
                "",
                "0 to 1",
                "higher",
                "area under precision over recall of predicted objects: every "
                f"attribute right, {meaning}, once per object",
                "Locatello et al. (2020), section 4.2",
            )
            for name, words, meaning in (
                ("inf", "any distance", "wherever it is"),
                ("1", "within 1", "less than 1 of CLEVR's units away"),
                ("0_5", "within 0.5", "less than 0.5 away"),
                ("0_25", "within 0.25", "less than 0.25 away"),
                ("0_125", "within 0.125", "less than 0.125 away"),
            )
        },
        position_error=(
            "Position error",
            "CLEVR's units",
            "≥ 0",
            "lower",
            "distance of a slot's position from that of the object that it is matched "
            "with; an image shows about six units",
            "",
        ),
        **{
            f"{name}_accuracy": (
                f"{name.capitalize()} right",
                "share",
                "0 to 1",
                "higher",
                "of the objects, by the slots matched with them",
                "",
            )
            for name in ("size", "material", "shape", "color")
        },
        count_error=(
            "Count error",
            "objects",
            "≥ 0",
            "lower",
            "by how many the slots that are more likely an object than not miss the "
            "number of objects",
            "",
        ),
    ),
    **_rows(
        "Slot interdependence",
        spill=(
            "Spill",
            "per image",
            "≥ 0",
            "lower",
            "squared change outside the object (and its shadow) whose slot is deleted",
            "Chang et al. (2022), Fig. 9",
        ),
        spill_share=(
            "Spill, share",
            "",
            "0 to 1",
            "lower",
            "the same over the whole change",
            "Chang et al. (2022), Fig. 9",
        ),
        scene_spill=(
            "Spill of the true scenes",
            "per image",
            "≥ 0",
            "",
            "the same when the scene is rendered again without the object: what "
            "reflections and edges alone make of it, the least that can be reached",
            "",
        ),
        spill_cross_entropy=(
            "Spill in cross-entropy",
            "nats per image",
            "any",
            "lower",
            "rise of the teacher-forced cross-entropy outside the deleted object",
            "",
        ),
        object_cross_entropy=(
            "Cross-entropy of the object",
            "nats per image",
            "any",
            "",
            "rise of the teacher-forced cross-entropy on the deleted object",
            "",
        ),
        counterfactual_error=(
            "Counterfactual error",
            "per image",
            "≥ 0",
            "lower",
            "squared error of the render against the scene without the deleted objects",
            "",
        ),
        render_error=(
            "Error before deletion",
            "per image",
            "≥ 0",
            "lower",
            "squared error of the render with all slots, to compare the last one with",
            "",
        ),
        predictability=(
            "Predictability",
            "R²",
            "≤ 1; 0 is the mean",
            "lower",
            "how well a linear map foretells a slot from the mean of the others, on "
            "images left out",
            "",
        ),
        jacobian_coupling=(
            "Coupling by J",
            "share",
            "0 to 1",
            "lower",
            "share of ‖J‖² in the blocks between different slots",
            "",
        ),
        inverse_coupling=(
            "Coupling by (I − J)⁻¹",
            "share",
            "0 to 1",
            "lower",
            "the same of the matrix of the implicit gradient",
            "",
        ),
    ),
    **_rows(
        "Fixed point",
        residual=(
            "Residual",
            "",
            "≥ 0",
            "lower",
            "‖f(z) − z‖ / ‖f(z)‖ of the last iteration that was trained with",
            "Chang et al. (2022), Fig. 3a",
        ),
        residual_last=(
            "Residual, iterated on",
            "",
            "≥ 0",
            "lower",
            "the same after config.evaluation.fixed_points.iterations (100)",
            "Chang et al. (2022), Fig. 3a",
        ),
        mask_flips=(
            "Mask flips",
            "share",
            "0 to 1",
            "lower",
            "share of positions that change their slot when iterated on as far",
            "",
        ),
        spectral_radius=(
            "Spectral radius of J",
            "",
            "≥ 0; below 1 contracts",
            "lower",
            "at the slots that training uses",
            "",
        ),
        spectral_norm=(
            "Spectral norm of J",
            "",
            "≥ 0",
            "lower",
            "largest singular value there",
            "Chang et al. (2022), Fig. 5",
        ),
        fixed_points=(
            "Distinct fixed points",
            "",
            "≥ 1",
            "",
            "of an image, from random initial slots, up to the order of slots; of "
            "those that converged",
            "",
        ),
        largest_basin=(
            "Largest basin",
            "share",
            "0 to 1",
            "higher",
            "share of the initial slots that lead to the commonest fixed point",
            "",
        ),
        unconverged=(
            "Not converged",
            "share",
            "0 to 1",
            "lower",
            "share of the initial slots that lead to none",
            "",
        ),
        mask_agreement=(
            "Agreement of masks",
            "ARI",
            "≤ 1; 0 is chance",
            "higher",
            "of the final masks from different initial slots",
            "Hubert & Arabie (1985)",
        ),
    ),
}


def describe(name: str) -> Metric:
    """Returns the row of a metric, whatever its prefix; a plain one if unknown."""
    last = name.rpartition("/")[2]
    return METRICS.get(last, Metric("", last, "", "", "", "", ""))
