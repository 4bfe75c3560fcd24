"""Deletions in which the ground's slot stays, or goes first."""

import jax
import numpy as np

from experiments.studies.ground import ground_slots, orders_of


def test_the_ground_s_slot_is_the_one_on_most_of_the_ground():
    segmentation = np.zeros((2, 4, 4), np.int32)
    segmentation[0, :2] = 1  # the upper half is an object
    segmentation[1, :, :3] = 2  # all but the last column
    attention = np.zeros((2, 3, 2, 2))
    attention[0, 0, 0], attention[0, 2, 1] = 1, 1
    attention[1, 0] = [[1, 0.4], [1, 0.4]]  # more weight, most of it on the object
    attention[1, 1] = [[0, 0.6], [0, 0.6]]
    np.testing.assert_array_equal(ground_slots(attention, segmentation), [2, 1])


def test_orders_differ_in_the_ground_alone():
    ground = np.asarray([2, 0, 3, 1, 1])
    kept, gone = orders_of(jax.random.key(0), ground, 4)
    np.testing.assert_array_equal(kept[:, -1], ground)
    np.testing.assert_array_equal(gone[:, 0], ground)
    np.testing.assert_array_equal(kept[:, :-1], gone[:, 1:])
    np.testing.assert_array_equal(np.sort(kept, axis=1), np.tile(np.arange(4), (5, 1)))
