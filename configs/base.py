"""Every key, its meaning and its default: SLATE as published, trained implicitly.

Other files set what they change. What models and solvers default to stands in their
constructors. The values are those of the ShapeStacks set-up of Singh et al. 2022 (from
memory) with the slots, iterations and resolution that Chang et al. 2022 state.
"""

import difflib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

import implicit_slots.fixed_point as core
from configs.smoke import set_smoke
from implicit_slots.models.build import defaults
from implicit_slots.runtime.config import Config

VARIANTS = ("implicit", "vanilla", "vanilla1", "learned", "ib", "bb", "bn", "smoke")


def get_config(name: str, data: Config) -> Config:
    """Returns the default configuration of a run.

    Args:
      name: the run's name; its workdir is runs/<name> unless told otherwise.
      data: the data section, from one of the functions below.
    """
    config: Config = ConfigDict()
    config.name = name
    config.seed = 0
    config.num_steps = 250_000
    config.batch_size = 50  # over all devices
    config.accumulate = 1  # parts of a batch, of which one at a time is in memory
    config.sharding = "replicated"  # or "fsdp": a share of the state on each device
    # False leaves out XLA's optimisations: half the time to compile, slower steps.
    config.optimize_programs = True
    # Or "bfloat16": products alone; parameters, softmaxes and losses stay float32.
    config.precision = "float32"

    config.model = model("slate")

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-4  # peak, of all but those below
    config.optimizer.dvae_learning_rate = 3e-4
    config.optimizer.slots_learning_rate = 0.0  # of encoder and slots; 0: as above
    config.optimizer.dvae_steps = 0  # that train the dVAE, frozen then; 0: all
    config.optimizer.warmup_steps = 30_000  # linear; the dVAE has none; 0: none
    # Or "constant", "half_life", "cosine" to 0 at num_steps.
    config.optimizer.schedule = "plateau"
    config.optimizer.plateau_patience = 4  # validations without improvement
    config.optimizer.plateau_factor = 0.5  # on all rates, each time
    config.optimizer.half_life = 100_000.0  # in steps
    config.optimizer.clip = "max_norm"  # or "l2", over all parameters; "none"
    config.optimizer.clip_limit = 1.0
    # Of a moving average of the parameters, which is then what is evaluated; 0: none.
    config.optimizer.ema_decay = 0.0

    config.temperature = ConfigDict()  # of the Gumbel-softmax: a cosine
    config.temperature.start = 1.0
    config.temperature.end = 0.1
    config.temperature.steps = 30_000

    # On learned initial slots in training, as a multiple of each entry: a cosine.
    config.initial_noise = ConfigDict()
    config.initial_noise.start = 0.0  # 1 in BO-QSA
    config.initial_noise.end = 0.0
    config.initial_noise.steps = 30_000

    config.penalty = ConfigDict()  # added to any model's loss; 0: not computed
    # Times the nats of a position's masks, entropy over the slots, mean over positions.
    config.penalty.attention_entropy = 0.0
    # Times ‖J‖²_F without the slots' own blocks, over num_slots · slot_size: of the
    # step's Jacobian at the slots.
    config.penalty.slot_coupling = 0.0

    config.data = data

    config.diagnostics = ConfigDict()  # of the slots' fixed point, on held-out images
    config.diagnostics.every = 0  # in steps; 0: never
    config.diagnostics.num_examples = 8
    config.diagnostics.krylov = 40  # products with J for the spectral radius
    config.diagnostics.powers = 20  # products before those

    # Of --mode=evaluate, and during training every so many steps (0: never) on the
    # validation split. See implicit_slots/evaluation/README.md.
    config.evaluation = ConfigDict()
    config.evaluation.split = "test"
    config.evaluation.inception = ""  # file of Inception-v3 weights, for the FID
    config.evaluation.lpips = ""  # file of a state of the lpips package's LPIPS
    config.evaluation.masks = ConfigDict({"every": 0, "num_images": 1_000})
    config.evaluation.masks.starts = 1  # initial slots tried; the best rebuilt counts
    config.evaluation.masks.resolution = 0  # at which they are scored; 0: the images'
    config.evaluation.rendering = ConfigDict({"every": 0, "num_images": 1_000})
    config.evaluation.properties = ConfigDict({"every": 0, "num_images": 0})
    config.evaluation.probes = ConfigDict({"every": 0, "num_images": 1_000})
    config.evaluation.probes.match = "auto"  # by "masks"; without them by "loss"
    config.evaluation.deletion = ConfigDict({"every": 0, "num_images": 32})
    config.evaluation.deletion.orders = 2  # random orders of deletion, per image
    config.evaluation.fixed_points = ConfigDict({"every": 0, "num_images": 8})
    config.evaluation.fixed_points.iterations = 100
    config.evaluation.fixed_points.initialisations = 64  # of each image

    config.nonfinite = ConfigDict()  # losses or gradients that are not finite
    config.nonfinite.skip = True  # leaves such a step out
    config.nonfinite.stop_after = 20  # so many in a row stop the run

    config.alarms = ConfigDict()  # sentences in the log; inf: never
    config.alarms.enabled = True
    config.alarms.gradient_growth = 100.0  # times the median of the last 20 logged
    config.alarms.spectral_norm = 100.0  # of J; needs diagnostics.every
    config.alarms.mask_similarity = 0.9  # ARI of two images' masks
    config.alarms.largest_slot = 0.95  # share of the image
    config.alarms.attention_entropy = 0.98  # 1: spread evenly over the slots
    config.alarms.backward_failed = 0.5  # share of images; "implicit" with a tolerance
    config.alarms.patience = 3  # times in a row, for the last four

    config.profile = ConfigDict()  # writes a trace to the workdir's profile/
    config.profile.start = 0  # first step traced; 0: none
    config.profile.steps = 5

    # In steps. Logged training values are means since the last logged step.
    config.log_every = 100
    config.validate_every = 5_000
    config.draw_every = 5_000
    config.checkpoint_every = 5_000
    config.keep_checkpoints = 3  # the last ones; beside them the best one is kept
    config.num_pictures = 8  # rows of the reconstruction grid
    config.num_scored = 512  # images rendered through the slots for the summary
    config.track = ""  # or some of "tensorboard,wandb,mlflow,aim", which get the curves
    return config


