"""Slots that read the image and not tokens: the small models, and the variant "image".

Two published SLATEs do so, and each data set follows the one that is nearest to it.

* STEVE (Singh, Wu, Ahn 2022; github.com/singhgautam/steve, train.py and steve.py):
  MOVi-C, which its code downloads; CLEVR and CLEVR6, because its authors read CLEVR
  scenes of their own with the same encoder, but 512 channels
  (github.com/singhgautam/sysbinder, train.py).
* BO-QSA (Jia et al. 2023; github.com/YuLiu-LY/BO-QSA, train/train_trans_dec.py and
  scripts/train): ShapeStacks, COCO and CLEVRTex, of which it has readers.

Only model, optimiser, batch and number of steps are theirs. The data and the number of
slots stay those of the file, so that a variant is compared with its own default.
Iterations are counted as in the other files: the implicit gradient makes one more.
BO-QSA's three are two without a gradient and one with it.

No key says these of STEVE: no decay of the dVAE's rate; 192 channels and no ReLU in the
last convolution; no MLP after the last iteration; slots that go on from frame to frame.
Nor these of BO-QSA: the encoder's MLP goes from 64 over 256 to 256; DropPath 0.2 on the
slots' MLP; 3x3 convolutions in the dVAE.
"""

from collections.abc import Callable

from configs import base
from implicit_slots.runtime.config import Config


def set_variant(
    config: Config,
    variant: str | None,
    change: Callable[[Config], None],
    first: str = "image",
) -> Config:
    """Applies a file's own variant and those that every configuration has.

    Args:
      config: the configuration of the file.
      variant: `first`, one of `base.set_variant`, or both, as in "image-vanilla".
      change: what `first` changes; see the functions below.
      first: the own variant's name.

    Raises:
      ValueError: if there is no such variant.
    """
    own, _, rest = (variant or "").partition("-")
    if own == first:
        change(config)
        config.name, variant = f"{config.name}-{first}", rest
    try:
        return base.set_variant(config, variant, own=(first,))
    except ValueError as error:
        raise ValueError(f"{error}; {first}- goes before any of them") from error


def set_small_variant(config: Config, variant: str | None) -> Config:
    """Applies `set_small` unless the variant is "tokens", then the rest of it.

    Vanilla takes the rates that are best for it, half again as large: see
    experiments/results/notes/finding_objects.md.

    Args:
      config: the published model at a small size.
      variant: "tokens", one of `base.set_variant`, or both, as in "tokens-vanilla".

    Raises:
      ValueError: if there is no such variant.
    """
    if (variant or "").partition("-")[0] != "tokens":
        set_small(config)
        if variant == "vanilla":
            config.optimizer.learning_rate *= 1.5
            config.optimizer.slots_learning_rate *= 1.5
    return set_variant(config, variant, lambda config: None, first="tokens")


def set_small(config: Config) -> None:
    """Takes what finds objects on two CPU cores.

    configs/README.md says what each key is worth.

    Slots are compared by the colours of 2x2 pixels, not by what lies around: else an
    object's slot takes a rim of the ground. Keys know places a little and values know
    them well: else slots share the ground by nearness. Targets are fixed, rare ones
    weigh more, and the decoder cannot do without the slots.
    """
    config.num_steps = 18_000
    config.batch_size = 8
    config.model.update(
        tokenizer="patches",
        token_weighting=0.6,
        drop_tokens=1.0,
        inputs="image",
        encoder_features=32,
        encoder_strides=(2, 1),
        encoder_kernels=(2, 1),
        encoder_padding="edge",
        encoder_positions="apart",
        position_scale=0.05,
        initial_slots="learned",
        straight_through=True,
        attention_gain=1.5,
    )
    config.optimizer.update(
        learning_rate=1.5e-3,
        slots_learning_rate=7.5e-4,
        warmup_steps=100,
        clip_limit=0.1,
    )


def set_steve(config: Config) -> None:
    """Takes STEVE's settings, for single frames of at least 96x96."""
    config.num_steps = 200_000
    config.batch_size = 72  # 24 videos of three frames
    config.model.update(
        inputs="image",
        encoder_strides=(2, 1, 1, 1),  # at 64x64 they are all 1
        num_heads=4,
    )
    # SysBinder's, of single images. STEVE makes two for each frame of a video.
    config.model.solver.max_steps = 3
    config.optimizer.update(
        learning_rate=3e-4,
        slots_learning_rate=1e-4,
        schedule="half_life",
        half_life=250_000.0,
        clip_limit=0.05,
    )


def set_bo_qsa(config: Config) -> None:
    """Takes the settings of BO-QSA with a transformer decoder, as for COCO."""
    config.batch_size = 128
    config.model.update(
        inputs="image",
        encoder_strides=(1, 1, 1, 1),
        vocab_size=1_024,
        width=256,
        num_blocks=4,
        num_heads=4,
        slot_size=256,
        slot_mlp_size=256,
        initial_slots="learned",
        straight_through=True,
        normalizer="damped",
    )
    config.initial_noise.update(start=1.0, end=0.0, steps=30_000)
    config.model.solver.max_steps = 3
    config.optimizer.update(
        learning_rate=1e-4,
        warmup_steps=10_000,
        schedule="half_life",
        half_life=50_000.0,
        clip="l2",
    )


def set_bo_qsa_synthetic(config: Config) -> None:
    """Takes the same with the encoder of BO-QSA's scripts for synthetic images.

    They are scripts/train/mix_dec_shapestacks.sh and mix_dec_clevrtex.sh, whose decoder
    is another: a mixture of slots' images.
    """
    set_bo_qsa(config)
    config.model.encoder_strides = (2, 1, 1, 1)
