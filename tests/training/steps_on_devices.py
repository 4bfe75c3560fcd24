"""A program for tests: trains a small SLATE on the devices of one or several processes.

Arguments: index of this process, number of processes, port of the first one, and for
each layout "devices/sharding/parts". Prints a JSON line: by layout the losses of the
steps, bytes that a device sends in one, by those of the parameters, and how many arrays
of the final state were split.

What takes time to compile and does not matter is left out: parameters and images are
NumPy's random numbers.
"""

import functools
import json
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import scenes
from implicit_slots.data.source import Source
from implicit_slots.models.build import build, split_model
from implicit_slots.runtime import devices as mesh_devices
from implicit_slots.runtime import processes
from implicit_slots.runtime.devices import build_mesh, state_sharding
from implicit_slots.runtime.programs import read_collectives
from implicit_slots.training import device_batches
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps

STEPS = 5
BATCH = 8


class Pictures(Source):
    """Bytes, in blocks of one colour."""

    def __len__(self):
        return 20

    def batch(self, indices):
        """Functions of the index."""
        colours = [
            np.random.default_rng(int(index)).integers(0, 256, (4, 4, 3), np.uint8)
            for index in indices
        ]
        return {"image": np.stack(colours).repeat(4, axis=1).repeat(4, axis=2)}


def section():
    config = scenes.get_config("tokens-smoke")
    # It draws the same numbers wherever its activations lie.
    config.model.update(dropout=0.1, attention_dropout=0.1)
    return config


@functools.cache
def model():
    graphdef, shapes = split_model(nnx.eval_shape(lambda: build(section())))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return graphdef, jax.tree.map(draw, shapes)


def train(layout: str) -> dict:
    devices, name, parts = layout.split("/")
    config = section()
    config.update(sharding=name, accumulate=int(parts), batch_size=BATCH)
    chosen = jax.devices()[: int(devices)]
    mesh = build_mesh(BATCH, parts=int(parts), devices=chosen)
    graphdef, numbers = model()
    params = jax.tree.map(jnp.asarray, numbers)
    optimizer = build_optimizer(config.optimizer, params, num_steps=STEPS)
    state = initial_state(params, optimizer, config.optimizer)
    placement = state_sharding(state, mesh, name)
    state = jax.device_put(state, placement)
    jitted = build_steps(graphdef, optimizer, config, mesh).train
    batches = device_batches.train_batches(
        Pictures(), mesh, batch_size=BATCH, seed=0, start_step=0, placement="host"
    )
    batch, losses = batches.next(), []
    program = jitted.compile(state, batch)
    for _ in range(STEPS):
        state, logged = jitted(state, batch)
        batch = batches.next()
        losses.append(float(jax.device_get(logged).compute()["loss"]))
    batches.close()
    sent = sum(found.sent for found in read_collectives(program.as_text()))
    return {
        "losses": losses,
        "sent": sent / sum(leaf.nbytes for leaf in jax.tree.leaves(numbers)),
        "split": sum(
            not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)
        ),
    }


def main() -> None:
    index, count, port = map(int, sys.argv[1:4])
    several = {"coordinator": f"localhost:{port}", "count": count, "index": index}
    assert bool(processes.initialize(**several if count > 1 else {})) == (count > 1)
    mesh_devices.SMALLEST_SPLIT = 64
    print(json.dumps({layout: train(layout) for layout in sys.argv[4:]}))


if __name__ == "__main__":
    try:
        main()
    except Exception:
        # An exception would wait for the other processes, which wait for this one.
        processes.leave(traceback.format_exc())
