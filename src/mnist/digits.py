"""A picture of a digit brought into the form of MNIST's images (no torch).

MNIST's digits are white ink on black, 20 pixels in their longer side, in a square of 28 with their
centre of mass in the middle (LeCun et al., 1998). Bounds are of the 60,000 training images.
"""

import itertools
import os
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from src.mnist.pictures import grey_pixels, open_image, ring

SIDE, DIGIT, CENTRE = 28, 20, 14
# Less of a difference between ink and background, of 255, is none.
LEAST_CONTRAST = 16
# Light is uneven if the background varies by more than this share of the contrast.
UNEVEN = 0.1
# Strokes of MNIST are 2 to 6 pixels wide, in the middle 2.7, by the measure of `_stroke_width`.
THIN, USUAL, THICK = 1.2, 2.4, 9.0
# Of the pixels of MNIST's images a share of 0.025 to 0.40 are ink.
LEAST_INK, MOST_INK = 0.025, 0.40
# Half of MNIST's digits are taller than wide; the widest are 2.2 times as wide as tall.
WIDEST = 2.5
# Pieces below this share of the largest are dust.
DUST = 0.05
# Pixels of the working copy, in which strokes are measured and thickened, per pixel of a digit.
FINE = 8
_NEIGHBOURS = np.ones((3, 3), bool)


class Digit(NamedTuple):
    """A digit as MNIST has it, uint8 (28, 28), and sentences on what was guessed or is doubtful."""

    pixels: np.ndarray
    notes: list[str]


def read_digit(path: str | os.PathLike) -> Digit:
    """The digit in an image file; errors as of `open_image`, and ValueError if it is blank."""
    grey = grey_pixels(open_image(path))
    try:
        return as_mnist(grey)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def as_mnist(grey: np.ndarray) -> Digit:
    """Bring grey pixels, float (H, W) from 0 to 255, into the form of MNIST's images.

    An image that has this form stays as it is, but for its polarity.

    Raises:
        ValueError: if no ink stands out from the background.
    """
    light = _background_is_light(grey)
    notes = ["It is dark on light, so it was inverted."] if light else []
    upright = 255 - grey if light else grey
    if _has_form(upright):
        pixels = np.rint(upright).astype(np.uint8)
        return Digit(pixels, notes + _sentence(_doubts(pixels)))
    ink, uneven = _ink(upright)
    kept, left_out = _kept(ink)
    pixels, thickened = _normalised(np.where(kept, ink, 0))
    notes.append("It was cropped to the ink, scaled to 20 pixels and centred, as MNIST is.")
    if uneven:
        notes.append("Its background is uneven, as in a photograph, and was evened out.")
    if left_out > DUST:
        notes.append("Other marks in it were left out.")
    if thickened:
        notes.append("Its strokes are thinner than those of MNIST, so they were thickened.")
    doubts = _doubts(pixels)
    if left_out > 0.5:
        doubts.append("most of the ink lies elsewhere")
    if ring(kept & (ink > 0.5)).mean() > 0.25:
        doubts.append("its ink runs along the border")
    return Digit(pixels, notes + _sentence(doubts))


def _background_is_light(grey: np.ndarray) -> bool:
    """Whether ink is darker than the border, from which it differs most; ValueError if blank."""
    plane = ndimage.uniform_filter(grey, 3) if min(grey.shape) > 200 else grey
    level = _level(plane)
    below, above = level - plane.min(), plane.max() - level
    if max(below, above) < LEAST_CONTRAST:
        raise ValueError("is blank: no ink stands out from the background.")
    if min(below, above) > 0.3 * max(below, above):
        # Uneven light: the background itself has bright and dark parts.
        flat = plane - _lighting(plane)
        return -np.quantile(flat, 0.005) > np.quantile(flat, 0.995)
    return below > above


def _has_form(pixels: np.ndarray) -> bool:
    """Whether an image looks as MNIST's do: 28 x 28, dark background, centred ink."""
    if pixels.shape != (SIDE, SIDE) or np.median(ring(pixels)) > 0.3 * 255:
        return False
    rows, columns = np.nonzero(pixels >= 128)
    if not len(rows):
        return False
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    centre = ndimage.center_of_mass(pixels)
    return 14 <= longer <= 22 and np.abs(np.subtract(centre, CENTRE)).max() <= 1