def autoencoder(name: str, data: Config) -> Config:
    """Returns the default configuration of the autoencoder, for object discovery.

    The values are those of Locatello et al. 2020 on CLEVR6, at 128x128, with the
    implicit gradient; the variant "vanilla" is theirs.

    Args:
      name: the run's name.
      data: the data section.
    """
    config = _of_locatello(name, data, "autoencoder")
    config.num_steps = 500_000
    config.batch_size = 64
    config.optimizer.warmup_steps = 10_000
    config.optimizer.half_life = 100_000.0
    return config


def set_prediction(name: str, data: Config) -> Config:
    """Returns the default configuration of the set predictor.

    The values are those of Locatello et al. 2020 on CLEVR, at 128x128, with the
    implicit gradient; the variant "vanilla" is theirs.

    Args:
      name: the run's name.
      data: the data section.
    """
    config = _of_locatello(name, data, "set_prediction")
    config.num_steps = 150_000
    config.batch_size = 512
    config.optimizer.warmup_steps = 1_000
    config.optimizer.half_life = 50_000.0
    return config


def _of_locatello(name: str, data: Config, kind: str) -> Config:
    """What the models without a dVAE share: rate, schedule and keys."""
    config = get_config(name, data)
    config.model = model(kind)
    config.optimizer.learning_rate = 4e-4
    config.optimizer.schedule = "half_life"
    config.optimizer.clip = "none"
    # Those of the dVAE alone.
    del config.temperature
    del config.optimizer.dvae_learning_rate
    del config.optimizer.dvae_steps
    return config


