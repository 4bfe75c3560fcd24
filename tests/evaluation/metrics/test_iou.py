"""Matching, overlaps and all of score_masks, against loops in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, jaccard_score
from sklearn.metrics.cluster import pair_confusion_matrix

from implicit_slots.evaluation.metrics import iou
from implicit_slots.evaluation.metrics.segmentation import USED, score_masks, upsample

SIDE, GRID, SLOTS, MOST = 16, 4, 4, 6
OF_OBJECTS = (
    *("fg_ari", "fg_ari_precision", "fg_ari_recall", "miou", "mbo", "soft_iou"),
    *("bo_recall", "corloc", "miou_class", "mbo_class"),
)


@pytest.fixture(scope="module")
def scored():
    return jax.jit(
        lambda attention, true, classes: score_masks(
            attention, true, max_true=MOST, classes=classes
        )
    )


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def case():
    """Six images: random, one object, none, ids missing, more objects than slots."""
    rng = np.random.default_rng(0)
    attention = softmax(3 * rng.normal(size=(6, SLOTS, GRID, GRID)))
    blocks = rng.integers(0, 4, size=(6, GRID, GRID))
    true = np.kron(blocks, np.ones((4, 4), int)).astype(np.int32)
    true[1] = (true[1] == 1).astype(np.int32) * 5
    true[2] = 0
    true[3][true[3] == 2] = 6
    true[4] = np.arange(SIDE)[None] // 2 % 7
    attention[5] = 1 / SLOTS  # ties: all pixels go to the first slot
    classes = rng.integers(0, 3, size=(6, MOST)).astype(np.int32)
    return attention, true, classes


def wallace(true, predicted):
    """The adjusted Wallace coefficients in their own words, from pairs of pixels.

    Of the pairs together in one partition, the share that is together in the other;
    less the share of all pairs that is, over what it can be beyond that.
    """
    (apart, merged), (split, together) = pair_confusion_matrix(true, predicted).tolist()
    pairs = apart + merged + split + together

    def half(wrong, in_other):
        if not wrong:
            return 1.0
        by_chance = in_other / pairs
        return (together / (together + wrong) - by_chance) / (1 - by_chance)

    return half(merged, together + split), half(split, together + merged)


def want(attention, true, classes):
    """The definitions, one image at a time."""
    weights = np.asarray(upsample(jnp.asarray(attention[None]), SIDE, SIDE))[0]
    predicted = weights.argmax(axis=0)
    ids = [i for i in range(1, MOST + 1) if (true == i).any()]
    found = {
        "ari": adjusted_rand_score(true.ravel(), predicted.ravel()),
        **dict(
            zip(
                ("ari_precision", "ari_recall"),
                wallace(true.ravel(), predicted.ravel()),
                strict=True,
            )
        ),
        "slots_used": float(sum((predicted == k).mean() >= USED for k in range(SLOTS))),
    }
    every = [true == i for i in np.unique(true)]
    best = table(every, predicted, weights, False).max(axis=1)
    areas = [mask.sum() for mask in every]
    found |= {"sc": np.average(best, weights=areas), "msc": best.mean()}
    if not ids:
        return found | dict.fromkeys(OF_OBJECTS, np.nan)
    seen = true > 0
    found["fg_ari"] = adjusted_rand_score(true[seen], predicted[seen])
    halves = wallace(true[seen], predicted[seen])
    found["fg_ari_precision"], found["fg_ari_recall"] = halves
    # Of which the index is the harmonic mean.
    if all(half > 0 for half in halves):
        assert np.isclose(found["fg_ari"], 2 / sum(1 / half for half in halves))

    def matched(scores):
        rows, columns = linear_sum_assignment(-scores)
        return scores[rows, columns].sum() / len(scores)

    hard = table([true == i for i in ids], predicted, weights, False)
    found["miou"], found["mbo"] = matched(hard), hard.max(axis=1).mean()
    found["bo_recall"] = sum(row.max() > 0.5 for row in hard) / len(hard)
    found["corloc"] = float(hard.max() > 0.5)
    found["soft_iou"] = matched(table([true == i for i in ids], None, weights, True))
    kinds = sorted({classes[i - 1] for i in ids})
    of_class = [
        np.isin(true, [i for i in ids if classes[i - 1] == kind]) for kind in kinds
    ]
    of_class = table(of_class, predicted, weights, False)
    found["miou_class"] = matched(of_class)
    found["mbo_class"] = of_class.max(axis=1).mean()
    return found


def table(masks, predicted, weights, soft):
    """Intersections over unions of masks and slots."""
    scores = np.zeros((len(masks), SLOTS))
    for (i, mask), k in itertools.product(enumerate(masks), range(SLOTS)):
        if soft:
            both = np.minimum(mask, weights[k]).sum(dtype=np.float64)
            either = np.maximum(mask, weights[k]).sum(dtype=np.float64)
            scores[i, k] = both / either
        elif mask.any() or (predicted == k).any():
            scores[i, k] = jaccard_score(mask.ravel(), (predicted == k).ravel())
    return scores


def test_scores_equal_the_definitions(scored, case):
    got = scored(*case)
    assert set(got) == {*want(*(part[0] for part in case)), "boundary_f1"}
    for index in range(len(case[0])):
        for name, value in want(*(part[index] for part in case)).items():
            assert np.isclose(
                got[name][index], value, rtol=FLOAT32, atol=FLOAT32, equal_nan=True
            ), (name, index)


def test_slots_in_another_order_and_images_alone_score_the_same(scored, case):
    attention, true, classes = case
    got = scored(*case)
    turned = scored(attention[:, [2, 0, 3, 1]], true, classes)
    # Where nothing is tied: a tie goes to the first slot, which is another one then.
    for name, values in got.items():
        assert np.allclose(values[:5], turned[name][:5], atol=1e-5, equal_nan=True)
    alone = scored(*(np.repeat(part[3:4], 6, axis=0) for part in case))
    for name, values in got.items():
        assert np.allclose(values[3], alone[name], atol=1e-6, equal_nan=True)


def test_true_masks_score_one(scored):
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, SLOTS, size=(6, SIDE, SIDE)).astype(np.int32)
    attention = np.moveaxis(np.eye(SLOTS, dtype=np.float32)[blocks], -1, 1)
    got = scored(attention, blocks, np.zeros((6, MOST), np.int32) + np.arange(MOST))
    for name in (*OF_OBJECTS, "ari", "ari_precision", "ari_recall", "sc", "msc"):
        assert np.allclose(got[name], 1, atol=1e-6), name
    assert np.allclose(got["boundary_f1"], 1)
    assert np.all(got["slots_used"] == SLOTS)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 4), (4, 1)])
def test_matching_reaches_scipys_optimum(shape):
    rng = np.random.default_rng(2)
    scores = rng.uniform(size=(5, *shape)).astype(np.float32)
    scores[1] = np.round(scores[1], 1)  # ties
    scores[2] = 0.0
    scores[3, 0] = 0.0  # an object that is not there
    slots = np.asarray(iou.match(jnp.asarray(scores)))
    for found, of_image in zip(slots, scores, strict=True):
        taken = found[found >= 0]
        assert len(set(taken.tolist())) == len(taken)
        total = sum(of_image[i, k] for i, k in enumerate(found) if k >= 0)
        rows, columns = linear_sum_assignment(-of_image)
        assert np.isclose(total, of_image[rows, columns].sum(), atol=1e-6)
        assert all(of_image[i, k] > 0 for i, k in enumerate(found) if k >= 0)
    assert np.all(slots[2] == -1) and slots[3, 0] == -1


def test_classes_are_united_once():
    masks = np.zeros((1, 4, 5), np.float32)
    masks[0, 0, 0] = masks[0, 1, 1:3] = masks[0, 2, 3] = 1  # the fourth is not there
    classes = np.array([[7, 2, 7, 2]], np.int32)
    got = np.asarray(iou.merge_classes(jnp.asarray(masks), jnp.asarray(classes)))
    expected = [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0] * 5, [0] * 5]
    assert np.array_equal(got[0], expected)


@pytest.mark.parametrize("fault", ["attention", "too large", "negative"])
def test_what_cannot_be_scored_is_not_scored(scored, case, fault):
    attention, true, classes = (part.copy() for part in case)
    if fault == "attention":
        attention[0, 0, 0, 0] = np.nan
    else:
        true[0, 0, 0] = MOST + 1 if fault == "too large" else -2
    for name, value in scored(attention, true, classes).items():
        assert np.isnan(value[0]), name
        np.testing.assert_array_equal(value[1:], scored(*case)[name][1:])
