"""How close one image is to another, pixel by pixel and window by window."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from implicit_slots.models.images import squared_error

# In decibels. An error of 1e-5 of white, far below one level of 8 bits.
LARGEST_PSNR = 100.0
# Side in pixels and standard deviation of SSIM's Gaussian window.
_WINDOW, _SIGMA = 11, 1.5


def compare(
    image: Float[Array, "batch height width 3"],
    other: Float[Array, "batch height width 3"],
) -> dict[str, Float[Array, " batch"]]:
    """Measures images against others, such as their reconstructions.

    All numbers are symmetric in the two, and each is of one image: what is reported
    of a data set is the mean over its images, of the PSNR too (and not the PSNR of
    the mean error).

    Args:
      image: Levels in [0, 1].
      other: As many images of the same size, levels in [0, 1].

    Returns:
      Per image, in float32:

      - `mse`: squared error, summed over pixels and channels; from 0, smaller is
        better. The unit of Chang et al. (2022), table 3, and of official SLATE.
      - `mse_per_pixel`: the same, mean over pixels and channels; 0 to 1.
      - `psnr`: peak signal-to-noise ratio −10 log10 of `mse_per_pixel`, in decibels;
        from 0, larger is better. Equal images would have ∞, which no mean survives:
        the largest is 100.
      - `ssim`: structural similarity (Wang et al., 2004, "Image Quality Assessment:
        From Error Visibility to Structural Similarity"), Gaussian window of 11 × 11
        pixels with σ = 1.5 wherever it fits into the image, mean over windows and
        channels; −1 to 1, equal images have 1. NaN where the image is smaller than
        the window. Float32 costs up to 10⁻³ in windows that are nearly flat.
    """
    # Imported here: only evaluation needs it.
    import dm_pix

    image, other = image.astype(jnp.float32), other.astype(jnp.float32)
    batch, *shape = image.shape
    mse = squared_error(image, other)
    mse_per_pixel = mse / (shape[0] * shape[1] * shape[2])
    psnr = jnp.minimum(-10 * jnp.log10(mse_per_pixel), LARGEST_PSNR)
    if min(shape[:2]) < _WINDOW:
        ssim = jnp.full(batch, jnp.nan, jnp.float32)
    else:
        ssim = dm_pix.ssim(image, other, filter_size=_WINDOW, filter_sigma=_SIGMA)
    return {
        "mse": mse,
        "mse_per_pixel": mse_per_pixel,
        "psnr": psnr,
        "ssim": jnp.asarray(ssim),
    }
