"""The benchmarks' other side: official SLATE in PyTorch, from a checkout of yours.

Its modules are imported and nothing is copied. PyTorch is imported inside the
functions: without it everything else works.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks.contestants import Bench
from experiments.benchmarks.harness import Configuration, draw_images
from implicit_slots.runtime.errors import UserError


def check(directory: Path | None) -> None:
    """Looks for the official code and for PyTorch, without importing either.

    Raises:
      UserError: if one is missing, and a directory was given.
    """
    if directory is None:
        return
    if not (directory / "slate.py").is_file():
        raise UserError(
            f"--official={directory} holds no slate.py; check out "
            "github.com/singhgautam/slate there"
        )
    if importlib.util.find_spec("torch") is None:
        raise UserError("--official needs PyTorch: pip install torch")


def build(directory: Path, configuration: Configuration) -> Any:
    """Returns the official model, freshly initialised, on `device`."""
    sys.path.insert(0, str(directory))
    import slate  # pyright: ignore[reportMissingImports]

    arguments = types.SimpleNamespace(
        image_size=configuration.resolution,
        img_channels=3,
        vocab_size=configuration.vocab,
        d_model=configuration.width,
        num_dec_blocks=configuration.blocks,
        num_heads=configuration.heads,
        dropout=0.1,
        num_iterations=configuration.iterations,
        num_slots=configuration.slots,
        num_slot_heads=1,
        slot_size=configuration.width,
        mlp_hidden_size=configuration.width,
        pos_channels=4,  # read by nothing
    )
    return slate.SLATE(arguments).to(device())


def device() -> str:
    """Returns "cuda" where PyTorch has it, else "cpu"."""
    import torch  # pyright: ignore[reportMissingImports]

    return "cuda" if torch.cuda.is_available() else "cpu"


def images(configuration: Configuration) -> Any:
    """Returns `draw_images` as official SLATE takes them: floats, channels first."""
    import torch  # pyright: ignore[reportMissingImports]

    image = torch.from_numpy(draw_images(configuration)).permute(0, 3, 1, 2)
    return (image.float() / 255).contiguous().to(device())


def bench(step: Callable[[], Any]) -> Bench:
    """Returns the `Bench` of a PyTorch step."""
    import torch  # pyright: ignore[reportMissingImports]

    cuda = torch.cuda.is_available()
    return Bench(
        step=step,
        wait=lambda _: torch.cuda.synchronize() if cuda else None,
        facts=facts(),
        peak=lambda: torch.cuda.max_memory_allocated() if cuda else None,
        chained=cuda,
    )


def facts() -> dict[str, Any]:
    """Returns what PyTorch runs on in this process."""
    import torch  # pyright: ignore[reportMissingImports]

    cuda = torch.cuda.is_available()
    return {
        "platform": "gpu" if cuda else "cpu",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }
