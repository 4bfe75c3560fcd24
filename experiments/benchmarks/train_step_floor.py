"""The arithmetic of SLATE's train step, and the time below which no device does it."""

import math
from typing import Any, NamedTuple

from experiments.benchmarks.harness import DVAE_FEATURES, Configuration

# What data sheets say: dense products/s in bfloat16 and on tensor cores (TF32, XLA's
# default for float32), two operations each multiply-add; bytes/s of the memory.
PEAKS = {
    "H200": (989e12, 494e12, 4.8e12),
    "H100": (989e12, 494e12, 3.35e12),
    "A100": (312e12, 156e12, 2.0e12),
}


class Product(NamedTuple):
    """A product of [rows, inputs · taps] with [inputs · taps, outputs].

    A convolution is one too: its rows are the places, its taps the kernel's area.
    """

    rows: int
    inputs: int
    outputs: int
    taps: int = 1


def products(configuration: Configuration) -> list[Product]:
    """The products with parameters of a forward pass, without the slots' iterations.

    As published: with keys and values of every input, which our slot attention does
    not compute (2 % of the step at (b)).
    """
    f, d, v = DVAE_FEATURES, configuration.width, configuration.vocab
    n = configuration.batch * configuration.tokens
    slots = configuration.batch * configuration.slots

    def upsample(rows: int) -> list[Product]:
        same = Product(rows, f, f)
        return [Product(rows, f, f, taps=9), same, same, Product(rows, f, 4 * f)]

    square = Product(n, d, d)
    block = [
        *[Product(n, d, 3 * d), square],  # self-attention: q, k, v; output
        *[square, Product(slots, d, 2 * d), square],  # to the slots: q; k, v; output
        *[Product(n, d, 4 * d), Product(n, 4 * d, d)],  # feed-forward
    ]
    return [
        *[Product(n, 3, f, taps=16), *[Product(n, f, f)] * 6, Product(n, f, v)],
        *[Product(n, v, f), *upsample(n), *upsample(4 * n), Product(16 * n, f, 3)],
        *[square, square, Product(n, d, 2 * d)],  # the slots' encoder, keys and values
        Product(slots, d, d),
        *block * configuration.blocks,
        Product(n, d, v),
    ]


def count_flops(configuration: Configuration, adjoint: str) -> int:
    """Floating-point operations of a train step, two for each multiply-add.

    A backward pass costs two forward passes. The decoder's attention takes n · n · D
    multiply-adds per image and block, half of the full 2 · n · n · D because it is
    causal, and 2 · n · K · D to K slots. An iteration of slot attention takes
    2 · n · K · D + 9 · K · D² (queries, GRU, MLP). "vanilla" makes T iterations and
    goes back through all, "implicit" makes T + 1 and goes back through one. What is not
    a product (norms, softmax, random numbers, Adam) is not counted.
    """
    c, d, n = configuration, configuration.width, configuration.tokens
    dense = sum(math.prod(product) for product in products(c))
    attention = c.blocks * c.batch * (n * n * d + 2 * n * c.slots * d)
    iteration = c.batch * c.slots * (2 * n * d + 9 * d * d)
    steps = c.iterations
    forward, backward = (steps + 1, 1) if adjoint == "implicit" else (steps, steps)
    return 2 * (3 * (dense + attention) + (forward + 2 * backward) * iteration)


def least_bytes(configuration: Configuration, parameters: int, precision: str) -> int:
    """Memory traffic that a step without recomputation cannot avoid.

    What enters a product is written in the forward pass and read in the backward pass.
    A parameter is read three times (forward, backward, Adam) and written once, its
    gradient written once and read twice (clipping, Adam), both moments read and
    written: eleven times four bytes.
    """
    size = 2 if precision == "bfloat16" else 4
    entering = sum(product.rows * product.inputs for product in products(configuration))
    return 2 * size * entering + 11 * 4 * parameters


def floor_seconds(
    flops: float, traffic: float, facts: dict[str, Any], precision: str
) -> float | None:
    """The time below which no step goes; None on a device of unknown peak."""
    if "matmul_flops" in facts:
        return flops / facts["matmul_flops"]
    for name, (bfloat16, tensor32, bandwidth) in PEAKS.items():
        if name in facts["device"]:
            peak = bfloat16 if precision == "bfloat16" else tensor32
            return max(flops / peak, traffic / bandwidth)
    return None
