"""Images per second of the procedural scenes, by resolution, and compilation time.

    python -m experiments.benchmarks.scenes [--out FILE.json]

Two minutes on two cores. Each round renders new scenes; threads share a batch.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np

from implicit_slots.data.scenes import rendering


def measure(resolution: int, batch: int, rounds: int, threads: int) -> dict:
    """Compilation seconds and the rates of ``rounds`` batches at one resolution."""
    draw = partial(rendering.render_batch, 0, "train", resolution=resolution)

    def render(indices):
        jax.block_until_ready(draw(indices))

    share = batch // threads
    start = time.perf_counter()
    render(np.arange(share))
    compilation = time.perf_counter() - start
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for r in range(rounds):
            starts = batch * (r + 1) + share * np.arange(threads)
            start = time.perf_counter()
            list(pool.map(lambda s: render(np.arange(s, s + share)), starts))
            rates.append(share * threads / (time.perf_counter() - start))
    return {
        "resolution": resolution,
        "threads": threads,
        "first_call_s": compilation,
        "images_per_s": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
    }


def main() -> None:
    """Prints the table and, with ``--out``, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()

    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    print("resolution  threads  images/s    min    max  first call s")
    rows = []
    for resolution in flags.resolutions:
        for threads in flags.threads:
            row = measure(resolution, flags.batch, flags.rounds, threads)
            rows.append(row)
            print(
                f"{resolution:10d}{threads:9d}{row['images_per_s']:10.0f}"
                f"{row['slowest']:7.0f}{row['fastest']:7.0f}"
                f"{row['first_call_s']:14.1f}",
                flush=True,
            )
    if flags.out:
        flags.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