def feature_slots(name: str, data: Config) -> Config:
    """Returns the default configuration of slots of frozen features (DINOSAUR).

    The values are those of Seitzer et al. 2023 on COCO, with the MLP decoder and the
    implicit gradient; the variant "vanilla" is theirs.

    Args:
      name: the run's name.
      data: the data section.
    """
    config = _of_locatello(name, data, "feature_slots")
    config.num_steps = 500_000
    config.batch_size = 64
    config.optimizer.update(
        warmup_steps=10_000, half_life=100_000.0, clip="l2", clip_limit=1.0
    )
    config.features = ConfigDict({"weights": ""})  # file of the transformer's
    return config


def model(name: str) -> Config:
    """Section of a model: the arguments of its constructor and of its slot attention.

    Their docstrings say what they mean: `SLATE`, `Autoencoder`, `SetPredictor` and
    `FeatureSlots` in implicit_slots/models, and `SlotAttention` (its `mlp_size` and
    `num_heads` are `slot_mlp_size` and `slot_heads` here).

    Args:
      name: a key of `implicit_slots.models.build.MODELS`.
    """
    arguments = defaults(name)
    iterations = arguments.pop("solver").max_steps
    del arguments["adjoint"]
    section: Config = ConfigDict({"name": name, **arguments})
    section.solver = solver("picard", max_steps=iterations)
    section.adjoint = adjoint()
    return section


def solver(
    name: str,
    *,
    max_steps: int,
    rtol: float = core.Solver.rtol,
    restart: bool = core.Anderson.restart,
) -> Config:
    """Section of a solver: forward, or of the backward pass's linear system.

    Args:
      name: "picard", "anderson" or "broyden"; backward also "gmres", "bicgstab" or
        "dense".
      max_steps: the most evaluations of f, backward of products with J.
      rtol: relative tolerance.
      restart: whether Anderson's method forgets where the residual has grown.
    """
    section: Config = ConfigDict()
    section.name = name
    section.max_steps = max_steps
    section.rtol = rtol
    section.atol = core.Solver.atol
    section.damping = core.Solver.damping  # picard, anderson, broyden: step length
    # The same: steps without progress before an example stops.
    section.patience = core.Solver.patience
    section.depth = core.Anderson.depth  # anderson: how many differences are kept
    section.ridge = core.Anderson.ridge  # anderson: of its least-squares problem
    section.restart = restart  # anderson: forget them where the residual has grown
    section.memory = core.Broyden.memory  # broyden: how many updates are kept
    return section


def adjoint() -> Config:
    """Section of the backward pass."""
    section: Config = ConfigDict()
    # Or "unrolled", "truncated", "phantom", "adaptive", "implicit".
    section.name = "neumann"
    section.terms = core.Neumann.terms  # neumann: how many powers of J
    section.steps = core.Truncated.steps  # truncated, phantom: applications or terms
    section.damping = core.Truncated.damping  # truncated, phantom: step length
    section.max_terms = core.Adaptive.max_terms  # adaptive
    # Adaptive: the relative error of the cotangent that is wanted.
    section.rtol = core.Adaptive.rtol
    section.remat = core.Unrolled.remat  # unrolled, truncated: recompute, do not store
    # Implicit: how uᵀ = uᵀJ + gᵀ is solved.
    # No tolerance to miss: SLATE's slots rarely meet even 1e-2 within 60 steps.
    linear: Any = core.Implicit.solver
    section.solver = solver(
        "gmres", max_steps=linear.max_steps, rtol=linear.rtol, restart=False
    )
    return section


def data(name: str, *, resolution: int, max_objects: int, crop: str = "") -> Config:
    """The keys that every data section has.

    Args:
      name: a row of the table in implicit_slots/data/registry.py.
      resolution: height and width of the images, in pixels.
      max_objects: length of the attributes' arrays and largest id in a mask.
      crop: what part of a frame is kept; the embedded scenes have none.
    """
    section: Config = ConfigDict()
    section.name = name
    section.resolution = resolution
    section.max_objects = max_objects
    if crop:
        section.crop = crop  # see data/readers/preprocessing.py
    section.keep_objects = 0  # leaves out images with more objects; 0: none
    section.flip = False  # mirrors half of the training images
    section.cache = "runs/cache"  # of prepared images; empty: none
    section.placement = "host"  # or "device": the training set in its memory
    section.workers = 2  # threads that read batches ahead
    return section