def _ink(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Ink from 0 to 1, by contrast with the background, and whether the background was uneven."""
    level, surface = _level(pixels), _lighting(pixels)
    # Of a flat background many pixels have one value, however little of it is left.
    flat = np.histogram(pixels, 32)[0].max() > 0.3 * pixels.size
    uneven = not flat and np.ptp(surface) > UNEVEN * (pixels.max() - level)
    surface = surface if uneven else level
    ink = pixels - surface
    if uneven:
        # Ink takes away a share of the light, so it is fainter in the shade: 255 is no light.
        shade = np.maximum(255 - surface, 1)
        ink = 255 * ink / shade if np.median(shade) > 127 else ink
    # Faint ink is the noise of the background, which is as strong in both directions.
    noise = 3 * 1.4826 * np.median(np.abs(ink - np.median(ink)))
    strong = ink[ink > _otsu(ink)]
    top = np.quantile(strong, 0.6)
    floor = min(noise, 0.4 * top)
    return np.clip((ink - floor) / (top - floor), 0, 1), uneven


def _level(pixels: np.ndarray) -> float:
    """The usual value along the border."""
    return float(np.median(ring(pixels, max(1, min(pixels.shape) // 50))))


def _lighting(pixels: np.ndarray) -> np.ndarray:
    """A surface of second degree through the background, from which ink is left out."""
    step = max(1, max(pixels.shape) // 100)
    rows, columns = (np.linspace(-1, 1, size) for size in pixels.shape)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * y, x**2, y**2], axis=-1)
    some, values = terms[::step, ::step].reshape(-1, 6), pixels[::step, ::step].ravel()
    chosen = np.ones(len(values), bool)
    for _ in range(12):
        weights = np.linalg.lstsq(some[chosen], values[chosen], rcond=None)[0]
        distance = np.abs(values - some @ weights)
        # The median keeps at least half of the pixels, so that a fit is always possible.
        chosen = distance <= 2.5 * np.median(distance) + 1
    return terms @ weights


def _otsu(values: np.ndarray) -> float:
    """The threshold that parts values into two groups of least variance (Otsu, 1979)."""
    counts, edges = np.histogram(values, 128)
    middles = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * middles)
    means = sums[:-1] / np.maximum(below, 1), (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return edges[1 + np.argmax(below * above * (means[1] - means[0]) ** 2)]


def _kept(ink: np.ndarray) -> tuple[np.ndarray, float]:
    """Which pixels belong to the digit, and the ink of other large marks as a share of its own.

    Dust goes, and what touches the border does if there is a digit that does not.
    """
    numbers, count = ndimage.label(ink >= 0.5, _NEIGHBOURS)
    sizes = np.bincount(numbers.ravel(), minlength=count + 1).astype(float)
    sizes[0] = 0
    inside = sizes.copy()
    inside[np.unique(ring(numbers))] = 0
    boxes = ndimage.find_objects(numbers)
    if inside.any():
        box = boxes[int(inside.argmax()) - 1]
        tall = max(part.stop - part.start for part in box) >= max(ink.shape) / 8
    candidates = inside if inside.any() and tall else sizes
    chosen = candidates >= max(DUST * candidates.max(), 1)
    strong = chosen[numbers]
    # With the faint edges of what is kept, and not those of dust.
    kept = ndimage.binary_propagation(strong, _NEIGHBOURS, ink > 0.1)
    return kept, float(sizes[~chosen & (sizes >= DUST * sizes[chosen].max())].sum() / strong.sum())


def _normalised(ink: np.ndarray) -> tuple[np.ndarray, bool]:
    """The ink (H, W), 0 to 1, at MNIST's size and place, uint8; and whether strokes were thick."""
    fine = _scaled(_cropped(ink), DIGIT * FINE)
    width = _stroke_width(fine >= 0.5) / FINE
    if thin := width < THIN:
        radius = round((USUAL - width) * FINE / 2)
        y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
        fine = ndimage.grey_dilation(np.pad(fine, radius), footprint=x**2 + y**2 <= radius**2)
    small = _scaled(_cropped(fine), DIGIT)
    return _centred(np.rint(small * (255 / small.max())).astype(np.uint8)), thin


def _cropped(ink: np.ndarray) -> np.ndarray:
    (box,) = ndimage.find_objects((ink > 0.1).astype(int))
    return ink[box]


def _scaled(ink: np.ndarray, longer: int) -> np.ndarray:
    """The ink with its longer side at `longer` pixels; smaller pixels are averaged."""
    size = [max(1, round(side * longer / max(ink.shape))) for side in reversed(ink.shape)]
    image = Image.fromarray(ink.astype(np.float32))
    return np.clip(np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float64), 0, 1)


def _centred(digit: np.ndarray) -> np.ndarray:
    """The digit in a square of 28, its centre of mass in the middle."""
    square = np.zeros((SIDE, SIDE), np.uint8)
    place = [
        min(max(round(CENTRE - centre), 0), SIDE - size)
        for centre, size in zip(ndimage.center_of_mass(digit), digit.shape, strict=True)
    ]
    square[tuple(slice(at, at + size) for at, size in zip(place, digit.shape, strict=True))] = digit
    return square


def _stroke_width(mask: np.ndarray) -> float:
    """The mean width of strokes: in a long one the mean distance to its edge is a quarter of it."""
    inside = np.pad(mask, 1)
    return 4 * (ndimage.distance_transform_edt(inside)[inside].mean() - 0.5)


def _doubts(pixels: np.ndarray) -> list[str]:
    """Why an image in MNIST's form does not look like a digit, in a few words each."""
    strong, doubts = pixels >= 128, []
    share = pixels.mean() / 255
    if not LEAST_INK <= share <= MOST_INK:
        doubts.append(f"{100 * share:.1f} % of it is ink, in MNIST 3 to 40 %")
    if (width := _stroke_width(strong)) > THICK:
        doubts.append(f"its strokes are {width:.0f} pixels wide, in MNIST 2 to 6")
    tall, wide = (np.ptp(found) + 1 for found in np.nonzero(strong))
    if wide > WIDEST * tall:
        doubts.append("it is far wider than tall")
    numbers, _ = ndimage.label(strong, _NEIGHBOURS)
    sizes = np.bincount(numbers.ravel())[1:]
    boxes = zip(ndimage.find_objects(numbers), sizes, strict=True)
    spans = sorted((x.start, x.stop) for (_, x), size in boxes if size >= 0.35 * sizes.max())
    # The pieces of a broken digit lie above each other.
    apart = any(right[0] > left[1] for left, right in itertools.pairwise(spans))
    if len(spans) > 2 or apart:
        doubts.append(f"it has {len(spans)} large separate pieces")
    return doubts


def _sentence(doubts: list[str]) -> list[str]:
    return [f"It does not look like a digit: {'; '.join(doubts)}."] if doubts else []
