"""The variant "smoke": seconds; a test that everything works, not a model."""

from implicit_slots.runtime.config import Config


def set_smoke(config: Config) -> None:
    """Shrinks a configuration until it runs in seconds on one core."""
    config.num_steps = 20
    config.batch_size = 8
    config.optimize_programs = False
    config.model.update(slot_size=16, slot_mlp_size=16)
    if config.model.name == "slate":
        config.model.update(
            vocab_size=16,
            dvae_features=8,
            width=16,
            num_blocks=1,
            num_heads=2,
            num_slots=3,
            encoder_features=8,
        )
    elif config.model.name == "autoencoder":
        config.model.update(
            features=8, decoder_features=8, num_slots=3, broadcast_side=0
        )
        if config.model.decoder_strides[0] > 1:
            config.model.decoder_strides = (2, 2)
    elif config.model.name == "feature_slots":
        config.features.weights = ""
        config.model.update(vit="random", decoder_features=16, num_slots=3)
        config.model.update(decoder_blocks=1, decoder_heads=2)
    else:
        config.model.update(features=8, head_size=16)
    config.data.resolution = 16
    if config.data.name == "scenes":
        config.data.update(train_size=64, validation_size=16, test_size=16)
    config.update(
        log_every=10,
        validate_every=20,
        draw_every=20,
        checkpoint_every=10,
        num_pictures=4,
    )
    config.evaluation.masks.resolution = 0
    config.evaluation.deletion.update(num_images=4, orders=1)
    config.evaluation.fixed_points.update(num_images=2, initialisations=4)
