"""Flax NNX models built on the fixed-point solver core."""
