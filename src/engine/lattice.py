"""Gaussian noise rounded to a grid: its law, as a table of integers that is the same everywhere.

An image is held in whole steps of 1 / levels, as a rule 1/255. The noise of a pixel is a whole
number K of steps, P(K = j) = Phi((j + 1/2) / (levels sigma)) - Phi((j - 1/2) / (levels sigma)).
This is exactly the law of Gaussian noise rounded to the grid. So "round, cut, ask the network" is
one more base classifier, and Cohen's theorem holds for it in exact arithmetic; see
docs/mathematics.md.
"""

import functools
import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# Steps per unit of the usual grid: bytes.
LEVELS = 255
# The finest grid.
MOST_LEVELS = 16 * LEVELS
# Noisy pixels are cut a little beyond this many units. The cut is part of the base classifier.
CUT = 16
# Noise beyond this many standard deviations is moved there.
REACH = 9
# Bits of the fixed-point numbers below. The terms of the series are below 2**59, so that more than
# 120 bits of the result are right.
_BITS = 192
_ONE = 1 << _BITS


class Law(NamedTuple):
    """The noise of a pixel as an alias table (Walker 1974; Vose, IEEE Trans. Softw. Eng. 1991).

    A draw is two random numbers u and v of 32 bits. The lowest `bits` of u choose a cell c. If
    (u >> bits, v) < the threshold of c, a pair as well, the number drawn is c, else the alias of c.
    The noise is that number plus `lowest`.
    """

    entries: np.ndarray  # uint32 (2**bits,): first of the threshold << bits | alias
    lower: np.ndarray  # uint32 (2**bits,): second of the threshold
    bits: int
    lowest: int
    distance: float  # from the exact law, in total variation, at most


def limit(levels: int = LEVELS) -> int:
    """Steps at which noisy pixels are cut, below and above 0: 4,095 on the usual grid."""
    return CUT * levels + levels // 17


@functools.lru_cache(maxsize=16)
def law(sigma: float, levels: int = LEVELS) -> Law:
    """The law of one pixel's noise at `sigma`, positive and finite, in pixel units.

    Computed in whole numbers only: scipy and the C library change their last digits from release to
    release, and the noise would change with them.
    """
    masses, lowest = _masses(Fraction(sigma) * levels, limit(levels), levels)
    bits = max((len(masses) - 1).bit_length(), 1)
    entries, lower = _alias_table(masses, bits)
    # The masses are differences of cumulative probabilities rounded to 2**-64, so each is off by at
    # most 2**-64. The total variation is half their sum, plus the mass moved to both ends, at most
    # 2 (1 - Phi(9)) < 2.3e-19 < 2**-61. The error of the fixed-point numbers is far below the half
    # that is not needed.
    distance = len(masses) * 2.0**-64 + 2.0**-61
    return Law(entries, lower, bits, lowest, distance)


def _masses(sigma: Fraction, cut: int, levels: int) -> tuple[list[int], int]:
    """2**64 P(K = j) for all j from the lowest on, in whole numbers that add up to 2**64.

    `sigma` is in steps. A pixel of 0 to `levels` steps is cut at `cut` when the noise was added.
    """
    reach = math.ceil(REACH * sigma)
    # Whatever lies beyond these is cut for every pixel, so to move it there costs nothing.
    lowest, highest = -min(reach, cut + levels), min(reach, cut)
    half = [_above_half((2 * j + 1) / (2 * sigma)) for j in range(-lowest)]
    # Phi(-x) = 1 - Phi(x), also after rounding.
    below = [(1 << 63) - half[-j - 1] for j in range(lowest, 0)]
    below += [(1 << 63) + value for value in half[:highest]]
    ends = [0, *below, 1 << 64]
    return [after - before for before, after in itertools.pairwise(ends)], lowest


def _above_half(x: Fraction) -> int:
    """2**64 (Phi(x) - 1/2) for x > 0, rounded to a whole number."""
    # 1 - Phi(10) is 1e-23; the series of larger arguments would be long.
    if x > 10:
        return 1 << 63
    # Phi(x) - 1/2 = (x - x^3 / (2 * 3) + x^5 / (2 * 4 * 5) - ...) / sqrt(2 pi)
    term = total = _ONE * x.numerator // x.denominator
    square = term * term >> _BITS
    k = 0
    while term:
        k += 1
        term = (term * square >> _BITS) // (2 * k)
        total += (-1) ** k * (term // (2 * k + 1))
    scaled = total * _ONE // _root_of_two_pi() << 64
    return (scaled + _ONE // 2) >> _BITS


@functools.cache
def _root_of_two_pi() -> int:
    """sqrt(2 pi) in fixed point, from Machin's formula for pi."""
    pi = 4 * (4 * _arctan_of_inverse(5) - _arctan_of_inverse(239))
    return math.isqrt(2 * pi << _BITS)


def _arctan_of_inverse(n: int) -> int:
    """arctan(1 / n) in fixed point."""
    power, total, k = _ONE // n, 0, 1
    while power:
        total += power // k if k % 4 == 1 else -(power // k)
        power, k = power // (n * n), k + 2
    return total


def _alias_table(masses: list[int], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`entries` and `lower` of a Law: 2**bits cells of equal mass, each of at most two numbers."""
    cell = 1 << (64 - bits)
    left = masses + [0] * ((1 << bits) - len(masses))
    alias = list(range(len(left)))
    threshold = [0] * len(left)
    small = [i for i, mass in enumerate(left) if mass < cell]
    large = [i for i, mass in enumerate(left) if mass >= cell]
    while small:
        i, j = small.pop(), large[-1]
        alias[i], threshold[i] = j, left[i]
        left[j] -= cell - left[i]
        if left[j] < cell:
            small.append(large.pop())
    # What is left in `large` fills its cell; it is its own alias, whatever its threshold.
    upper = np.array([value >> 32 for value in threshold], dtype=np.uint32)
    lower = np.array([value & 0xFFFFFFFF for value in threshold], dtype=np.uint32)
    return upper << np.uint32(bits) | np.array(alias, dtype=np.uint32), lower
