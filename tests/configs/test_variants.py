"""What follows the colon of --config=FILE:variant."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("file", "variant", "nearest", "more"),
    [
        ("scenes", "vanila", "vanilla, vanilla1", "; tokens- goes before any of them"),
        ("scenes", "tokens-smok", "smoke", "; tokens- goes before any of them"),
        ("clevr", "imge", "image", "; image- goes before any of them"),
        ("autoencoder_scenes", "ful", "full", ""),
        ("set_prediction_scenes", "larned", "learned", ""),
        ("clevr_mirror", "-", "", ""),
    ],
)
def test_a_variant_that_is_none_names_those_there_are(file, variant, nearest, more):
    with pytest.raises(ValueError) as refusal:
        importlib.import_module(f"configs.{file}").get_config(variant)
    what, _, listed = str(refusal.value).partition("the nearest first, there are ")
    assert what == f"there is no variant {variant.removeprefix('tokens-')!r}; "
    assert listed.startswith(nearest) and listed.endswith(more)
    known = {"implicit", "vanilla", "vanilla1", "learned", "ib", "bb", "bn", "smoke"}
    assert known <= set(listed.removesuffix(more).split(", "))
