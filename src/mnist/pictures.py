"""Image files of any kind as one plane of grey pixels (no torch).

Pillow reads them, as matplotlib lets it read all but PNG. torchvision.io has no BMP and TIFF.
"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Others that Pillow knows call programs (EPS) or are no pictures.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
SMALLEST, MOST_PIXELS = 5, 64_000_000
# Larger pictures are averaged down to at most this side: 50 times that of a digit is plenty.
WORKING_SIZE = 1000


def open_image(path: str | os.PathLike) -> Image.Image:
    """The picture in a file, its first frame, turned upright as its EXIF data say.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture of FORMATS, is damaged, or is too small or too large.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no image {path}.")
    try:
        if not path.is_file():
            raise ValueError("not a file")
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            # Before a pixel is unpacked: a small file may hold an image that fills the memory.
            if wrong := _wrong_size(*image.size):
                size = "{} x {}".format(*image.size)
                raise _SizeError(f"{path} is {size} pixels, which is too {wrong}.")
            image.load()
            return ImageOps.exif_transpose(image)
    except _SizeError as error:
        raise ValueError(str(error)) from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path} is too large: give at most {MOST_PIXELS:,} pixels.") from None
    except Exception:
        # Decoders raise a dozen types of error.
        known = ", ".join(FORMATS)
        raise ValueError(
            f"{path} is not an image that can be read: it is damaged or none of {known}."
        ) from None


class _SizeError(Exception):
    """The size of an image is out of range."""


def _wrong_size(width: int, height: int) -> str:
    if min(width, height) < SMALLEST:
        return f"small: give at least {SMALLEST} x {SMALLEST}"
    return f"large: give at most {MOST_PIXELS:,}" if width * height > MOST_PIXELS else ""


def grey_pixels(image: Image.Image) -> np.ndarray:
    """The picture in grey: float64 (H, W), 0 (black) to 255; 8-bit greys keep their values.

    Transparent parts become background. Of a picture in colour it is the brightness, or the red,
    green or blue alone if ink stands out far better there. Large pictures are reduced.
    """
    if image.mode.startswith(("I", "F")):
        # 16-bit greys come as whole numbers up to 65,535. Pillow's own conversion cuts at 255.
        values = np.asarray(image, np.float64)
        if not np.isfinite(values).all():
            return np.zeros(values.shape)
        values = values - min(values.min(), 0)
        top = 65_535 if image.mode.startswith("I") else 1.0
        return _reduced(Image.fromarray((values * (255 / max(top, values.max()))).astype("f4")))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = _on_background(image.convert("RGBA"))
    if image.mode in ("1", "L"):
        return _reduced(image.convert("L"))
    image = image.convert("RGB")
    planes = [_reduced(plane) for plane in (image.convert("L"), *image.split())]
    best = max(planes, key=np.ptp)
    return best if np.ptp(best) > 1.5 * np.ptp(planes[0]) else planes[0]


def _reduced(image: Image.Image) -> np.ndarray:
    """The pixels of one plane, averaged over squares if there are many."""
    factor = -(-max(image.size) // WORKING_SIZE)
    if factor > 1 and min(image.size) >= factor * SMALLEST:
        image = image.reduce(factor)
    # Floats of a 16-bit picture carry rounding errors, and 8-bit greys must stay whole.
    return np.round(np.asarray(image, np.float64), 3)


def _on_background(image: Image.Image) -> Image.Image:
    """A picture with transparent parts, laid on the colour of its background.

    If its border is mostly opaque, that is the background. Else the background is what is
    transparent: white under dark ink, black under light ink.
    """
    small = image.reduce(max(1, min(image.size) // 100))
    colours = np.asarray(small.convert("RGB"), np.float64).reshape(-1, 3)
    alpha = np.asarray(small.getchannel("A"), np.float64)
    opaque = (alpha > 127).ravel()
    border = ring(np.arange(alpha.size).reshape(alpha.shape))
    if opaque[border].mean() >= 0.5:
        fill = np.median(colours[border][opaque[border]], axis=0)
    else:
        # Transparent pixels have colours too, which nobody sees.
        weights = alpha.ravel() + 1e-9
        fill = [255 if np.average(colours.mean(axis=1), weights=weights) < 128 else 0] * 3
    background = Image.new("RGBA", image.size, (*(int(value) for value in fill), 255))
    return Image.alpha_composite(background, image).convert("RGB")


def ring(plane: np.ndarray, width: int = 1) -> np.ndarray:
    """The pixels at most `width` from the border, in one row."""
    inner = np.ones(plane.shape, bool)
    inner[width:-width, width:-width] = False
    return plane[inner]
