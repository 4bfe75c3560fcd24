"""Slot attention trained by implicit differentiation.

Importing this package imports neither JAX nor Flax: each name below is imported when it
is first used.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

__all__ = [
    "GMRES",
    "SLATE",
    "Adaptive",
    "Adjoint",
    "Anderson",
    "Autoencoder",
    "BackwardStats",
    "BiCGSTAB",
    "Broyden",
    "Dense",
    "FeatureSlots",
    "Implicit",
    "ImplicitJVP",
    "Neumann",
    "Phantom",
    "Picard",
    "SetPredictor",
    "SlotAttention",
    "Solution",
    "Solver",
    "Stats",
    "Truncated",
    "Unrolled",
    "__version__",
    "backward_probe",
    "best_start",
    "check_pair",
    "coupling_norm",
    "fixed_point",
    "jacobian_norm",
    "load",
    "save_pretrained",
    "start_error",
]

# The names that are not the solver core's.
_HOMES = {
    "SLATE": "models.slate",
    "Autoencoder": "models.autoencoder",
    "FeatureSlots": "models.feature_slots",
    "SetPredictor": "models.set_prediction",
    "SlotAttention": "models.slot_attention",
    "load": "training.pretrained",
    "save_pretrained": "training.pretrained",
}

if TYPE_CHECKING:
    from implicit_slots.fixed_point import *
    from implicit_slots.models.autoencoder import Autoencoder
    from implicit_slots.models.feature_slots import FeatureSlots
    from implicit_slots.models.set_prediction import SetPredictor
    from implicit_slots.models.slate import SLATE
    from implicit_slots.models.slot_attention import SlotAttention
    from implicit_slots.training.pretrained import load, save_pretrained

    __version__: str
else:

    def __getattr__(name):
        if name == "__version__":
            return importlib.metadata.version(__name__)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'fixed_point')}")
        # `fixed_point` is the subpackage itself, which is called like the function.
        found = home if name == "fixed_point" else getattr(home, name)
        return globals().setdefault(name, found)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