def scenes() -> Config:
    """Data section: the embedded procedural scenes."""
    section = data("scenes", resolution=96, max_objects=6)
    section.train_size = 50_000
    section.validation_size = 512
    section.test_size = 1_024
    section.seed = 0  # of the data set, not of the run
    section.min_objects = 3
    section.zoom = 1.0  # keeps the middle 1/zoom of CLEVR's crop
    section.with_masks = False  # also for the training images
    return section


def folder() -> Config:
    """Data section: a folder of images, with masks and attributes if there are some."""
    section = files("folder", resolution=96, max_objects=10, crop="center")
    section.validation_fraction = 0.05
    section.test_fraction = 0.05
    section.skip_unreadable = False
    section.ignore_id = 255  # of masks: no metric counts it; -1: none
    return section


def files(
    name: str, *, resolution: int, max_objects: int, crop: str, path: str = ""
) -> Config:
    """Data section of a data set on disk.

    Args:
      name: a row of the table in implicit_slots/data/registry.py.
      resolution: height and width of the images, in pixels.
      max_objects: length of the attributes' arrays and largest id in a mask.
      crop: what part of a frame is kept.
      path: where its files are; of tensorflow-datasets empty for its own default.
    """
    section = data(name, resolution=resolution, max_objects=max_objects, crop=crop)
    section.path = path
    return section


def splits(*, train: str = "", validation: str = "", test: str = "") -> Config:
    """Section of the splits of a record file or of tensorflow-datasets.

    Args:
      train: "start:stop" of a record file's records, or an expression such as
        "train[:90%]" of tensorflow-datasets; empty for the published split.
      validation: the same.
      test: the same.
    """
    section: Config = ConfigDict()
    section.train = train
    section.validation = validation
    section.test = test
    return section


def set_variant(config: Config, variant: str | None, own: Sequence[str] = ()) -> Config:
    """Applies the variants that every configuration has, and names the run by them.

    Args:
      config: the configuration of the file.
      variant: what follows the colon in --config=FILE:variant. "implicit" (the
        default), "vanilla" (back-propagation through the iterations), "vanilla1" (the
        same with a single one), "learned" (each slot starts from a vector of its own,
        trained straight-through), the paper's "ib", "bb" and "bn", or "smoke"
        (seconds: a test that everything works, not a model).
      own: the file's own variants, which it applies itself, for the sentence.

    Raises:
      ValueError: if there is no such variant.
    """
    if variant in (None, "", "implicit"):
        return config
    if variant == "vanilla":
        config.model.adjoint.name = "unrolled"
    elif variant in ("ib", "bb", "bn"):
        set_broyden(config, forward=variant[0] == "b", backward=variant[1] == "b")
    elif variant == "vanilla1":
        # One iteration and its gradient: slots that are never refined.
        config.model.adjoint.name = "unrolled"
        config.model.solver.max_steps = 1
    elif variant == "learned":
        config.model.update(initial_slots="learned", straight_through=True)
    elif variant == "smoke":
        set_smoke(config)
    else:
        known = (*VARIANTS, *own)
        nearest = difflib.get_close_matches(variant, known, n=len(known), cutoff=0)
        raise ValueError(
            f"there is no variant {variant!r}; the nearest first, there are "
            f"{', '.join(nearest)}"
        )
    config.name = f"{config.name}-{variant}"
    return config


def set_broyden(config: Config, *, forward: bool, backward: bool) -> None:
    """Takes Broyden's method where the paper's Fig. 3b does, capped at seven steps."""
    if forward:
        config.model.solver.name = "broyden"
    if backward:
        config.model.adjoint.name = "implicit"
        config.model.adjoint.solver = solver("broyden", max_steps=7)
