"""The law of the noise of one pixel against exact values, and what it certifies."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import special

from src.engine.lattice import law, limit


def masses(table):
    """2**64 P(K = lowest + j) of an alias table, whole numbers."""
    cells, full = 2**table.bits, 2 ** (64 - table.bits)
    found = [0] * cells
    for cell, (entry, lower) in enumerate(zip(table.entries, table.lower, strict=True)):
        threshold = (int(entry) >> table.bits << 32) + int(lower)
        found[cell] += threshold
        found[int(entry) % cells] += full - threshold
    return found


@pytest.mark.parametrize(("sigma", "levels"), [(0.001, 255), (0.12, 255), (0.5, 255), (0.12, 1000)])
def test_total_variation_from_the_exact_law_is_as_stated(sigma, levels):
    table = law(sigma, levels)
    found = masses(table)
    assert sum(found) == 2**64
    with mpmath.workdps(50):
        scale = mpmath.mpf(sigma) * levels
        lowest = table.lowest
        # Far beyond the table's ends nothing is left: 1 - Phi(15) is 4e-51.
        highest = max(lowest + len(found), int(15 * scale) + 2)
        steps = range(-highest, highest + 1)
        bounds = [mpmath.ncdf((j - mpmath.mpf(1) / 2) / scale) for j in (*steps, highest + 1)]
        distance = mpmath.mpf(0)
        for j, low, high in zip(steps, bounds, bounds[1:], strict=False):
            inside = 0 <= j - lowest < len(found)
            mass = mpmath.mpf(found[j - lowest]) / 2**64 if inside else 0
            distance += abs(mass - (high - low)) / 2
        assert 0 < distance <= table.distance < 1e-15


@pytest.mark.parametrize("sigma", [2.0, 3.7, 50.0, 1e6, 1e300])
def test_noise_beyond_the_cut_is_moved_where_every_pixel_is_cut(sigma):
    table = law(sigma)
    found = masses(table)
    ends = -(limit() + 255), limit()
    assert (table.lowest, table.lowest + max(np.flatnonzero(found))) == ends
    with mpmath.workdps(50):
        # All that lies at least as far out.
        expected = mpmath.ncdf((ends[0] + mpmath.mpf(1) / 2) / (mpmath.mpf(sigma) * 255))
        assert abs(mpmath.mpf(found[0]) / 2**64 - expected) < 2.0**-63


def test_law_of_tiny_noise_is_no_noise():
    table = law(1e-9)
    assert masses(table)[-table.lowest] == 2**64


def one_pixel_classifiers():
    """Sets of noisy pixels, as Boolean tables of -4095 ... 4095 steps."""
    steps = np.arange(-limit(), limit() + 1)
    pixels = np.float32(steps) / np.float32(255)
    for exponent in (-3, 0, 3, 7):
        # The float attack of Jin et al. (arXiv 2205.10159): low bits tell where a pixel was.
        shift = np.float32(2.0**exponent / 3)
        yield (pixels - shift) + shift == pixels
    yield (pixels * np.float32(2**28) % 1 == 0) | (np.abs(pixels) >= 2.0**-8)
    for threshold in (-300, 0, 1, 128, 255, 700):
        yield steps >= threshold
    generator = np.random.default_rng(0)
    for _ in range(10):
        yield generator.random(len(steps)) < generator.random()
        # Blocks of random width.
        yield generator.random(len(steps))[np.abs(steps) // generator.integers(1, 200)] < 0.5
    yield steps % 2 == 0
    yield np.abs(steps - 100) < 60


@pytest.mark.parametrize("sigma", [0.1, 0.25, 1.0])
def test_no_one_pixel_classifier_beats_the_theorem_at_any_pair_of_greys(sigma):
    # P(f(a + noise)) for all 256 greys is summed exactly, in whole numbers. The theorem says that
    # sigma Phi^-1 of it changes by at most the distance; a threshold reaches it.
    table = law(sigma)
    mass = np.array(masses(table), dtype=object)
    noise = table.lowest + np.arange(len(mass))
    largest = -np.inf
    for inside in one_pixel_classifiers():
        quantiles = []
        for grey in range(256):
            cut = np.clip(grey + noise, -limit(), limit()) + limit()
            total = int(mass[inside[cut]].sum())
            low, high = total / 2**64, (2**64 - total) / 2**64
            quantiles.append(special.ndtri(low) if low < high else -special.ndtri(high))
        # All but the probabilities of which 64 bits hold no more than a few digits.
        known = np.abs(quantiles) < 6
        q, greys = np.array(quantiles)[known] * sigma, np.arange(256)[known]
        apart = np.abs(np.subtract.outer(greys, greys)) / 255
        largest = max(largest, (np.abs(np.subtract.outer(q, q)) - apart).max(initial=-1))
    # A quantile of 6 has a probability of 1e-9, known to 64 bits: to 5e-11 of it.
    assert -1e-9 < largest < 1e-9


def test_sigma_counts_as_the_float_that_it_is():
    assert law(0.1).entries.tolist() == law(float(Fraction(0.1))).entries.tolist()
    assert law(0.1).lower.tolist() != law(np.nextafter(0.1, 1)).lower.tolist()
